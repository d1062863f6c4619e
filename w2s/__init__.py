"""w2s: grow a bigger CLIP out of a smaller one (weak-to-strong scaling, the EVA way)."""

__version__ = "0.1.0"
