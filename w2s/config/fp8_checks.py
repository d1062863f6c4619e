"""Linear layers that a machine does not have, and FP8 that cannot work or would do nothing."""

from w2s.config import gpu
from w2s.config.batching import divisors, micro_batch_size, samples_per_replica, sequence_lengths
from w2s.config.fields import nearest
from w2s.config.layout_checks import tower_names
from w2s.config.precision import INSTALL, LinearChoice, choose_linears
from w2s.config.rules import check_rules, listed, written
from w2s.config.sections import Config, HardwareConfig, PrecisionConfig
from w2s.errors import ConfigError, MissingPackageError

_REHEARSE = "use precision.fp8=emulated for a rehearsal, or precision.fp8=none"
ALIGNMENT = 16
"""FP8 products want a rank's tokens, width and MLP width in multiples of this (cuBLAS; tokens: TE's backward pass)."""
_BLOCK = 128
"""Side of a block of the blockwise recipe."""
_BLOCKWISE_SINCE = (12, 9)
"""CUDA whose cuBLAS has its products (Transformer Engine 2.12, pytorch/quantization.py)."""


def check_linears(config: Config) -> None:
    """Refuse linear layers that this machine does not have, and FP8 that could not run or would do nothing.

    An evaluation takes no FP8, whatever its configuration says.

    Raises:
        ConfigError: with the key, its value and the fix.
        MissingPackageError: Transformer Engine is asked for and not installed.
    """
    precision = config.precision
    check_rules(config, "precision")
    if precision.fp8 == "emulated":
        _check_rehearsal(precision, config.hardware)
    choice = choose_linears(precision, config.hardware)
    if precision.linear == "te":
        _check_engine(precision, config.hardware)
    if precision.fp8 in ("delayed", "tensorwise", "blockwise") and config.stage != "eval":
        _check_recipe(precision, choice)


def check_fp8_layout(config: Config, world_size: int) -> None:
    """Refuse towers, layers and micro-batches that FP8 products cannot take on the ranks of a run.

    Raises:
        ConfigError: with the key, its value and the legal ones.
    """
    if config.precision.fp8 == "none":
        return
    for name in tower_names(config):
        _check_widths(config, name)
    _check_layers(config)
    _check_tokens(config, world_size)


def _check_engine(precision: PrecisionConfig, hardware: HardwareConfig) -> None:
    fix = "use precision.linear=auto" if precision.fp8 == "none" else _REHEARSE
    if hardware.device == "cpu" or gpu.card() is None:
        where = "with hardware.device=cpu" if hardware.device == "cpu" else "on a machine without a GPU"
        raise ConfigError(f"precision.linear=te {where}: Transformer Engine runs on NVIDIA GPUs alone, {fix}")
    if not gpu.transformer_engine_installed():
        raise MissingPackageError(
            f"precision.linear=te, but Transformer Engine is not installed: {INSTALL}, or use precision.linear=local"
        )


def _check_rehearsal(precision: PrecisionConfig, hardware: HardwareConfig) -> None:
    if precision.linear == "te":
        raise ConfigError(
            "precision.fp8=emulated is made of local linears, not of precision.linear=te: leave precision.linear out, "
            "or use precision.fp8=tensorwise"
        )
    if precision.fp8_primary_weights:
        raise ConfigError(
            "precision.fp8_primary_weights=true needs Transformer Engine's tensors, which precision.fp8=emulated has "
            "not: leave it out"
        )
    card = gpu.card() if hardware.device != "cpu" else None
    if card is not None and card.capability < (8, 9):
        raise ConfigError(f"precision.fp8=emulated on {card.name}, which has no FP8: use hardware=cpu for a rehearsal")


