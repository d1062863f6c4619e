"""The networks that teachers are made of, by where they come from: timm, open_clip, transformers, EVA, packages, runs.

Each is a `PatchNetwork` (`w2s/teachers/base.py`); begin with `timm_vit.py`.
"""
