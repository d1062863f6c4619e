"""`w2s bench step`: the figures of our step, and of the peer's beside it."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from w2s.bench.depth import reduced
from w2s.bench.peers.peer_choice import check_peer
from w2s.bench.speed import Speed, bf16_peak, card_of, speed
from w2s.bench.step import Job, Measured, Row, measure, with_batch
from w2s.config.checks import check
from w2s.config.sections import Config, ParallelConfig
from w2s.data.builtin.builtin_sets import ensure_builtin
from w2s.errors import ConfigError, W2SError
from w2s.planning.model.flops import image_flops, student_flops, text_flops, tokens_per_image
from w2s.planning.model.teacher import PlannedTeacher, planned_teachers, predicted, sample_flops
from w2s.planning.plan import find_plans
from w2s.processes.elastic import is_rank

PACKAGES = ("w2s", "torch", "megatron-core", "timm", "open_clip_torch")


@dataclass(frozen=True)
class Line:
    """A batch; what is null did not fit into the memory, or was not asked for."""

    micro_batch: int
    global_batch: int
    ours: Speed | None
    peer: Speed | None = None
    ratio: float | None = None
    """Our samples per second over the peer's, the median of `ratios`."""
    ratios: tuple[float, ...] = ()
    """Of each round."""
    planned_milliseconds: float | None = None
    """What the planner says of ours; null where it does not know the card, or plans no such step."""


@dataclass(frozen=True)
class Report:
    """What was measured, where, and how fast it is."""

    stage: str
    model: str
    layers: dict[str, int]
    """Layers of each trained tower."""
    full_layers: dict[str, int]
    """Layers of each trained tower in the model."""
    teacher: str
    teacher_gflop: float
    """Operations of the teacher's forward pass for one image."""
    device: str
    bf16_peak_tflops: float | None
    """The denominator of MFU and HFU; null where none is known."""
    ranks: int
    precision: dict[str, Any]
    parallel: dict[str, Any]
    data: str
    steps: int
    """Steps of which the median is taken, after a few that are not measured."""
    peer: str | None
    peer_compiled: bool
    """Whether torch.compile has been over the peer's model, as on a GPU."""
    rounds: int
    """Turns of ours and the peer's, each in a process of its own."""
    versions: dict[str, str]
    rows: list[Line]


