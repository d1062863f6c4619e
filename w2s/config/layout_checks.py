"""Parallel layouts that cannot work, and those that would do nothing, are refused before a run starts."""

import torch

from w2s.config.batching import (
    data_parallel_size,
    divisors,
    fills_pipeline,
    lanes_fit,
    micro_batch_size,
    model_parallel_size,
    num_micro_batches,
    num_stages,
    samples_per_replica,
    sequence_lengths,
    views_in_phases,
)
from w2s.config.rules import check_rules, listed
from w2s.config.sections import Config, ParallelConfig, TrainConfig
from w2s.errors import ConfigError


def check_ranks(config: Config, world_size: int) -> None:
    """Refuse a layout that the ranks do not divide into, and options that would do nothing in it.

    Raises:
        ConfigError: with the key, its value and the legal ones.
    """
    _check_sizes(config.parallel, world_size)
    _check_options(config, data_parallel_size(config.parallel, world_size))
    _check_sharded_teacher(config)


def check_towers(config: Config) -> None:
    """Refuse a layout that the towers of a stage do not divide into.

    Raises:
        ConfigError: with the key, its value and the legal ones.
    """
    for name in tower_names(config):
        _check_tensor(config, name)
        _check_pipeline(config, name)
    count = config.parallel.recompute_layers
    most = max(getattr(config.model, name).layers for name in tower_names(config))
    if count > most:
        raise ConfigError(
            f"parallel.recompute_layers={count} is more than the {most} layers of a tower: "
            f"use at most {most}, or 0 for all layers"
        )


