"""Training: text, the loop, checkpoints, the run folder, and the engines that share the work among processes."""
