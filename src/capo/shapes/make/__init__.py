"""Training of all learned parts of the shapes world: `python -m capo.shapes.make --help`."""

PLACE = "make room there, or choose another folder with --work"  # remedy where a file cannot be written
