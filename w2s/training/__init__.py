"""What the training loop is made of: what it shares with its callbacks, and the callbacks that every run has."""