def bench_step(
    config: Config,
    *,
    layers: int | None,
    micro_batches: Sequence[int],
    steps: int,
    data: Literal["synthetic", "real"],
    peer: str | None,
    rounds: int,
    ranks: int,
) -> Report:
    """Measure a stage's step, and the peer's in turns with it.

    Args:
        config: the stage.
        layers: layers of the vision tower, see `reduced`; None for all.
        micro_batches: each makes a row, with a global batch of one micro-batch per data-parallel rank; if there are
            none, the batch of `config` is measured.
        steps: measured steps of each row.
        data: noise that is in memory, or the stage's training samples.
        peer: see `PEERS`; None for ours alone.
        rounds: turns with the peer; ours alone is measured once.
        ranks: processes of ours.

    Raises:
        ConfigError: the stage or the batch cannot be measured so.
        W2SError: a process failed, or the peer's towers are not ours.
    """
    if config.stage == "eval":
        raise ConfigError("w2s bench step measures training: use stage mim or clip, not eval")
    if is_rank():
        raise ConfigError("w2s bench step starts its ranks itself: use --nproc in the place of torchrun or srun")
    if config.parallel.cuda_graphs and len(micro_batches) > 1:
        raise ConfigError("--micro-batch takes one size with parallel.cuda_graphs=true: graphs are captured for one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = reduced(config, layers, folder)
        batches = [with_batch(small, size, ranks) for size in micro_batches] or [small]
        for each in batches:
            check(each, ranks, ranks)
            if peer:
                check_peer(each, peer, ranks)
        if data == "real" and config.data.builtin != "none":
            ensure_builtin(config.data)
        teachers = planned_teachers(small)
        job = Job(small, tuple(micro_batches), data, steps, folder / "measured.json")
        turns = [
            (measure(job, ranks), measure(replace(job, peer=True), 1) if peer else None)
            for _ in range(rounds if peer else 1)
        ]
    first, first_peer = turns[0]
    if first_peer is not None:
        check_equal(small, teachers, first, first_peer)
    return Report(
        stage=config.stage,
        model=config.model.name,
        layers=_layers(small),
        full_layers=_layers(config),
        teacher=" + ".join(each.name for each in config.stage_teachers) or "none",
        teacher_gflop=sample_flops(teachers) / 1e9,
        device=first.device,
        bf16_peak_tflops=bf16_peak(first.device),
        ranks=ranks,
        precision=asdict(small.precision),
        parallel=asdict(small.parallel),
        data=data,
        steps=steps,
        peer=peer,
        peer_compiled=first_peer is not None and first_peer.compiled,
        rounds=len(turns),
        versions={package: version(package) for package in PACKAGES},
        rows=[_line(each, teachers, index, turns, ranks) for index, each in enumerate(batches)],
    )


def check_equal(config: Config, teachers: Sequence[PlannedTeacher], ours: Measured, peer: Measured) -> None:
    """Refuse to compare towers that are not the same: parameters must be equal, and FLOPs of a forward pass to 1 %.

    Ours come from formulas, the peer's are counted while its model runs.

    Raises:
        W2SError: with both numbers.
    """
    image = student_flops(config, **predicted(config, teachers)) if teachers else image_flops(config)
    text = 0.0 if teachers else text_flops(config.model.text, config.model.embed_dim).forward
    # The peer embeds the patches too that it drops afterwards.
    dropped = config.model.vision.patches / (tokens_per_image(config) - config.model.vision.class_tokens) - 1
    flops = image.forward + dropped * image.embedding + text
    if ours.parameters != peer.parameters or abs(flops / peer.tower_flops - 1) > 0.01:
        raise W2SError(
            f"the peer's towers are not ours: {peer.parameters} parameters and {peer.tower_flops:.4g} FLOPs a forward "
            f"pass, ours have {ours.parameters} and {flops:.4g}"
        )


def _layers(config: Config) -> dict[str, int]:
    towers = {"vision": config.model.vision.layers}
    return towers if config.stage == "mim" else towers | {"text": config.model.text.layers}


def _line(
    config: Config,
    teachers: Sequence[PlannedTeacher],
    index: int,
    turns: Sequence[tuple[Measured, Measured | None]],
    ranks: int,
) -> Line:
    """The medians of a batch over all turns."""
    ours = [turn.rows[index] for turn, _ in turns]
    peers = [turn.rows[index] for _, turn in turns if turn is not None]
    pairs = zip(ours, peers, strict=False)
    ratios = [peer.milliseconds / our.milliseconds for our, peer in pairs if our.parts and peer.parts]
    device = turns[0][0].device
    alone = replace(config, parallel=ParallelConfig())
    return Line(
        micro_batch=config.train.micro_batch,
        global_batch=config.train.global_batch,
        ours=speed(config, teachers, device, _median(ours), ranks),
        peer=speed(alone, teachers, device, _median(peers), 1) if peers else None,
        ratio=median(ratios) if ratios else None,
        ratios=tuple(ratios),
        planned_milliseconds=planned_milliseconds(config, device, ranks),
    )


def planned_milliseconds(config: Config, device: str, ranks: int) -> float | None:
    """Return what the planner says of a step in the layout that is measured; None where it plans no such step."""
    card = card_of(device)
    if card is None:
        return None
    layout = {f"parallel.{each.name}" for each in fields(ParallelConfig)}
    try:
        (plan,) = find_plans(config, card, ranks, layout | {"train.micro_batch"}, top=0).fastest
    except W2SError:  # such as float32
        return None
    return 1e3 * plan.seconds


def _median(rows: Sequence[Row]) -> Row:
    """The row whose step takes the median time (of an even number, the lower one of the middle)."""
    return sorted(rows, key=lambda row: row.milliseconds)[(len(rows) - 1) // 2]
