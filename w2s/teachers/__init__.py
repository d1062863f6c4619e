"""Frozen teachers: images in, patch features on the student's grid and a summary out. `base.py` first.

`networks/` has what they are made of, `distillation/` what the stages do with them.
"""
