"""Brain scans: what is in one, recording it, its picture and its page."""
