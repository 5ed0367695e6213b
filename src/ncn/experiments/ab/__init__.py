"""Does it help? Arms of equal size on the same batches, with intervals."""
