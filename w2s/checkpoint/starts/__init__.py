"""What a training starts from: hand-over between stages, growth, averages, continued runs. Read `handover.py` first."""
