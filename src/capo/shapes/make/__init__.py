"""Training of all learned parts of the shapes world: `python -m capo.shapes.make --help`."""
