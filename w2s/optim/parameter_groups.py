"""Parameter groups: learning rate and frozen steps by tower and layer, weight decay by kind of parameter."""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from w2s.config.sections import OptimConfig

EMBEDDINGS = (
    "patch_embed", "cls_token", "pos_embed", "norm_pre", "mask_token", "token_embedding", "positional_embedding",
)  # fmt: skip
LOGIT_PARAMETERS = ("logit_scale", "logit_bias")
"""Of the loss, in float32 whatever the weights are."""
NEVER_DECAYED = ("pos_embed", "cls_token", "head.latent", "positional_embedding", "logit_scale")


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
    if name in LOGIT_PARAMETERS:
        return optim.lr
    base, decay = {
        "vision": (optim.vision_lr, optim.vision_layer_decay),
        "text": (optim.text_lr, optim.text_layer_decay),
    }[tower]
    return (optim.lr if base is None else base) * decay ** (layers + 1 - layer_id(name, layers))


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to 1-D tensors, positions, CLS, SigLIP's probe and the logit scale."""
    return parameter.ndim > 1 and not name.startswith(NEVER_DECAYED)


def has_trust_ratio(tower: str, parameter: nn.Parameter, trust_1d: str, scratch: Collection[str]) -> bool:
    """Whether LAMB rescales a parameter: 1-D tensors as `optim.trust_1d` says, all others always.

    A bias starts at zero, and a ratio of the norms lets it grow by a fraction of the little that it has. (The LAMB of
    baaivision/EVA, shinji/training/lamb.py, has no ratio on whatever has no weight decay.)

    Args:
        tower: the tower's name.
        parameter: the whole weight, or a tensor-parallel part of it.
        trust_1d: `always`, `never`, or `auto`: not in the towers of `scratch`.
        scratch: towers that start from scratch.
    """
    return parameter.ndim != 1 or trust_1d == "always" or (trust_1d == "auto" and tower not in scratch)


def frozen_steps(tower: str, name: str, layers: int, optim: OptimConfig) -> int:
    """Return the first steps in which a parameter does not move."""
    steps, lowest = {
        "vision": (optim.vision_frozen_steps, optim.vision_frozen_layers),
        "text": (optim.text_frozen_steps, optim.text_frozen_layers),
    }[tower]
    is_frozen = name not in LOGIT_PARAMETERS and (lowest is None or layer_id(name, layers) <= lowest)
    return steps if is_frozen else 0


Kind = tuple[float, bool, bool, int]
"""Peak learning rate of a group, whether weight decay applies, whether it holds the scalars of the loss, frozen steps.

The scalars are apart because Megatron takes all weights of a group to be of one type.
"""


def parameter_groups(
    parameters: Iterable[tuple[str, str, int, nn.Parameter]],
    optim: OptimConfig,
    everywhere: Callable[[set[Kind]], set[Kind]],
) -> list[dict[str, Any]]:
    """Sort parameters into groups of one peak learning rate, one weight decay and one number of frozen steps.

    Args:
        parameters: (tower, global name, layers of the tower, parameter); those that a rank holds.
        optim: learning rates, decays and weight decay.
        everywhere: takes the kinds of groups that this rank has, returns those that any rank has.

    Returns:
        Groups with `params`, `peak_lr`, `weight_decay`, `scalars` and `frozen_steps`, the same on every rank, some
        perhaps empty.
    """
    groups: dict[Kind, list[nn.Parameter]] = {}
    for tower, name, layers, parameter in parameters:
        if parameter.requires_grad:
            kind = (
                peak_lr(tower, name, layers, optim),
                is_decayed(name, parameter),
                name in LOGIT_PARAMETERS,
                frozen_steps(tower, name, layers, optim),
            )
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": groups.get(kind, []),
            "peak_lr": kind[0],
            "weight_decay": optim.weight_decay * kind[1],
            "scalars": kind[2],
            "frozen_steps": kind[3],
        }
        for kind in sorted(everywhere(set(groups)))
    ]
