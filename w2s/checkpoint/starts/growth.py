"""A finished tower as the start of a deeper or wider one.

Width: a channel of the residual stream, an attention head or a hidden unit of an MLP that is copied is computed twice
where it was computed once, and what reads the copies divides its weights among them, so that a whole multiple of the
width is the same function (Net2Net, Chen et al. 2015, arXiv 1511.05641; bert2BERT, Chen et al. 2021, arXiv 2110.07143).
`copy` divides evenly, and copies stay equal for as long as their gradients are. `split` divides unevenly, each weight
by a draw of its own: the same function, with gradients that differ (LEMON, Wang et al. 2023, arXiv 2310.07999).

Depth: `stack` repeats the whole tower (G_stack, Du et al. 2024, arXiv 2405.15319), `interleave` each layer in its
place, which divides its branches among its copies (Chang et al. 2017, arXiv 1710.10348: half a step, twice).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from w2s.checkpoint.weights.eva_format import translate
from w2s.checkpoint.weights.released import Released
from w2s.checkpoint.weights.views import Source, renamed
from w2s.errors import CheckpointError
from w2s.megatron.model.initialize import generator

Depth = Literal["none", "stack", "interleave"]
Width = Literal["none", "copy", "split"]

LAYER = re.compile(r"((?:visual|text)\.(?:transformer\.res)?blocks\.)(\d+)\.")
"""Released names of what is in a layer."""

_AXES: Mapping[str, tuple[str, ...]] = {
    "patch_embed.proj": ("width",),
    "cls_token": ("", "", "width"),
    "pos_embed": ("", "", "width"),
    "mask_token": ("", "", "width"),
    "latent": ("", "", "width"),
    "token_embedding": ("", "width"),
    "positional_embedding": ("", "width"),
    "qkv": ("qkv", "/width"),
    "kv": ("kv", "/width"),
    "q": ("heads", "/width"),
    "q_bias": ("heads",),
    "v_bias": ("heads",),
    "proj": ("width", "/heads"),
    "mlp.fc1": ("mlp", "/width"),
    "mlp.fc2": ("width", "/mlp"),
    "head": ("", "/width"),
    "lm_head": ("", "/width"),
    "text_projection": ("/width",),
}
"""What an axis of a tensor runs over, by its name within tower, layer and attention, in the words of the vision tower;
`/` marks an axis that is read, whose weights the copies share. A bias has the first axis of its weight. Norms run over
the width; what is not here stays as it is."""
_OF_TEXT = {".in_proj_": ".qkv.", ".out_proj.": ".proj.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}
"""Words of the text tower and the vision tower's."""
_BRANCHES = re.compile(r"(attn\.(out_)?proj|mlp\.(fc2|c_proj))\.(weight|bias)$")
"""What a layer without norms after its branches adds to the residual stream."""
_NORMS = re.compile(r"(norm\d?|norm_pre|ln_\d|ln_final)\.(weight|bias)$")


@dataclass(frozen=True)
class Size:
    """How large a tower is."""

    layers: int
    width: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class Growth:
    """How a tower grows."""

    depth: Depth
    width: Width
    seed: int
    """Of the draws of `split`."""

    def __bool__(self) -> bool:
        return self.depth != "none" or self.width != "none"


NO_GROWTH = Growth("none", "none", seed=0)


def grow(source: Released, tower: str, size: Size, post_norm: bool, growth: Growth) -> tuple[Released, set[str]]:
    """Return a checkpoint one of whose towers has grown, and the names of tensors that are no longer its own.

    Args:
        source: the checkpoint.
        tower: its prefix, `visual` or `text`.
        size: what the tower is to become.
        post_norm: whether a norm follows each branch of a layer.
        growth: how.

    Raises:
        CheckpointError: heads of another width.
    """
    before = _size_of(source, tower, size)
    layers = layer_sources(before.layers, size.layers, growth.depth)
    maps = {} if growth.width == "none" else _maps(before, size)
    branches = _NORMS if post_norm else _BRANCHES
    sources, changed = {}, set()
    for name, tensor in source.meta.items():
        layer = LAYER.match(name)
        if not name.startswith(f"{tower}."):
            sources[name] = renamed(name)
            continue
        places = [place for place, origin in enumerate(layers) if layer and origin == int(layer[2])]
        for new in [f"{layer[1]}{place}.{name[layer.end() :]}" for place in places] if layer else [name]:
            halved = growth.depth == "interleave" and branches.search(new) is not None
            make = partial(_grow, name=new, maps=maps, growth=growth, copies=len(places) if halved else 1)
            sources[new] = Source((name,), make)
            if make(tensor).shape != tensor.shape or len(places) > 1:
                changed.add(new)
    return source.made_into(sources, heads={tower: size.heads}), changed


