"""Evaluate tuned policies against their base: win-rates with intervals, comparisons of runs, reports."""
