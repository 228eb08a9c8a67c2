"""Checks before a GPU hour is spent: a run's memory, disk and time, and whether a model works."""
