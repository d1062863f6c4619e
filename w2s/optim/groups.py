"""Parameter groups: learning rate by tower and layer, weight decay by kind of parameter."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from w2s.config.sections import OptimConfig

EMBEDDINGS = ("patch_embed", "cls_token", "pos_embed", "mask_token", "token_embedding", "positional_embedding")
NEVER_DECAYED = ("pos_embed", "cls_token", "positional_embedding", "logit_scale")


def layer_id(name: str, layers: int) -> int:
    """Return how far up a tower a parameter is: 0 for embeddings, i + 1 for layer i, layers + 1 for norm and head."""
    layer = re.match(r"blocks\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    return 0 if name.startswith(EMBEDDINGS) else layers + 1


def peak_lr(tower: str, name: str, layers: int, optim: OptimConfig) -> float:
    """Return a parameter's peak learning rate: its tower's, times the decay for every layer below the head.

    Source: baaivision/EVA, shinji/training/optim.py.
    """
    if name == "logit_scale":
        return optim.lr
    base, decay = {
        "vision": (optim.vision_lr, optim.vision_layer_decay),
        "text": (optim.text_lr, optim.text_layer_decay),
    }[tower]
    return (optim.lr if base is None else base) * decay ** (layers + 1 - layer_id(name, layers))


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to 1-D tensors, positions, CLS and the logit scale."""
    return parameter.ndim > 1 and not name.startswith(NEVER_DECAYED)


def parameter_groups(
    parameters: Iterable[tuple[str, str, int, nn.Parameter]], optim: OptimConfig
) -> list[dict[str, Any]]:
    """Sort parameters into groups of one peak learning rate and one weight decay.

    Args:
        parameters: (tower, global name, layers of the tower, parameter).
        optim: learning rates, decays and weight decay.

    Returns:
        Groups with `params`, `peak_lr` and `weight_decay`, in an order that depends on the values alone.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for tower, name, layers, parameter in parameters:
        if parameter.requires_grad:
            key = peak_lr(tower, name, layers, optim), is_decayed(name, parameter)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "peak_lr": lr, "weight_decay": optim.weight_decay if decayed else 0.0}
        for (lr, decayed), members in sorted(groups.items(), key=lambda item: item[0])
    ]
