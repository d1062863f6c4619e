"""Every legal layout of a stage on a number of GPUs; what is legal, the checks of the configuration say."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from w2s.config.batching import data_parallel_size, divisors, num_micro_batches, samples_per_replica
from w2s.config.fp8_checks import check_fp8_layout
from w2s.config.layout_checks import check_micro_batches, check_ranks, check_towers
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.planning.time.cards import GPUS_PER_NODE


class Layouts:
    """Goes through the layouts.

    Args:
        config: the stage.
        world_size: GPUs.
        fixed: keys whose values stay as `config` has them, such as `parallel.tensor`.

    Attributes:
        refused: the first refusal, if there was one.
    """

    def __init__(self, config: Config, world_size: int, fixed: Collection[str]) -> None:
        self.config, self.world_size, self.fixed = config, world_size, fixed
        self.refused: ConfigError | None = None

    def splits(self) -> Iterator[Config]:
        """Tensor, pipeline and virtual pipeline sizes, and what data-parallel ranks share out."""
        for pipeline in self._choices("parallel.pipeline", divisors(self.world_size)):
            for tensor in self._choices("parallel.tensor", self._tensor(pipeline)):
                for virtual in self._choices("parallel.virtual_pipeline", self._virtual(pipeline)):
                    sized = self._parallel(self.config, pipeline=pipeline, tensor=tensor, virtual_pipeline=virtual)
                    for shard in self._choices("parallel.shard", ("optimizer", "full")):
                        split = self._shared_out(sized, shard)
                        if self._legal(check_ranks, split, self.world_size) and self._legal(check_towers, split):
                            yield split

    def _shared_out(self, sized: Config, shard: str) -> Config:
        """Data-parallel ranks overlap what they exchange; fully sharded, they do so without being asked."""
        overlap = data_parallel_size(sized.parallel, self.world_size) > 1 and shard != "full"
        return self._parallel(
            sized,
            shard=shard,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            sequence=False,
            recompute="none",
            recompute_layers=0,
        )

    def batches(self, split: Config) -> Iterator[Config]:
        """Micro-batches of a split and of its groups, with and without sequence parallelism."""
        for micro in self._choices("train.micro_batch", divisors(samples_per_replica(split, self.world_size))):
            sized = replace(split, train=replace(split.train, micro_batch=micro))
            for sequence in self._choices("parallel.sequence", [False, True] if split.parallel.tensor > 1 else [False]):
                for group in self._choices("parallel.micro_batch_group", self._groups(sized)):
                    config = self._parallel(sized, sequence=sequence, micro_batch_group=group)
                    checks = (check_ranks, check_micro_batches, check_fp8_layout)
                    if all(self._legal(check, config, self.world_size) for check in checks):
                        yield config

    def recomputes(self, config: Config) -> Iterator[Config]:
        """What is recomputed, from nothing to all layers."""
        for recompute in self._choices("parallel.recompute", ("none", "selective", "full")):
            layers = self.config.parallel.recompute_layers if "parallel.recompute_layers" in self.fixed else 0
            tried = self._parallel(config, recompute=recompute, recompute_layers=layers)
            if self._legal(check_ranks, tried, self.world_size):
                yield tried

    def partly_recomputed(self, config: Config, layers: int) -> Config | None:
        """The layout with that many layers of each chunk recomputed; None if the user has said something else."""
        if {"parallel.recompute", "parallel.recompute_layers"} & set(self.fixed):
            return None
        return self._parallel(config, recompute="full", recompute_layers=layers)

    def _groups(self, config: Config) -> list[int]:
        """As many micro-batches in a group as there are stages, or twice as many where that is possible."""
        double = 2 * config.parallel.pipeline
        fits = config.parallel.virtual_pipeline > 1 and num_micro_batches(config, self.world_size) % double == 0
        return [0, double] if fits else [0]

    def _tensor(self, pipeline: int) -> Iterable[int]:
        """Tensor-parallel groups stay within a node: they communicate in every layer."""
        sizes = divisors(max(1, self.world_size // pipeline))
        return [size for size in sizes if GPUS_PER_NODE % size == 0]

    def _virtual(self, pipeline: int) -> Iterable[int]:
        """Chunks per pipeline rank: each has a layer at least."""
        model = self.config.model
        layers = model.vision.layers if self.config.stage == "mim" else min(model.vision.layers, model.text.layers)
        return range(1, layers // pipeline + 1) if pipeline > 1 else [1]

    def _parallel(self, config: Config, **settings: Any) -> Config:
        """Change settings of `parallel` that are not fixed."""
        free = {name: value for name, value in settings.items() if f"parallel.{name}" not in self.fixed}
        return replace(config, parallel=replace(config.parallel, **free))

    def _choices(self, key: str, choices: Iterable[Any]) -> Iterable[Any]:
        section, _, name = key.partition(".")
        return [getattr(getattr(self.config, section), name)] if key in self.fixed else choices

    def _legal(self, check: Callable[..., None], *arguments: Any) -> bool:
        try:
            check(*arguments)
        except ConfigError as refused:
            self.refused = self.refused or refused
            return False
        return True
