"""Tuned policies against their base: win-rates with intervals, comparisons, reports."""