def _grow(tensor: Tensor, *, name: str, maps: Mapping[str, Tensor], growth: Growth, copies: int) -> Tensor:
    """A tensor of the tower in its new width; what the layer adds is divided among its copies."""
    for axis, kind in enumerate(_axes_of(name)):
        index = maps.get(kind.lstrip("/"))
        if index is not None:
            shares = _shares(name, tensor, axis, index, growth) if kind.startswith("/") else None
            tensor = tensor.index_select(axis, index.to(tensor.device))
            tensor = tensor if shares is None else (tensor * shares).to(tensor.dtype)
    return tensor / copies if copies > 1 else tensor


def _shares(name: str, tensor: Tensor, axis: int, index: Tensor, growth: Growth) -> Tensor:
    """What weights for the copies of a unit are multiplied by, along `axis`: for each unit they add up to 1."""
    counts = index.bincount(minlength=tensor.shape[axis]).float()
    if growth.width == "copy" or tensor.is_meta:
        shape = [len(index) if other == axis else 1 for other in range(tensor.ndim)]
        return (1 / counts)[index].view(shape).to(tensor.device)
    shape = [len(index) if other == axis else size for other, size in enumerate(tensor.shape)]
    drawn = torch.rand(shape, generator=generator(f"{growth.seed}/grow/{name}/{axis}")) - 0.5
    means = torch.zeros_like(tensor, dtype=torch.float32).index_add_(axis, index, drawn)
    spread = [-1 if other == axis else 1 for other in range(tensor.ndim)]
    means = (means / counts.view(spread)).index_select(axis, index)
    return (1 + drawn - means) / counts[index].view(spread)


def layer_sources(old: int, new: int, depth: Depth) -> list[int]:
    """Return which layer each of `new` layers comes from.

    `stack`: the tower as often as it fits, then its highest layers. `interleave`: layer i comes from i * old / new,
    rounded down. Fewer layers than there are, or `none`, leave the tower as it is.
    """
    if depth == "none" or new <= old:
        return list(range(old))
    if depth == "stack":
        return list(range(old)) * (new // old) + list(range(old - new % old, old))
    return [place * old // new for place in range(new)]


def unit_sources(old: int, new: int) -> list[int]:
    """Return which unit (channel, head, hidden unit) each of `new` units copies.

    All units as often as they fit, then some that are spread evenly over them.
    """
    rest = new % old
    return list(range(old)) * (new // old) + [place * old // rest for place in range(rest)]


def _maps(old: Size, new: Size) -> dict[str, Tensor]:
    """The units that are copied along each kind of axis, where their number grows."""
    head_width, maps = old.width // old.heads, {}
    if new.width > old.width:
        heads = _rows(unit_sources(old.heads, new.heads), head_width)
        maps["width"] = torch.tensor(unit_sources(old.width, new.width))
        maps["heads"] = heads
        for name, parts in (("kv", 2), ("qkv", 3)):
            maps[name] = torch.cat([heads + part * old.width for part in range(parts)])
    if new.mlp_width > old.mlp_width:
        maps["mlp"] = torch.tensor(unit_sources(old.mlp_width, new.mlp_width))
    return maps


def _rows(heads: Sequence[int], head_width: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * head_width + torch.arange(head_width)).flatten()


def _axes_of(name: str) -> tuple[str, ...]:
    layer = LAYER.match(name)
    within = name[layer.end() :] if layer else name.partition(".")[2]
    if _NORMS.search(within):
        return ("width",)
    plain = re.sub(r"^attn(_pool)?\.", "", translate(within, _OF_TEXT))
    axes = _AXES.get(plain.removesuffix(".weight").removesuffix(".bias"), ())
    return axes[:1] if plain.endswith(".bias") else axes


def _size_of(source: Released, tower: str, new: Size) -> Size:
    """The size of a checkpoint's tower; its heads are taken to be as wide as the new ones where it does not say."""
    layers = {int(layer[2]) for name in source.meta if name.startswith(f"{tower}.") and (layer := LAYER.match(name))}
    first = f"{tower}.blocks.0.mlp.fc1" if tower == "visual" else f"{tower}.transformer.resblocks.0.mlp.c_fc"
    if not layers or f"{first}.weight" not in source.meta:
        raise CheckpointError(f"{source.path} holds no {tower} tower that could grow: use another checkpoint")
    mlp_width, width = source.meta[f"{first}.weight"].shape
    head_width = new.width // new.heads
    known = source.heads.get(tower)
    heads = known or width // head_width
    if heads * head_width != width:
        told = f" in {known} heads" if known else ""
        raise CheckpointError(
            f"{source.path} has a {tower} tower of width {width}{told}, this model has heads of width {head_width}: "
            "towers grow by heads of one width, use another number of heads"
        )
    return Size(layers=max(layers) + 1, width=width, heads=heads, mlp_width=mlp_width)
