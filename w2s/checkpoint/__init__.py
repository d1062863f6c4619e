"""Checkpoints: our own (`own`), other people's weights (`weights`), what a stage starts from (`starts`), and exports.

`find.py` finds one by what a user calls it; read `own/checkpoint_folders.py` first.
"""
