"""Weights under one set of names, the released EVA-CLIP ones, whoever wrote them. Read `released.py` first.

`layouts.py` has the tables of other programs' names, and `matching.py` says what a model takes of a checkpoint.
"""
