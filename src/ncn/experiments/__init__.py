"""Whole comparisons, made of runs: a folder for each. None knows another."""
