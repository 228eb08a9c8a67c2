"""What a run takes and whether a model is sound, before a GPU hour is spent."""
