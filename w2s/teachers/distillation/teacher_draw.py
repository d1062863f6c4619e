"""Which teachers a sample of the masked stage has: all those of its source, or one of them by lot."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from w2s.config.fields import nearest
from w2s.config.sections import Config
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.stream.phases import phase_at, plan_mixes, source_names
from w2s.errors import ConfigError


class TeacherDraw:
    """Which teachers a sample has, as a function of the seed and its global index alone.

    Args:
        config: the masked stage.

    Attributes:
        chances: probability that a sample of a source has a teacher: float64 [sources, teachers].

    Raises:
        ConfigError: sources that do not exist, or one that no teacher is for.
    """

    def __init__(self, config: Config) -> None:
        self._seed, self._train = config.run.seed, config.train
        self._mixes, self._one = plan_mixes(config.data), config.teachers.draw == "one"
        self.chances = _chances(config, list(source_names(config.data).values()))

    @classmethod
    def of(cls, config: Config) -> "TeacherDraw | None":
        """Return the draw of the masked stage; None where every sample has every teacher."""
        if config.teachers.draw == "all" and not any(teacher_loss.sources for teacher_loss in config.teacher_losses):
            return None
        draw = cls(config)
        return draw if (draw.chances < 1).any() else None

    def drawn(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Draw the teachers of samples of one step.

        Args:
            indices: global indices of the samples [n].

        Returns:
            [n, teachers]: 0 where a sample does not have a teacher, otherwise 1 over the probability that it has, so
            that in the mean over many draws all samples that may have a teacher count alike.
        """
        mix = phase_at(self._mixes, int(indices[0]))
        several = len(self.chances) > 1
        sources = [mix.draw(self._seed, index) if several else 0 for index in indices.tolist()]
        chances = self.chances[sources]
        if self._one:
            edges = chances.cumsum(1)
            chosen = (self._points(indices)[:, None] >= edges / edges[:, -1:]).sum(1)
            has = chosen[:, None] == np.arange(chances.shape[1])
        else:
            has = chances > 0
        return np.divide(has, chances, out=np.zeros_like(chances), where=has)

    def _points(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Points in [0, 1) by which samples of one step choose: evenly spaced over the step, from a random one on.

        Each is uniform, and every data-parallel group has evenly spaced ones too (systematic sampling: Madow and Madow
        1944): of a single source all have as many samples of a teacher, within one, as its share wants.
        """
        step = int(indices[0]) // self._train.global_batch
        offset = generator(self._seed, Purpose.TEACHER, step).random()
        points: NDArray[np.float64] = (indices / self._train.global_batch + offset) % 1
        return points

    def in_first_batch(self) -> list[int]:
        """Return how many samples of the first global batch have each teacher."""
        counts: list[int] = np.count_nonzero(self.drawn(np.arange(self._train.global_batch)), axis=0).tolist()
        return counts

    def shares(self) -> list[float]:
        """Return the share of the run's samples that each teacher has, as it is to be expected."""
        total = self._train.steps * self._train.global_batch
        ends = [*(mix.first for mix in self._mixes[1:]), total]
        lengths = [max(0, min(end, total) - mix.first) for mix, end in zip(self._mixes, ends, strict=True)]
        weights = np.average([mix.weights for mix in self._mixes], axis=0, weights=lengths)
        shares: list[float] = (weights @ self.chances).tolist()
        return shares


def group_indices(first: int, global_batch: int, data_size: int) -> NDArray[np.int64]:
    """Return the global indices of the samples of a model-parallel group, ascending.

    Args:
        first: global index of a sample that one of its ranks has read.
        global_batch: samples of a step.
        data_size: size of the data-parallel group.
    """
    step = first // global_batch * global_batch
    return np.arange(step + first % data_size, step + global_batch, data_size)


def _chances(config: Config, names: Sequence[str]) -> NDArray[np.float64]:
    """Probability that a sample of a source has a teacher: [sources, teachers]."""
    for teacher_loss in config.teacher_losses:
        for name in teacher_loss.sources:
            _check_source(teacher_loss.teacher.name, name, names)
    allowed = np.array(
        [[not each.sources or name in each.sources for each in config.teacher_losses] for name in names], float
    )
    for name, row in zip(names, allowed, strict=True):
        if not row.any():
            raise ConfigError(
                f"teachers: none is for the source {name}: add it to the sources of one of them, or leave it out of "
                "data.train"
            )
    if config.teachers.draw == "all":
        return allowed
    shares = allowed * [teacher_loss.share for teacher_loss in config.teacher_losses]
    return shares / shares.sum(1, keepdims=True)


def _check_source(teacher: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        alone = " (one pool: data.weights makes several sources of it)" if len(names) == 1 else ""
        raise ConfigError(
            f"teachers: {teacher} has sources=[{name}]: did you mean {nearest(name, names)}? "
            f"There are {', '.join(names)}{alone}"
        )
