"""Processes and their lives: local ranks, how they start, stop and fail; `liveness/`, who notices that one stalls.

Read `elastic.py` first.
"""
