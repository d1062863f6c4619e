"""Bytes that the layers keep between forward and backward pass on a rank.

Per layer and token these are the inputs of the four linears (of the MLP's second, which is its GELU's output, not under
`selective`), Q, K and V, the GELU's input and the inputs of both norms; under `full` the layer's input alone, and the
rest of one layer while it is recomputed. Tensor parallelism divides what stands between the linears of a pair,
sequence parallelism the rest too. How many micro-batches are kept at once is the pipeline schedule's matter (Narayanan
et al. 2021, section 2.2: as many as there are stages from here to the last, more with virtual stages).
"""

from dataclasses import dataclass, replace
from functools import cache

from w2s.config.sections import ParallelConfig
from w2s.planning.model.flops import recomputed_layers
from w2s.planning.model.simulated_schedule import Pipeline, order, pipeline_of
from w2s.planning.model.towers import PlannedTower

_STATISTIC = 4
"""Bytes of a float32 number that a norm keeps per token, attention per token and head."""


@dataclass(frozen=True)
class Types:
    """Bytes of an element."""

    value: int
    """Of weights and activations."""
    rms: int
    """That an RMSNorm keeps of its input: as `value`; but 8 where torch does it in steps (in bfloat16 on a CPU), which
    keep the input and its normalised form in float32."""
    fp8: float = 0.0
    """Share of the layers that multiply in FP8: they keep a linear's input in one byte, of which nothing is forgotten,
    and attention keeps its output beside that. An estimate, read in Transformer Engine and not measured."""

    @property
    def product(self) -> float:
        """Of a linear's input."""
        return self.value * (1 - self.fp8) + self.fp8


def peak(
    tower: PlannedTower, parallel: ParallelConfig, types: Types, *, samples: int, micro_batches: int, stage: int
) -> int:
    """Most bytes that a tower's pass keeps on a rank of a pipeline stage; `samples` are those of a micro-batch."""
    virtual = range(stage, len(tower.split), parallel.pipeline)
    whole, entry = _layer(tower, parallel, types, samples), _input(tower, parallel, types, samples)
    head = _head(tower, types, samples, tower.layer_width)
    chunks = [
        _chunk(parallel, tower.split[index], whole, entry) + tower.layer_heads_of(index) * head for index in virtual
    ]
    if stage == 0:
        normed = samples * tower.tokens
        before = _norm(tower, types, normed) if tower.norm_pre else 0
        chunks[0] += samples * tower.embedding_elements * types.value + before
    after = _after_layers(tower, types, samples) if stage == parallel.pipeline - 1 else 0
    last = tower.split[virtual[-1]]
    # A recomputed layer is there as a whole; the layers after it are not kept any longer then.
    again = (1 - (last - recomputed_layers(parallel, last))) * whole if parallel.recompute == "full" else 0
    least, mixes = min(chunks), in_flight(pipeline_of(parallel, micro_batches), stage)
    larger = [(index, size - least) for index, size in enumerate(chunks) if size > least]
    return max(
        sum(counts) * least
        + sum(counts[index] * more for index, more in larger)
        + max(after if counts[-1] else 0, again)
        for counts in (mixes if larger or after else [next(iter(mixes))])
    )


def kept_going_back(tower: PlannedTower, parallel: ParallelConfig, types: Types, *, samples: int, done: int) -> int:
    """Bytes that a tower in one piece keeps of a micro-batch when the last `done` layers have gone back."""
    whole, entry = _layer(tower, parallel, types, samples), _input(tower, parallel, types, samples)
    again = recomputed_layers(parallel, tower.layers)
    plain = max(0, tower.layers - again - done)
    kept = plain * whole + min(again, tower.layers - done) * entry
    heads = len(tower.layer_heads) * _head(tower, types, samples, tower.layer_width)
    return kept + heads + samples * tower.embedding_elements * types.value + (0 if plain else whole)


@cache
def in_flight(pipeline: Pipeline, stage: int) -> frozenset[tuple[int, ...]]:
    """How many micro-batches of each of its chunks a rank of the pipeline keeps when it keeps most, in all ways."""
    # After some groups every further one is like the one before.
    few = min(pipeline.micro_batches, 3 * max(pipeline.group, pipeline.stages))
    counts, finished = [0] * pipeline.chunks, set()
    for turn in order(replace(pipeline, micro_batches=few), stage):
        counts[turn.chunk] += -1 if turn.backward else 1
        finished.add(tuple(counts))
    most = max(map(sum, finished))
    return frozenset(each for each in finished if sum(each) == most)


def _chunk(parallel: ParallelConfig, layers: int, whole: int, entry: int) -> int:
    """What a micro-batch keeps in a chunk's layers: all of a layer, or what goes into it."""
    again = recomputed_layers(parallel, layers)
    return again * entry + (layers - again) * whole


def _layer(tower: PlannedTower, parallel: ParallelConfig, types: Types, samples: int) -> int:
    """What a layer keeps that is not recomputed as a whole."""
    num_tokens, local = samples * tower.tokens // parallel.tensor, local_tokens(tower, parallel, samples)
    attention = num_tokens * (4 * tower.width * types.value + tower.heads * _STATISTIC + types.fp8 * tower.width)
    forgotten = types.value * (1 - types.fp8) if parallel.recompute == "selective" else 0
    mlp = num_tokens * tower.mlp_width * (types.value + types.product - forgotten)
    inputs = 2 * local * tower.width * types.product
    return int(attention + mlp + inputs) + 2 * _norm(tower, types, local)


def _input(tower: PlannedTower, parallel: ParallelConfig, types: Types, samples: int) -> int:
    """The input of a layer."""
    return local_tokens(tower, parallel, samples) * tower.width * types.value


def local_tokens(tower: PlannedTower, parallel: ParallelConfig, samples: int) -> int:
    """Packed tokens of a micro-batch between the pairs of linears on a rank."""
    return samples * tower.tokens // (parallel.tensor if parallel.sequence else 1)


def _norm(tower: PlannedTower, types: Types, num_tokens: int) -> int:
    element = types.rms if tower.norm_vectors == 1 else types.value
    return num_tokens * (tower.width * element + tower.norm_vectors * _STATISTIC)


def _after_layers(tower: PlannedTower, types: Types, samples: int) -> int:
    """What the norm and the head after the last layer keep of a micro-batch."""
    if tower.head_tokens > 1:
        # A summary and its target, in float32 too.
        summary = samples * 2 * 4 * tower.summary_width
        return _head(tower, types, samples, tower.head_width) + summary + _pool(tower, types, samples)
    normed = samples * tower.normed_tokens
    return _norm(tower, types, normed) + normed * tower.width * types.value + _pool(tower, types, samples)


def _pool(tower: PlannedTower, types: Types, samples: int) -> int:
    """What SigLIP's pool keeps of a micro-batch: K and V of all tokens, and of each image some vectors."""
    normed = samples * tower.normed_tokens
    vectors = normed // tower.sequence * (6 * tower.width + 2 * tower.mlp_width)
    return (2 * normed * tower.width + vectors) * types.value if tower.pool else 0


def _head(tower: PlannedTower, types: Types, samples: int, width: int) -> int:
    """What norm, head and masked loss keep of a micro-batch; every tensor-parallel rank has all tokens there.

    It is the norm's input and output, the head's input, and its output and the targets in float32.
    """
    normed, heads = samples * tower.normed_tokens, samples * tower.head_tokens
    kept = _norm(tower, types, normed) + normed * tower.width * types.value
    return kept + heads * (tower.width * types.value + 2 * 4 * width)
