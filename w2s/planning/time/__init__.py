"""Seconds of a step: `duration.py`, of what a card does (`cards.yaml`, `roofline.py`) and a layer takes."""
