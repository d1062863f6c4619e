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
from typing import Literal

import torch
from torch import Tensor

from w2s.checkpoint.weights.released import Released
from w2s.errors import CheckpointError
from w2s.megatron.model.initialize import generator

Depth = Literal["none", "stack", "interleave"]
Width = Literal["none", "copy", "split"]

LAYER = re.compile(r"((?:visual|text)\.(?:transformer\.res)?blocks\.)(\d+)\.")
"""Released names of what is in a layer."""

_AXES: Mapping[str, tuple[str, ...]] = {
    "patch_embed.proj.weight": ("width",),
    "patch_embed.proj.bias": ("width",),
    "cls_token": ("", "", "width"),
    "pos_embed": ("", "", "width"),
    "mask_token": ("", "", "width"),
    "token_embedding.weight": ("", "width"),
    "positional_embedding": ("", "width"),
    "attn.qkv.weight": ("qkv", "/width"),
    "attn.in_proj_weight": ("qkv", "/width"),
    "attn.in_proj_bias": ("qkv",),
    "attn.qkv.bias": ("qkv",),
    "attn.q_bias": ("heads",),
    "attn.v_bias": ("heads",),
    "attn.proj.weight": ("width", "/heads"),
    "attn.out_proj.weight": ("width", "/heads"),
    "attn.proj.bias": ("width",),
    "attn.out_proj.bias": ("width",),
    "mlp.fc1.weight": ("mlp", "/width"),
    "mlp.c_fc.weight": ("mlp", "/width"),
    "mlp.fc1.bias": ("mlp",),
    "mlp.c_fc.bias": ("mlp",),
    "mlp.fc2.weight": ("width", "/mlp"),
    "mlp.c_proj.weight": ("width", "/mlp"),
    "mlp.fc2.bias": ("width",),
    "mlp.c_proj.bias": ("width",),
    "head.weight": ("", "/width"),
    "attn_pool.latent": ("", "", "width"),
    "attn_pool.q.weight": ("heads", "/width"),
    "attn_pool.q.bias": ("heads",),
    "attn_pool.kv.weight": ("kv", "/width"),
    "attn_pool.kv.bias": ("kv",),
    "attn_pool.proj.weight": ("width", "/heads"),
    "attn_pool.proj.bias": ("width",),
    "attn_pool.mlp.fc1.weight": ("mlp", "/width"),
    "attn_pool.mlp.fc1.bias": ("mlp",),
    "attn_pool.mlp.fc2.weight": ("width", "/mlp"),
    "attn_pool.mlp.fc2.bias": ("width",),
    "lm_head.weight": ("", "/width"),
    "text_projection": ("/width",),
}
"""What an axis of a tensor runs over, by its released name within tower and layer; `/` marks an axis that is read,
whose weights the copies share. Norms run over the width; what is not here stays as it is."""
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


class Grown(Released):
    """A checkpoint one of whose towers has grown.

    Attributes:
        changed: names of the tensors that are no longer the checkpoint's own.
    """

    def __init__(self, source: Released, tower: str, size: Size, post_norm: bool, growth: Growth) -> None:
        """Grow a tower.

        Args:
            source: the checkpoint.
            tower: its prefix, `visual` or `text`.
            size: what the tower is to become.
            post_norm: whether a norm follows each branch of a layer.
            growth: how.

        Raises:
            CheckpointError: heads of another width.
        """
        self._source, self._tower, self._growth, self._post_norm = source, tower, growth, post_norm
        self.format, self.path, self.heads = source.format, source.path, source.heads | {tower: size.heads}
        before = _size_of(source, tower, size)
        self._layers = layer_sources(before.layers, size.layers, growth.depth)
        self._maps = {} if growth.width == "none" else _maps(before, size)
        self._sources = dict(self._renamed())
        self.meta = {name: self._grow(name, source.meta[origin]) for name, origin in self._sources.items()}
        self.changed = {name for name, origin in self._sources.items() if self._is_changed(name, source.meta[origin])}

    def read(self, name: str) -> Tensor:
        """Return a tensor in the released layout."""
        return self._grow(name, self._source.read(self._sources[name]))

    def origin(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint itself."""
        return self._source.origin(self._sources[name])

    def _renamed(self) -> list[tuple[str, str]]:
        """Names here and in the source."""
        pairs = []
        for name in self._source.meta:
            layer = LAYER.match(name)
            if layer is None or not name.startswith(f"{self._tower}."):
                pairs.append((name, name))
            else:
                rest = name[layer.end() :]
                places = [place for place, source in enumerate(self._layers) if source == int(layer[2])]
                pairs += [(f"{layer[1]}{place}.{rest}", name) for place in places]
        return pairs

    def _grow(self, name: str, tensor: Tensor) -> Tensor:
        if not name.startswith(f"{self._tower}."):
            return tensor
        for axis, kind in enumerate(_axes_of(name, tensor)):
            index = self._maps.get(kind.lstrip("/"))
            if index is not None:
                shares = self._shares(name, tensor, axis, index) if kind.startswith("/") else None
                tensor = tensor.index_select(axis, index.to(tensor.device))
                tensor = tensor if shares is None else (tensor * shares).to(tensor.dtype)
        copies = self._copies(name)
        return tensor / copies if copies > 1 and self._is_branch(name) else tensor

    def _is_changed(self, name: str, tensor: Tensor) -> bool:
        return self.meta[name].shape != tensor.shape or self._copies(name) > 1

    def _copies(self, name: str) -> int:
        """How often the layer of a tensor is there now; 1 outside of the layers."""
        layer = LAYER.match(name) if name.startswith(f"{self._tower}.") else None
        return 1 if layer is None else self._layers.count(self._layers[int(layer[2])])

    def _is_branch(self, name: str) -> bool:
        """Whether a tensor of a layer that `interleave` copies scales what the layer adds."""
        last = _NORMS if self._post_norm else _BRANCHES
        return self._growth.depth == "interleave" and last.search(name) is not None

    def _shares(self, name: str, tensor: Tensor, axis: int, index: Tensor) -> Tensor:
        """What weights for the copies of a unit are multiplied by, along `axis`: for each unit they add up to 1."""
        counts = index.bincount(minlength=tensor.shape[axis]).float()
        if self._growth.width == "copy" or tensor.is_meta:
            shape = [len(index) if other == axis else 1 for other in range(tensor.ndim)]
            return (1 / counts)[index].view(shape).to(tensor.device)
        shape = [len(index) if other == axis else size for other, size in enumerate(tensor.shape)]
        drawn = torch.rand(shape, generator=generator(f"{self._growth.seed}/grow/{name}/{axis}")) - 0.5
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


def _axes_of(name: str, tensor: Tensor) -> tuple[str, ...]:
    layer = LAYER.match(name)
    within = name[layer.end() :] if layer else name.partition(".")[2]
    return ("width",) if _NORMS.search(within) else _AXES.get(within, ())


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
