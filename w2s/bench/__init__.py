"""Measurements, side by side with a peer: `w2s bench`."""
