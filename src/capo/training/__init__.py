"""The fit: Lightning trainer, checkpoints, validation, loggers."""
