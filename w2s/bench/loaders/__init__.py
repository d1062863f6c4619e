"""The loader beside open_clip's: from the disk (`data.py`), and over a slow network (`remote.py`)."""
