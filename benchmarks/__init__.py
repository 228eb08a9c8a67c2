"""Scripts that time one part each: `python -m benchmarks.selection` and others, see README.md."""
