"""Experiments: whole comparisons, made of runs."""
