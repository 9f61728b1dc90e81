"""SIB-200 and Taxi1500: what is asked, which shots are shown, and what the answers are worth."""
