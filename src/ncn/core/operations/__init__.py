"""The arithmetic of the layers: norm, linear maps, rotary positions, loss."""
