"""The training stream: which sample comes when, and the processes that read it. Read `stream.py` first."""
