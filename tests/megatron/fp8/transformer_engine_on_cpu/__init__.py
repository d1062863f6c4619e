"""Transformer Engine's own Python over a stand-in for its C++ extension, which multiplies on a CPU."""
