"""How everything of the shapes world that is learned was made: `python -m capo.shapes.make --help`."""
