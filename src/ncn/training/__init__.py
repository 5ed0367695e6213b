"""A training run: its step, its loop, its folder."""
