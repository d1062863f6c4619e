"""A training: the loop, the run that it shares with its callbacks, and the callbacks that every run has."""