def check_micro_batches(config: Config, world_size: int) -> None:
    """Refuse a batch that ranks or micro-batches do not divide, a pipeline not filled, and tokens that do not divide.

    Raises:
        ConfigError: with the key, its value and the legal ones.
    """
    parallel, train = config.parallel, config.train
    replicas = data_parallel_size(parallel, world_size)
    _check_batch(train, replicas)
    if train.global_batch % world_size:
        legal = max(1, train.global_batch // world_size) * world_size
        ranks = _named(world_size, parallel)
        raise ConfigError(
            f"train.global_batch={train.global_batch} is not divisible by {ranks}, each of which reads and "
            f"teaches its share: use train.global_batch={legal}"
        )
    share, count = samples_per_replica(config, world_size), num_micro_batches(config, world_size)
    if not fills_pipeline(parallel, count):
        legal_sizes = [n for n in divisors(share) if fills_pipeline(parallel, share // n)]
        least = f"train.global_batch={parallel.pipeline * replicas} or more"
        fix = f"use train.micro_batch={listed(legal_sizes)}" if legal_sizes else f"use {least}"
        raise ConfigError(
            f"train.micro_batch={train.micro_batch} makes {count} micro-batches of the {share} samples of a "
            f"data-parallel rank, which do not fill {parallel.pipeline} pipeline stages: {fix}"
        )
    _check_group(parallel, count)
    if parallel.sequence:
        _check_tokens(config, micro_batch_size(config, world_size), share)


def check_lanes(lanes: int, global_batch: int, world_size: int, parallel: ParallelConfig | None = None) -> None:
    """Refuse lanes of the data that ranks or batches do not divide; every rank reads a share of each batch.

    Args:
        lanes: `data.lanes`.
        global_batch: samples of a step over all ranks.
        world_size: ranks that read.
        parallel: what they are, for the message.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    whole = global_batch % world_size == 0
    legal = [world_size * count for count in divisors(global_batch // world_size)] if whole else []
    fix = f"use data.lanes={listed(legal[-4:])}" if legal else f"use lanes and batches in multiples of {world_size}"
    if lanes % world_size:
        ranks = _named(world_size, parallel)
        raise ConfigError(f"data.lanes={lanes} is not divisible by {ranks}, each of which reads: {fix}")
    if not lanes_fit(lanes, global_batch, world_size):
        raise ConfigError(f"data.lanes={lanes} and train.global_batch={global_batch} do not divide: {fix}")


def _named(world_size: int, parallel: ParallelConfig | None) -> str:
    """The ranks by what they are, where they are not all data-parallel."""
    if parallel is None or model_parallel_size(parallel) == 1:
        return f"{world_size} ranks"
    parts = {"data": data_parallel_size(parallel, world_size), "tensor": parallel.tensor, "pipeline": parallel.pipeline}
    return f"{world_size} ranks ({' x '.join(f'{count} {name}' for name, count in parts.items() if count > 1)})"


def _check_group(parallel: ParallelConfig, count: int) -> None:
    """The last micro-batches that go through a chunk together, if there are fewer, must fill the pipeline too."""
    group, stages = parallel.micro_batch_group, parallel.pipeline
    if not group:
        return
    legal = [n for n in range(stages, count + 1) if count % n == 0 or count % n >= stages]
    if group not in legal:
        raise ConfigError(
            f"parallel.micro_batch_group={group} of {count} micro-batches does not keep {stages} pipeline stages "
            f"filled: use {listed(legal)}, or leave it out"
        )


def _check_batch(train: TrainConfig, replicas: int) -> None:
    """Every data-parallel rank's share of the global batch must be one micro-batch or a whole number of them."""
    batch, micro = train.global_batch, train.micro_batch
    if batch % replicas:
        below, above = batch // replicas * replicas, -(-batch // replicas) * replicas
        choice = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"train.global_batch={batch} is not divisible by {replicas} data-parallel ranks: "
            f"use train.global_batch={choice}"
        )
    share = batch // replicas
    if share > micro and share % micro:
        legal = next(size for size in range(micro, 0, -1) if share % size == 0)
        raise ConfigError(
            f"train.micro_batch={micro} does not divide the {share} samples of a rank (train.global_batch={batch} on "
            f"{replicas} data-parallel rank{'s' * (replicas > 1)}): use train.micro_batch={legal}, another divisor of "
            f"{share}, or anything above"
        )


def _check_sizes(parallel: ParallelConfig, world_size: int) -> None:
    size = model_parallel_size(parallel)
    if world_size % size:
        needs = f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} needs a multiple of {size}"
        below = world_size // size * size
        fix = f"use {below} or {below + size} (--nproc, --gpus)" if below else f"use {size} (--nproc, --gpus)"
        raise ConfigError(f"{needs} ranks, there are {world_size}: {fix}, or smaller sizes")


def _check_options(config: Config, replicas: int) -> None:
    """Refuse what would do nothing, or do it wrongly."""
    parallel = config.parallel
    check_rules(config, "parallel", "precision")
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name) and replicas == 1:
            raise ConfigError(f"parallel.{name}=true does nothing with one data-parallel rank: leave it out")
    # Linears in FP8 keep their own rounded input, of which there is nothing to forget.
    if parallel.recompute == "selective" and _all_in_fp8(config):
        raise ConfigError(
            f"parallel.recompute=selective does nothing with precision.fp8={config.precision.fp8} in all layers (none "
            "or full does): leave it out"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ConfigError("parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true: set both")
    if parallel.shard == "full":
        _check_fully_sharded(config, replicas)


def _check_fully_sharded(config: Config, replicas: int) -> None:
    """Refuse what Megatron's FSDP cannot do here, or does anyway."""
    parallel, alone, gathers = config.parallel, "it is for data parallelism alone", "it overlaps without being told"
    refused = {
        f"parallel.tensor={parallel.tensor}": (parallel.tensor > 1, f"{alone}, use parallel.tensor=1"),
        f"parallel.pipeline={parallel.pipeline}": (parallel.pipeline > 1, f"{alone}, use parallel.pipeline=1"),
        "one data-parallel rank": (replicas == 1, "there is nobody to share with, use more ranks (--nproc, --gpus)"),
        "parallel.cuda_graphs=true": (parallel.cuda_graphs, "use parallel.cuda_graphs=false"),
        "precision.fp8_primary_weights=true": (
            config.precision.fp8_primary_weights,
            "use precision.fp8_primary_weights=false",
        ),
        "clip.learn_logit_scale=false": (
            config.stage == "clip" and not config.clip.learn_logit_scale,
            "all parameters have to be trained, use clip.learn_logit_scale=true",
        ),
        "parallel.overlap_grad_reduce=true": (parallel.overlap_grad_reduce, f"{gathers}, leave that out"),
        "parallel.overlap_param_gather=true": (parallel.overlap_param_gather, f"{gathers}, leave that out"),
    }
    for given, (holds, fix) in refused.items():
        if holds:
            raise ConfigError(f"parallel.shard=full with {given}: {fix}, or parallel.shard=optimizer")


def _check_sharded_teacher(config: Config) -> None:
    if not config.teacher.sharded:
        return
    for teacher in config.stage_teachers or (config.teacher,):
        if not teacher.source.startswith("w2s:"):
            raise ConfigError(
                f"teacher.sharded=true with teacher.source={teacher.source}: only w2s:RUN can be split, "
                "use teacher.sharded=false"
            )
    if config.parallel.pipeline > 1:
        raise ConfigError(
            f"teacher.sharded=true with parallel.pipeline={config.parallel.pipeline}: a teacher is split over "
            "tensor-parallel ranks alone, use parallel.pipeline=1 or teacher.sharded=false"
        )


def check_graphs(config: Config) -> None:
    """CUDA graphs need a GPU, the same shapes in every pass, and one pass at a time.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    if not config.parallel.cuda_graphs:
        return
    parallel, (frames, dropouts) = config.parallel, map(set, zip(*views_in_phases(config), strict=True))
    fixes = {
        "parallel.tensor=1": parallel.tensor > 1,
        "parallel.pipeline=1": parallel.pipeline > 1,
        "parallel.recompute=none or selective": parallel.recompute == "full",
        "precision.fp8=none": config.precision.fp8 != "none",
        "parallel.overlap_param_gather=false": parallel.overlap_param_gather,
        "model.vision.drop_path=0": config.model.vision.drop_path > 0,
        "one patch_dropout in all data.phases": len(dropouts) > 1,
        "the same frames in all data.phases": len(frames) > 1,
        "mim.layers=[]": config.stage == "mim" and bool(config.mim.layers),
        "hardware=auto on a machine with a GPU": config.hardware.device == "cpu" or not torch.cuda.device_count(),
    }
    needed = [fix for fix, is_needed in fixes.items() if is_needed]
    if needed:
        raise ConfigError(f"parallel.cuda_graphs=true needs {', '.join(needed)}: set that, or leave the graphs out")


def _all_in_fp8(config: Config) -> bool:
    precision = config.precision
    kept = precision.fp8_bf16_first or precision.fp8_bf16_last or precision.fp8_bf16_layers
    return config.stage != "eval" and precision.fp8 != "none" and not kept


def tower_names(config: Config) -> list[str]:
    """Return the names of the towers that a stage trains."""
    return ["vision"] if config.stage == "mim" else ["vision", "text"]


def _check_tensor(config: Config, name: str) -> None:
    tower, tensor = getattr(config.model, name), config.parallel.tensor
    for field in ("heads", "mlp_width"):
        value = getattr(tower, field)
        if value % tensor:
            raise ConfigError(
                f"parallel.tensor={tensor} does not divide model.{name}.{field}={value}: "
                f"use parallel.tensor={listed(_legal_tensor_sizes(config))}"
            )


def _legal_tensor_sizes(config: Config) -> list[int]:
    towers = [getattr(config.model, name) for name in tower_names(config)]
    most = min(tower.heads for tower in towers)
    return [
        size
        for size in range(1, most + 1)
        if all(tower.heads % size == 0 and tower.mlp_width % size == 0 for tower in towers)
    ]


def _check_pipeline(config: Config, name: str) -> None:
    parallel, layers = config.parallel, getattr(config.model, name).layers
    stages, split = num_stages(parallel), getattr(parallel, f"{name}_split")
    if layers < stages:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_pipeline={parallel.virtual_pipeline} makes "
            f"{stages} stages of model.{name}.layers={layers}: use at most {layers}"
        )
    if split and (len(split) != stages or sum(split) != layers or min(split) < 1):
        raise ConfigError(
            f"parallel.{name}_split={list(split)} must have {stages} whole numbers above 0 that add up to "
            f"model.{name}.layers={layers}: leave it out, or use such as {_even(layers, stages)}"
        )


def _even(layers: int, stages: int) -> list[int]:
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def _check_tokens(config: Config, micro: int, share: int) -> None:
    """Packed tokens: the tokens of a whole micro-batch have to divide, not those of an image."""
    tensor = config.parallel.tensor
    for tokens in sequence_lengths(config):
        if micro * tokens % tensor:
            legal = [n for n in divisors(share) if n * tokens % tensor == 0]
            fix = f"use train.micro_batch={listed(legal)}" if legal else "use parallel.sequence=false"
            raise ConfigError(
                f"parallel.sequence=true cannot share the {micro} x {tokens} tokens of a micro-batch among "
                f"parallel.tensor={tensor} ranks: {fix}"
            )
