"""How the samples of a step are dealt out: over ranks, micro-batches, passes, lanes of the data and pipeline stages.

Stages, planner and checks share this arithmetic. It takes what is legal for granted: `layout_checks.py` says what is.
"""

import math

from w2s.config.sections import Config, ParallelConfig, PhaseConfig


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Return how many ranks hold one replica of the model together."""
    return parallel.tensor * parallel.pipeline


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many replicas of the model `world_size` ranks hold."""
    return world_size // model_parallel_size(parallel)


def ranks_per_stage(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many of `world_size` ranks are on one stage of the pipeline; their numbers follow one another."""
    return world_size // parallel.pipeline


def num_stages(parallel: ParallelConfig) -> int:
    """Return the stages of the pipeline, virtual ones included."""
    return parallel.pipeline * parallel.virtual_pipeline


def samples_per_rank(config: Config, world_size: int) -> int:
    """Return the samples of a step that a rank reads, and shows its teachers."""
    return config.train.global_batch // world_size


def samples_per_replica(config: Config, world_size: int) -> int:
    """Return the samples of a step that one replica sees."""
    return config.train.global_batch // data_parallel_size(config.parallel, world_size)


def micro_batch_size(config: Config, world_size: int) -> int:
    """Return the samples of a micro-batch: `train.micro_batch`, or all of a replica's where these are fewer."""
    return min(config.train.micro_batch, samples_per_replica(config, world_size))


def num_micro_batches(config: Config, world_size: int) -> int:
    """Return the micro-batches of a step on one replica."""
    return samples_per_replica(config, world_size) // micro_batch_size(config, world_size)


def fills_pipeline(parallel: ParallelConfig, count: int) -> bool:
    """Return whether that many micro-batches give every stage work; virtual ones take `pipeline` of them at a time."""
    return count % parallel.pipeline == 0 if parallel.virtual_pipeline > 1 else count >= parallel.pipeline


def num_passes(config: Config, count: int) -> int:
    """Return the forward passes of a stage's towers in a step of `count` micro-batches.

    The contrastive stage needs two where no rank has the features of all of a replica's samples after one.
    """
    all_at_once = count == 1 and config.parallel.pipeline == 1 and config.clip.two_pass == "auto"
    return 1 if config.stage == "mim" or all_at_once else 2


def lanes_fit(lanes: int, global_batch: int, world_size: int) -> bool:
    """Return whether ranks and batches divide the lanes of the data, so that each rank reads whole lanes."""
    return lanes % world_size == 0 and (global_batch % lanes == 0 or lanes % global_batch == 0)


def lanes_per_rank(lanes: int, global_batch: int, world_size: int) -> int:
    """Return the lanes that a rank reads from in a step."""
    return min(lanes, global_batch) // world_size


def sequence_lengths(config: Config) -> list[int]:
    """Return how many tokens a sample has in the towers of a stage, in each phase of the data."""
    patches, class_tokens = config.model.vision.patches, config.model.vision.class_tokens
    if config.stage == "mim":
        return [class_tokens + config.mim.num_visible(patches)]
    phases = sorted(set(views_in_phases(config)))
    vision = [frames * (class_tokens + num_kept_patches(patches, dropout)) for frames, dropout in phases]
    return [*vision, config.model.text.context_length]


def views_in_phases(config: Config) -> list[tuple[int, float]]:
    """Return the frames of a sample and the fraction of patches that is dropped, in each phase of the data."""
    frames, dropout = config.data.frames, config.clip.patch_dropout
    return [
        (phase.frames or frames, dropout if phase.patch_dropout is None else phase.patch_dropout)
        for phase in config.data.phases or [PhaseConfig()]
    ]


def num_kept_patches(patches: int, dropout: float) -> int:
    """Return how many of an image's patches the vision tower sees under patch dropout."""
    return max(1, int(patches * (1 - dropout))) if dropout else patches


def divisors(number: int) -> list[int]:
    """Return what divides a number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
