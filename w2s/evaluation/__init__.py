"""Zero-shot classification, retrieval and k-NN."""
