"""What surrounds the training loop: settings, preparation, processes, the run's log, and its memory."""
