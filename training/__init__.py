"""What serves the loop in train.py: flags and recipes, optimizers, many processes, checkpoints, the log."""
