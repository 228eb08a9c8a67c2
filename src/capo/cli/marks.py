"""Names that Hydra reads in a node that says what is called."""

TARGET = "_target_"
MARKS = (TARGET, "_args_", "_partial_", "_recursive_", "_convert_")
