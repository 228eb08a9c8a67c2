"""HTML pages, console tables and images that present results."""
