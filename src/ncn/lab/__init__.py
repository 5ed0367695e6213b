"""What experiments share: arms, plans, tuning, and many runs side by side."""
