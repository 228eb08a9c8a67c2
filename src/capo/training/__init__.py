"""Training: the Lightning trainer, checkpoints, validation and loggers."""
