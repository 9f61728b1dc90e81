"""SIB-200 and Taxi1500: the questions, the choice of shots, and the figures computed from the answers."""
