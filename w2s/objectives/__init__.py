"""The losses: pure functions of tensors and a process group; `masked_loss.py` and `contrastive.py` first."""
