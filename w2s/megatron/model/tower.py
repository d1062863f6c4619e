"""The transformer layers of a tower, as many of them as a chunk of this pipeline stage holds, over packed tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from w2s.config.sections import ParallelConfig
from w2s.kernels.gelu import bias_gelu, bias_gelu_tanh, bias_quick_gelu
from w2s.megatron.compat import leave_gradients_alone
from w2s.megatron.fp8.linears import LOCAL, Linears
from w2s.megatron.model.cuda_graphs import LayerGraphs
from w2s.megatron.model.layers import layer_spec, mark_partitioned
from w2s.megatron.model.pipeline_split import pipeline_layout
from w2s.megatron.model.taps import Tap, attach_loss, hidden_states_at

ACTIVATIONS = {"gelu": bias_gelu, "quick_gelu": bias_quick_gelu, "gelu_tanh": bias_gelu_tanh}
"""Of an MLP: functions of what its first linear gives and of that linear's bias."""


@dataclass(frozen=True)
class TransformerShape:
    """What the layers of a tower look like."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    norm: str
    """`rmsnorm` or `layernorm`."""
    norm_placement: str
    """`pre` or `post`."""
    norm_eps: float
    qkv_bias: str
    """`none`, `qv` (EVA) or `qkv` (CLIP's own towers, SigLIP's)."""
    activation: str
    """`gelu`, `quick_gelu` or `gelu_tanh`."""
    causal: bool
    split: list[int]
    """Layers of each pipeline stage."""


def transformer_config(
    shape: TransformerShape, parallel: ParallelConfig, dtype: torch.dtype, linears: Linears = LOCAL
) -> TransformerConfig:
    """Return Megatron's configuration of a tower: no dropout, and weights that we draw ourselves."""
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.mlp_width,
        normalization="RMSNorm" if shape.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=shape.norm_eps,
        activation_func=ACTIVATIONS[shape.activation],
        add_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=pipeline_layout(shape.split) if len(shape.split) > 1 else None,
        # With the defaults two ranks pair their messages wrongly and train on, silently, with wrong gradients.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Otherwise messages of warm-up and flush are waited for where they are sent.
        overlap_p2p_comm_warmup_flush=interleaved,
        microbatch_group_size_per_vp_stage=parallel.micro_batch_group or None,
        deallocate_pipeline_outputs=True,  # what was sent is not needed here any more
        batch_p2p_sync=False,  # the host would wait for the GPU at every message, as torch before 2.0 needed
        **_recomputed_layers(parallel),
        **linears.settings(),
    )


def _recomputed_layers(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute != "full":
        return {}
    # `block` recomputes the first layers of a chunk, `uniform` all of them one by one.
    method, count = ("block", parallel.recompute_layers) if parallel.recompute_layers else ("uniform", 1)
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}