def _check_recipe(precision: PrecisionConfig, choice: LinearChoice) -> None:
    """Refuse a recipe of Transformer Engine where that is not to be had, and what its recipes exclude."""
    asked = f"precision.fp8={precision.fp8}"
    if choice.implementation != "te":
        raise ConfigError(f"{asked} needs Transformer Engine's linears, these are local ({choice.reason}): {_REHEARSE}")
    card = gpu.card()
    if card is not None and not card.hopper_or_newer:
        raise ConfigError(f"{asked} needs Hopper or a newer card, this is {card.name}: {_REHEARSE}")
    if precision.fp8 == "blockwise" and (gpu.cuda_version() or _BLOCKWISE_SINCE) < _BLOCKWISE_SINCE:
        since, have = (".".join(map(str, each)) for each in (_BLOCKWISE_SINCE, gpu.cuda_version() or ()))
        raise ConfigError(f"{asked} needs CUDA {since} or newer, torch has {have}: use precision.fp8=tensorwise")
    if precision.compute == "fp32":
        raise ConfigError(f"{asked} with precision.compute=fp32: use precision.compute=bf16")


def _check_widths(config: Config, name: str) -> None:
    tower, tensor = getattr(config.model, name), config.parallel.tensor
    for field in ("width", "mlp_width"):
        value = getattr(tower, field)
        if value % (tensor * ALIGNMENT):
            each = f" on each of parallel.tensor={tensor} ranks" if tensor > 1 else ""
            smaller = [size for size in range(1, tensor) if value % (size * ALIGNMENT) == 0]
            fix = f"use parallel.tensor={listed(smaller)}" if smaller else f"use a multiple of {tensor * ALIGNMENT}"
            raise ConfigError(
                f"model.{name}.{field}={value} makes {value / tensor:g} columns{each}, FP8 needs a multiple of "
                f"{ALIGNMENT}: {fix}, or precision.fp8=none"
            )


def _check_layers(config: Config) -> None:
    precision, towers = config.precision, tower_names(config)
    kept = [name for name in ("fp8_bf16_first", "fp8_bf16_last", "fp8_bf16_layers") if getattr(precision, name)]
    if precision.fp8 == "delayed" and kept:
        raise ConfigError(
            f"precision.{kept[0]}={written(getattr(precision, kept[0]))} with precision.fp8=delayed, whose one FP8 "
            "context spans all layers: use precision.fp8=tensorwise, or leave it out"
        )
    shallow = min(getattr(config.model, name).layers for name in towers)
    if precision.fp8_bf16_first + precision.fp8_bf16_last >= shallow:
        raise ConfigError(
            f"precision.fp8_bf16_first={precision.fp8_bf16_first} and precision.fp8_bf16_last="
            f"{precision.fp8_bf16_last} leave no layer of {shallow} in FP8: use less, or precision.fp8=none"
        )
    known = {f"{name}.{layer}" for name in ("vision", "text") for layer in range(getattr(config.model, name).layers)}
    for name in precision.fp8_bf16_layers:
        if name not in known:
            raise ConfigError(
                f"precision.fp8_bf16_layers: there is no layer {name}: did you mean {nearest(name, sorted(known))}? "
                "Layers are counted from 0"
            )


def _check_tokens(config: Config, world_size: int) -> None:
    """What a product goes over: the tokens of all images of a micro-batch that are on a rank at a time."""
    parallel, train, recipe = config.parallel, config.train, config.precision.fp8
    share, micro = samples_per_replica(config, world_size), micro_batch_size(config, world_size)
    ranks = parallel.tensor if parallel.sequence else 1
    blocks = recipe == "blockwise" and parallel.sequence
    unit = _BLOCK if blocks else ALIGNMENT
    for tokens in sequence_lengths(config):
        if micro * tokens % (ranks * unit):
            legal = [n for n in divisors(share) if n * tokens % (ranks * unit) == 0]
            fix = f"train.micro_batch={listed(legal[:8])}" if legal else f"batches of a multiple of {ranks * unit}"
            raise ConfigError(
                f"train.micro_batch={train.micro_batch} makes {micro} x {tokens} tokens for {ranks} "
                f"rank{'s' * (ranks > 1)}, precision.fp8={recipe} needs a multiple of {unit} on each: use {fix}"
            )
    for name in tower_names(config) if blocks else ():
        width = getattr(config.model, name).width
        if width % _BLOCK:
            raise ConfigError(
                f"model.{name}.width={width} with precision.fp8=blockwise and parallel.sequence=true must be a "
                f"multiple of {_BLOCK}: use precision.fp8=tensorwise, or parallel.sequence=false"
            )
