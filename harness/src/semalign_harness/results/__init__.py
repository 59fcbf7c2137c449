"""Contracts of runs, evaluations and comparisons, and the names of their files."""