class Tower(MegatronModule):
    """Base of the towers: a chunk of a model that a Megatron schedule can drive.

    Attributes:
        fsdp_units: classes of modules beside the layers that are gathered by themselves where weights are sharded.
        first: whether this chunk embeds the input.
        last: whether this chunk makes the output.
        blocks: the transformer layers of this chunk.
    """

    fsdp_units: tuple[type[nn.Module], ...] = ()

    def __init__(
        self,
        shape: TransformerShape,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        chunk: int = 0,
        linears: Linears = LOCAL,
    ) -> None:
        super().__init__(config=transformer_config(shape, parallel, dtype, linears))
        chunk_or_none = chunk if parallel.virtual_pipeline > 1 else None
        stage = {"ignore_virtual": chunk_or_none is None, "vp_stage": chunk_or_none}
        self.first = parallel_state.is_pipeline_first_stage(**stage)
        self.last = parallel_state.is_pipeline_last_stage(**stage)
        recompute_activation = parallel.recompute == "selective"
        count = get_num_layers_to_build(self.config, vp_stage=chunk_or_none)
        start = get_transformer_layer_offset(self.config, vp_stage=chunk_or_none)
        specs = [
            layer_spec(
                self.config,
                shape.norm,
                shape.norm_placement,
                shape.qkv_bias,
                shape.causal,
                recompute_activation,
                linears.column(layer),
                linears.row(layer),
            )
            for layer in range(start, start + count)
        ]
        self.blocks = TransformerBlock(
            self.config,
            TransformerBlockSubmodules(layer_specs=specs),
            post_layer_norm=False,
            pre_process=self.first,
            post_process=self.last,
            vp_stage=chunk_or_none,
        )
        mark_partitioned(self.blocks)
        for layer in self.blocks.layers:
            leave_gradients_alone(layer)
        self.graphs = LayerGraphs(self.blocks.layers) if parallel.cuda_graphs else None
        # What Megatron's schedules and DDP ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = self.first, self.last
        self.share_embeddings_and_output_weights = False
        self.vp_stage = chunk_or_none

    def set_input_tensor(self, tensor: Any) -> None:
        """Take the activations of the pipeline stage before this one."""
        self.blocks.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    @property
    def layer_numbers(self) -> list[int]:
        """The layers of this chunk, counted from 0 over all pipeline stages."""
        return [layer.layer_number - 1 for layer in self.blocks.layers]

    def run_layers(
        self,
        embedded: Tensor | None,
        num_sequences: int,
        seq_len: int,
        taps: Mapping[int, Tap] | None = None,
        branch_scales: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk's layers.

        Args:
            embedded: [num_sequences, seq_len, width] in the first chunk, None in the others.
            num_sequences: sequences in the batch.
            seq_len: tokens of a sequence.
            taps: losses of the tokens after layers of this chunk, by the layer's number; the schedule divides none of
                them by the number of micro-batches.
            branch_scales: [num_sequences, layers of the tower, 2], drop path's factors on the branches; None is 1.

        Returns:
            [num_sequences, seq_len, width] in the last chunk, packed tokens [local_tokens, 1, width] elsewhere.
        """
        hidden = None
        if embedded is not None:
            hidden = embedded.reshape(num_sequences * seq_len, 1, -1)
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden)
        packing = torch.ones(1, 1, dtype=torch.bool, device=next(self.parameters()).device).expand(
            num_sequences, seq_len
        )
        scales = self._packed_branch_scales(branch_scales, seq_len)
        if self.graphs is not None and hidden is not None and torch.is_grad_enabled():  # otherwise sizes vary
            hidden = self.graphs(hidden, packing)
        elif taps:
            with hidden_states_at(self.blocks, taps) as after:
                hidden = self.blocks(hidden, attention_mask=packing, context_mask=scales)
            after[self.layer_numbers[-1]] = hidden
            losses = [tap(self._unpack(after[layer], num_sequences, seq_len)) for layer, tap in taps.items()]
            hidden = attach_loss(hidden, torch.stack(losses).sum())
        else:
            hidden = self.blocks(hidden, attention_mask=packing, context_mask=scales)
        return self._unpack(hidden, num_sequences, seq_len) if self.last else hidden

    def _unpack(self, hidden: Tensor, num_sequences: int, seq_len: int) -> Tensor:
        """Gather packed tokens: [num_sequences, seq_len, width] on every tensor-parallel rank."""
        if self.config.sequence_parallel:
            # Every tensor-parallel rank computes the same head: its gradient is whole already, not a part to be summed.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.view(num_sequences, seq_len, -1)

    def _packed_branch_scales(self, branch_scales: Tensor | None, seq_len: int) -> Tensor | None:
        """The scales of the branches for every token that this rank has: [local_tokens, layers of the tower, 2]."""
        if branch_scales is None:
            return None
        scales = branch_scales.to(self.config.params_dtype).repeat_interleave(seq_len, dim=0)
        return scatter_to_sequence_parallel_region(scales) if self.config.sequence_parallel else scales
