"""What a transformer layer is made of: norms, packed attention, residual adds and the Q and V bias."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from w2s.kernels.add_norm import add_bias, add_rms_norm
from w2s.kernels.rms_norm import rms_norm
from w2s.megatron import compat
from w2s.megatron.fp8.whole_linears import ColumnLinear, RowLinear

_MATH_KERNEL_UP_TO = 128
"""Tokens up to which plain products train faster than the CPU's flash kernel in bfloat16."""


def _mark_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    # Under sequence parallelism a rank sees only its tokens: Megatron sums such gradients over the tensor group.
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a weight (EVA-8B, EVA-18B)."""

    eps: float

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)

    def forward(self, hidden: Tensor, bias_residual: tuple[Tensor | None, Tensor] | None = None) -> Tensor:
        """Return norm(hidden); with (bias, residual) as in a post-norm layer, residual + norm(hidden + bias)."""
        if bias_residual is None:
            return rms_norm(hidden, self.weight, self.eps)
        bias, residual = bias_residual
        return add_rms_norm(hidden, bias, residual, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias (EVA02-E, the text tower)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)

    def forward(self, hidden: Tensor, bias_residual: tuple[Tensor | None, Tensor] | None = None) -> Tensor:
        """Return norm(hidden); with (bias, residual) as in a post-norm layer, residual + norm(hidden + bias)."""
        if bias_residual is None:
            return super().forward(hidden)
        bias, residual = bias_residual
        return residual + super().forward(add_bias(hidden, bias))


NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class PackedAttention(nn.Module):
    """Attention over packed tokens: the tokens of an image stand next to each other.

    `attention_mask` is a boolean tensor [images, tokens] that only tells how the tokens are packed; every token is
    real.
    """

    def __init__(self, config: TransformerConfig, attn_mask_type: AttnMaskType, **unused: Any) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **unused: Any) -> Tensor:
        """Attend within each image.

        Args:
            query, key, value: [images * tokens, 1, heads, head width].
            attention_mask: [images, tokens].

        Returns:
            [images * tokens, 1, heads * head width].
        """
        num_sequences, seq_len = attention_mask.shape
        q, k, v = (x.view(num_sequences, seq_len, *x.shape[2:]).transpose(1, 2) for x in (query, key, value))
        with _kernel(q):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return out.transpose(1, 2).reshape(num_sequences * seq_len, 1, -1)


def _kernel(query: Tensor) -> AbstractContextManager[None]:
    """Choose plain products where the flash kernel's backward pass is slow: 2 to 6 times, on a CPU with torch 2.13."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    slow = on_cpu and query.requires_grad and query.shape[2] <= _MATH_KERNEL_UP_TO
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


