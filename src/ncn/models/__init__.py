"""Models on disk, and the published one for comparison."""
