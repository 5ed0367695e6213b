"""Neuromodulatory Control Networks."""
