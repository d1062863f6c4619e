"""From shards to raw samples: files wherever they lie, tar and parquet, in order. Read `containers.py` first."""
