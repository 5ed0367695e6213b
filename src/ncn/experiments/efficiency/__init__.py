"""What each token bought: power laws through training curves."""
