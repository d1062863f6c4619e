"""A stage of training in one layout, as memory and time are worked out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from w2s.config.batching import (
    data_parallel_size,
    micro_batch_size,
    model_parallel_size,
    num_micro_batches,
    num_passes,
    samples_per_rank,
    samples_per_replica,
)
from w2s.config.sections import Config
from w2s.config.teacher_losses import Target
from w2s.planning.memory import fully_sharded_costs
from w2s.planning.memory.states import States, tower_states
from w2s.planning.model.teacher import PlannedTeacher, drawn, predicted
from w2s.planning.model.towers import PlannedTower, planned_towers


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its towers and teachers on a number of GPUs."""

    config: Config
    gpus: int
    towers: Sequence[PlannedTower]
    teachers: Sequence[PlannedTeacher]

    @classmethod
    def of(cls, config: Config, gpus: int, teachers: Sequence[PlannedTeacher]) -> "PlannedStage":
        """Work out the towers, which predict the teachers."""
        return cls(config, gpus, planned_towers(config, **predicted(config, teachers)), teachers)

    def states(self, pipeline_rank: int, data_rank: int = 0) -> States:
        """Bytes of weights, gradients, optimizer and average on a rank; fully sharded, all ranks have the first's."""
        precision, size, total = self.config.precision, self.data_size, States()
        for tower in self.towers:
            if self.fully_sharded:
                total += fully_sharded_costs.tower_states(tower, precision, size)
            else:
                place = {"data_size": size, "data_rank": data_rank, "pipeline_rank": pipeline_rank}
                total += tower_states(tower, self.config.parallel, precision, **place)
        return total if self.config.optim.ema > 0 else replace(total, average=0)

    @property
    def fully_sharded(self) -> bool:
        """Whether data-parallel ranks share out the weights too."""
        return self.config.parallel.shard == "full"

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return data_parallel_size(self.config.parallel, self.gpus)

    @property
    def model_size(self) -> int:
        """Model-parallel ranks."""
        return model_parallel_size(self.config.parallel)

    @cached_property
    def rank_samples(self) -> int:
        """Samples of a step that a rank reads."""
        return samples_per_rank(self.config, self.gpus)

    @cached_property
    def replica_samples(self) -> int:
        """Samples of a step of a model-parallel group."""
        return samples_per_replica(self.config, self.gpus)

    @cached_property
    def micro_batch(self) -> int:
        """Samples of a micro-batch."""
        return micro_batch_size(self.config, self.gpus)

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return num_micro_batches(self.config, self.gpus)

    @property
    def two_pass(self) -> bool:
        """Whether the towers run twice, as the loss needs the features of all micro-batches."""
        return num_passes(self.config, self.micro_batches) == 2

    @cached_property
    def targets(self) -> Sequence[Target]:
        """What is predicted of each teacher."""
        targets: Sequence[Target] = predicted(self.config, self.teachers)["targets"]
        return targets

    @property
    def predicted_features(self) -> int:
        """Features of a sample that a teacher gives: of the patches to predict, or of image and caption."""
        config = self.config
        return config.mim.predicted(config.model.vision.patches) if config.stage == "mim" else 2

    @property
    def draws_teachers(self) -> bool:
        """Whether a sample may lack a teacher, and the ranks of a model-parallel group share the images out anew."""
        return drawn(self.teachers) and self.model_size > 1
