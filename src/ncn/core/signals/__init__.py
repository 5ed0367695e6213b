"""What control signals are and what they do to a layer (equations 4 to 6)."""
