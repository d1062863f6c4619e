"""report.html of a run, of a `w2s run` or of several runs, and the pictures in it. Read `report.py` first."""
