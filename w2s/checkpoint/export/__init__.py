"""`w2s export`: a checkpoint as a folder that other programs load.

Read `exporting.py` first; `formats/` has one file each.
"""
