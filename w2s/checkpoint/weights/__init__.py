"""Weights of others, under one set of names: the released EVA-CLIP ones. Read `released.py` first."""
