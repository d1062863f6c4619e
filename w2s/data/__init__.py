"""Shards, the resumable stream, decoding and augmentation, masks, tokens."""
