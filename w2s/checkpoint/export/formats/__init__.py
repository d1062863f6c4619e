"""The formats that `w2s export` writes, a file each; `base.py` has what they share."""
