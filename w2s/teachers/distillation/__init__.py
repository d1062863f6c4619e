"""Teachers at work: from images to targets, and from predictions to a loss; `masked.py` first."""
