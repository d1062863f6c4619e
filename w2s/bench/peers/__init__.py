"""The step of a stage as a peer's users write it, for `w2s bench step --vs`."""
