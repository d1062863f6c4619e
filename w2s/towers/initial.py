"""How the towers' weights start."""

import math
import re
from collections.abc import Callable

from w2s.config.sections import TextConfig, VisionConfig
from w2s.megatron.model.initialize import Init

ONE = Init("constant", 1.0)
ZERO = Init("constant", 0.0)


def vision_rule(
    shape: VisionConfig, post_norm: float, std: float = 0.02, truncated: bool = False
) -> Callable[[str], Init]:
    """Return the start of each parameter of a vision tower, by its global name.

    Normal, the output projections divided by sqrt(2 * layer); torch's default for the patch embedding (baaivision/EVA,
    EVA-CLIP-18B/shinji/eva_clip/eva_vit_model.py). Truncated, the patch embedding is as the rest
    (EVA-01/eva/modeling_pretrain.py). The head starts at 1 / sqrt(width), as CLIP's projections do: EVA's 2e-5 gives it
    a gradient that dominates the global norm. SigLIP's pool has normals of the variance of its uniform ones (Glorot and
    Bengio 2010; google-research/big_vision, models/vit.py).

    Args:
        shape: the tower's configuration.
        post_norm: weight of the branch norms of a post-norm tower.
        std: standard deviation of the normal.
        truncated: whether the normal is cut at one standard deviation.
    """
    patch_bound = 1 / math.sqrt(3 * shape.patch_size**2)

    def drawn(std: float) -> Init:
        return Init("truncated" if truncated else "normal", std)

    def rule(name: str) -> Init:
        layer = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith("patch_embed") and not truncated:
            return Init("uniform", patch_bound)
        if name.endswith("bias"):
            return ZERO
        if "_bda.norm" in name:
            return Init("constant", post_norm)
        if "norm" in name:
            return ONE
        head = re.sub(r"^teachers\.[^.]+\.", "", name)  # the heads of further teachers begin as those of the first
        if head.startswith("head.mlp"):
            return Init("normal", math.sqrt(2 / (shape.width + shape.mlp_width)))
        if head.startswith("head"):
            return Init("normal", shape.width**-0.5)
        if layer and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            return drawn(std / math.sqrt(2 * (int(layer[1]) + 1)))
        return drawn(std)

    return rule


def text_rule(
    shape: TextConfig, logit_scale: float, logit_bias: float, mlp_bias: str = "zero"
) -> Callable[[str], Init]:
    """Return the start of each parameter of a text tower, by its global name.

    Source: CLIP's initialisation as in baaivision/EVA, shinji/eva_clip/transformer.py, which leaves the biases of the
    MLPs at torch's uniform ones.

    Args:
        shape: the tower's configuration.
        logit_scale: scale of the logits; its logarithm is the parameter.
        logit_bias: bias of the logits, where the tower has one.
        mlp_bias: biases of the MLPs, `zero` or `uniform` within 1 / sqrt(inputs).
    """
    width = shape.width**-0.5
    uniform = {
        "linear_fc1.bias": Init("uniform", width),
        "linear_fc2.bias": Init("uniform", shape.mlp_width**-0.5),
    }
    starts = {
        **(uniform if mlp_bias == "uniform" else {}),
        ".bias": ZERO,
        "token_embedding": Init("normal", 0.02),
        "positional_embedding": Init("normal", 0.01),
        "text_projection": Init("normal", width),
        "logit_scale": Init("constant", math.log(logit_scale)),
        "logit_bias": Init("constant", logit_bias),
        "linear_qkv.weight": Init("normal", width),
        "linear_proj.weight": Init("normal", width * (2 * shape.layers) ** -0.5),
        "linear_fc2.weight": Init("normal", width * (2 * shape.layers) ** -0.5),
        "linear_fc1.weight": Init("normal", (2 * shape.width) ** -0.5),
    }

    def rule(name: str) -> Init:
        return next((start for ending, start in starts.items() if name.endswith(ending)), ONE)

    return rule
