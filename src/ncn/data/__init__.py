"""From text to shards of tokens, and from shards to batches."""
