"""Scores of features: zero-shot classification, retrieval, k-NN, linear probe; tensors in, metrics out."""
