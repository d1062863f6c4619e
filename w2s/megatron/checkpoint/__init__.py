"""Distributed checkpoints: written in the background, read without running code from them."""
