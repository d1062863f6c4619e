"""`w2s data`: making shards, counting, checking and showing them. Read `make.py` first."""
