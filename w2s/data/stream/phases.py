"""How often each source is drawn, and what is made of a sample, phase by phase."""

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from w2s.config.batching import num_kept_patches
from w2s.config.sections import DataConfig, PhaseConfig
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.samples.sample import SampleSpec
from w2s.data.shards.listing import split_sources
from w2s.errors import ConfigError
from w2s.redaction import redact


@dataclass(frozen=True)
class Mix:
    """How often the sources are drawn in a part of the training samples."""

    first: int
    """Global index of its first sample."""
    weights: tuple[float, ...]
    """Probability of each source of the run."""

    def draw(self, seed: int, index: int) -> int:
        """Return the source of a sample; it depends on the seed and the global index alone."""
        if max(self.weights) == 1:
            return self.weights.index(1)
        point = generator(seed, Purpose.SOURCE, index).random()
        return int(np.searchsorted(np.cumsum(self.weights), point, side="right"))


@dataclass(frozen=True)
class Phase(Mix):
    """A part of the training samples."""

    spec: SampleSpec
    """What is made of its samples."""


M = TypeVar("M", bound=Mix)


def phase_at(phases: Sequence[M], index: int) -> M:
    """Return the phase, or the mix, of a global sample index."""
    return phases[bisect.bisect_right(phases, index, key=lambda phase: phase.first) - 1]


def plan_phases(data: DataConfig, spec: SampleSpec, global_batch: int) -> list[Phase]:
    """Lay out the phases of a run.

    Raises:
        ConfigError: weights that are not one for each source, or a phase that does not end with a batch.
    """
    parts = data.phases or [PhaseConfig()]
    mixes = plan_mixes(data)
    _check_lengths(parts, global_batch)
    return [Phase(mix.first, mix.weights, _phase_spec(part, spec)) for mix, part in zip(mixes, parts, strict=True)]


def plan_mixes(data: DataConfig) -> list[Mix]:
    """Lay out how often each source of `source_names` is drawn, phase by phase; no shards are looked for.

    Raises:
        ConfigError: weights that are not one for each source.
    """
    parts, patterns = data.phases or [PhaseConfig()], source_names(data)
    firsts = itertools.accumulate((part.samples for part in parts[:-1]), initial=0)
    by_pattern = (_mix(part, data) for part in parts)
    weights = [tuple(mix.get(text, 0.0) for text in patterns) for mix in by_pattern]
    return list(map(Mix, firsts, weights))


def source_names(data: DataConfig) -> dict[str, str]:
    """Name the sources of all phases, by their patterns and in their order; no shards are looked for.

    Raises:
        ConfigError: weights that are not one for each source.
    """
    mixes = [_mix(part, data) for part in data.phases or [PhaseConfig()]]
    return _names(list(dict.fromkeys(pattern for mix in mixes for pattern in mix)))


def _mix(part: PhaseConfig, data: DataConfig) -> dict[str, float]:
    """Return the probability of each source of a phase; without weights all sources are one."""
    text = part.train or data.train
    weights = part.weights or (data.weights if not part.train or part.train == data.train else [])
    if not weights:
        return {text: 1.0}
    patterns = split_sources(text)
    if len(weights) != len(patterns) or len(set(patterns)) != len(patterns):
        raise ConfigError(
            f"data.weights={weights} are {len(weights)} for the {len(set(patterns))} different sources of "
            f"data.train={text}: give one for each"
        )
    return {pattern: weight / sum(weights) for pattern, weight in zip(patterns, weights, strict=True)}


def _names(patterns: Sequence[str]) -> dict[str, str]:
    """Name every source by the last folder of its pattern, and by a number where names are equal."""
    names: dict[str, str] = {}
    for pattern in patterns:
        folders = [
            part
            for part in re.split(r"[/,:;]", redact(pattern))
            if part and not re.search(r"[*?{}\[\]]|\.(tar|parquet)$", part)
        ]
        plain = re.sub(r"[^\w.-]", "_", folders[-1]) if folders else "shards"
        taken = set(names.values())
        numbered = (f"{plain}-{count}" for count in itertools.count(2))
        names[pattern] = next(name for name in itertools.chain([plain], numbered) if name not in taken)
    return names


def _check_lengths(parts: Sequence[PhaseConfig], global_batch: int) -> None:
    for position, part in enumerate(parts, 1):
        if (part.samples == 0 and position < len(parts)) or part.samples % global_batch:
            fitting = max(1, round(part.samples / global_batch)) * global_batch
            raise ConfigError(
                f"data.phases: phase {position} has samples={part.samples}, which is not a multiple of "
                f"train.global_batch={global_batch}: use {fitting}"
            )


def _phase_spec(part: PhaseConfig, spec: SampleSpec) -> SampleSpec:
    if part.crop_scale is not None:
        spec = replace(spec, crop_scale=part.crop_scale)
    if part.patch_dropout is not None:
        kept = num_kept_patches(spec.grid**2, part.patch_dropout) if part.patch_dropout else 0
        spec = replace(spec, num_kept_patches=kept)
    if part.frames is not None:
        spec = replace(spec, frames=part.frames)
    return spec
