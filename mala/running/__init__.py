"""The parts around the training loop: its settings, its preparation, and its processes."""
