"""From a raw sample to a batch: decoding, crops, masks, captions, tokens. Read `sample.py` first."""
