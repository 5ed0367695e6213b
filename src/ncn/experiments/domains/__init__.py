"""Two domains in one model, together and one after the other."""
