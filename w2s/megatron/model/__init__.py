"""The transformer layers of a tower, their weights, and which pipeline stage has them."""
