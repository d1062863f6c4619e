"""Data sets that w2s builds by itself, from packages: `emoji` for the demo, `showcase` for the experiment."""
