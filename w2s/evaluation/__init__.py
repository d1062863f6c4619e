"""Zero-shot classification, retrieval, k-NN and a linear probe, on single test sets and suites of them."""