class PreNormAdd(nn.Module):
    """residual + branch + bias, in the place of Megatron's bias-dropout-add (EVA-8B, the text tower).

    Attributes:
        branch_scale: [tokens, 1, 1], what drop path multiplies the branch with; None where it leaves nothing out.
    """

    branch_scale: Tensor | None = None

    def forward(self, training: bool, fused: bool) -> Any:
        """Return the function that Megatron calls with (branch, bias), residual and dropout."""
        return self._add

    def _add(self, branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        branch = add_bias(*branch_and_bias)
        return residual + (branch if self.branch_scale is None else self.branch_scale * branch)


class PostNormAdd(nn.Module):
    """residual + norm(branch + bias), in the same place (EVA-18B, EVA02-E).

    Attributes:
        branch_scale: as in `PreNormAdd`.
    """

    branch_scale: Tensor | None = None

    def __init__(self, config: TransformerConfig, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Any:
        """Return the function that Megatron calls with (branch, bias), residual and dropout."""
        return self._add

    def _add(self, branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        branch, bias = branch_and_bias
        # By calling the module: Megatron waits for weights in its hooks.
        if self.branch_scale is None:
            return self.norm(branch, (bias, residual))
        return residual + self.branch_scale * self.norm(add_bias(branch, bias))


class Layer(TransformerLayer):
    """Megatron's layer, whose branches drop path may scale.

    The scales come as `context_mask` [tokens, layers, 2], which Megatron hands on to every layer, again where it
    computes one twice, and which nothing else uses without cross-attention.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what Megatron's layer returns: the hidden states and no context."""
        scales = kwargs.get("context_mask")
        for branch, add in enumerate((self.self_attn_bda, self.mlp_bda)):
            add.branch_scale = None if scales is None else scales[:, self.layer_number - 1, branch, None, None]
        return super().forward(*args, **kwargs)


class GeluMLP(MLP):
    """An MLP whose activation, a GELU, takes the bias of the first linear along."""

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """Return what Megatron's MLP returns: the output [tokens, 1, width] and the bias to be added to it."""
        active, _ = self.activation_func(*self.linear_fc1(hidden_states))
        return self.linear_fc2(active)


class RecomputedMLP(MLP):
    """The same, but it keeps its hidden activations once, before the GELU, which the backward pass recomputes."""

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """Return what Megatron's MLP returns: the output [tokens, 1, width] and the bias to be added to it."""
        active, recompute = self.activation_func(*self.linear_fc1(hidden_states))
        active_pointer = active.data_ptr()  # what is saved keeps `pack`, which must not keep `active`

        def pack(kept: Tensor) -> Tensor | None:
            return None if kept.data_ptr() == active_pointer else kept

        def unpack(kept: Tensor | None) -> Tensor:
            return recompute() if kept is None else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.linear_fc2(active)


class _NoBias:
    """The fused Q, K, V projection without a bias, which Megatron's layer would add to every linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class _QVBias(_NoBias):
    """The fused Q, K, V projection with a bias on Q and V only (EVA02-E, EVA01-g)."""

    q_bias: nn.Parameter
    v_bias: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, weight = kwargs["config"], cast(Any, self).weight
        self.head_width = config.kv_channels
        for name in ("q_bias", "v_bias"):
            bias = nn.Parameter(torch.zeros(len(weight) // 3, dtype=config.params_dtype, device=weight.device))
            set_tensor_model_parallel_attributes(bias, True, 0, 1)
            cast(nn.Module, self).register_parameter(name, bias)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Project, then add the bias in Megatron's row order: (q, k, v) of a head next to each other."""
        out, _ = super().forward(*args, **kwargs)  # type: ignore[misc]
        q, v = (bias.view(-1, self.head_width) for bias in (self.q_bias, self.v_bias))
        return out + torch.stack([q, torch.zeros_like(q), v], dim=1).flatten(), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Describe the weight and both biases as split over their first axis."""
        state = cast(nn.Module, self).state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {name: 0 for name, value in state.items() if isinstance(value, nn.Parameter)},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


_QKV_BIASES: dict[str, tuple[type, ...]] = {"none": (_NoBias,), "qv": (_QVBias,), "qkv": ()}


@cache
def qkv_linear(bias: str, column: type) -> type[nn.Module]:
    """Return the fused Q, K, V projection over a column-parallel linear.

    Args:
        bias: `none`, `qv` (on Q and V only: EVA02-E, EVA01-g) or `qkv` (CLIP's own towers).
        column: the linear's class.
    """
    return type(f"QKV{column.__name__}", (*_QKV_BIASES[bias], column), {})


def mark_partitioned(module: nn.Module) -> None:
    """Say how each linear's weight is split over tensor-parallel ranks: 0.16 does so only when it draws weights."""
    for linear in module.modules():
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear) and not hasattr(linear.weight, "partition_dim"):
            axis = 0 if isinstance(linear, ColumnParallelLinear) else 1
            set_tensor_model_parallel_attributes(linear.weight, True, axis, 1)


def layer_spec(
    config: TransformerConfig,
    norm: str,
    placement: str,
    qkv_bias: str,
    causal: bool,
    recompute_activation: bool,
    column: type = ColumnLinear,
    row: type = RowLinear,
) -> ModuleSpec:
    """Return the specification of one layer.

    Args:
        config: Megatron's configuration of the stack.
        norm: `rmsnorm` or `layernorm`.
        placement: `pre` (x + f(norm(x))) or `post` (x + norm(f(x))).
        qkv_bias: `none`, `qv` or `qkv`.
        causal: whether a token sees only those before it.
        recompute_activation: whether the backward pass recomputes the MLP's activations.
        column: the linear whose output tensor-parallel ranks share.
        row: the linear whose input they share.
    """
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=qkv_linear(qkv_bias, column), core_attention=PackedAttention, linear_proj=row
        ),
    )
    mlp = compat.mlp_spec(RecomputedMLP if recompute_activation else GeluMLP, column, row)
    if placement == "post":
        add = ModuleSpec(module=PostNormAdd, params={"config": config, "norm": NORMS[norm]})
        submodules = TransformerLayerSubmodules(self_attention=attention, self_attn_bda=add, mlp=mlp, mlp_bda=add)
    else:
        submodules = TransformerLayerSubmodules(
            input_layernorm=NORMS[norm],
            self_attention=attention,
            self_attn_bda=PreNormAdd,
            pre_mlp_layernorm=NORMS[norm],
            mlp=mlp,
            mlp_bda=PreNormAdd,
        )
    return ModuleSpec(module=Layer, submodules=submodules)
