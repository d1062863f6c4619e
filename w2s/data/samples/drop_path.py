"""Which branches of the vision tower's layers drop path leaves out."""

import numpy as np
from numpy.typing import NDArray


def branch_scales(rng: np.random.Generator, layers: int, drop_path: float) -> NDArray[np.float32]:
    """Draw what the output of each branch is multiplied with before it is added to the residual.

    A branch is left out with a probability that rises linearly from 0 in the first layer to `drop_path` in the last;
    one that is kept makes up for it by 1 / (1 - probability) (Huang et al. 2016, "Deep networks with stochastic depth";
    timm/models/eva.py).

    Args:
        rng: what is drawn from.
        layers: layers of the tower.
        drop_path: probability of the last layer, in [0, 1).

    Returns:
        float32 [layers, 2], of attention and MLP.
    """
    keep = 1 - np.linspace(0, drop_path, layers)[:, None]
    return ((rng.random((layers, 2)) < keep) / keep).astype(np.float32)
