"""The towers: plain model code that knows no ranks."""
