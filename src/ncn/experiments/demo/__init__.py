"""The first look: a small model and its twin, trained and drawn in minutes."""
