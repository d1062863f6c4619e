"""Bytes of a rank: `planned_stage.py` is a stage in one layout, `rank_memory.py` the fullest moment of its step."""
