"""The losses: pure functions of tensors and a process group."""
