"""The moving average of the weights: the same as a plain one in every layout, and resharded to the bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.megatron.pieces import Pieces, axis_of, join_pieces
from tests.stages.conftest import Material
from tests.stages.layout_steps import STAGES
from tests.stages.test_layouts import FULLY, LAYOUTS, PIPELINE, TENSOR
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.stream.stream import Stream
from w2s.megatron.checkpoint import state
from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import unsharded
from w2s.optim.lr_schedule import lr_factor

STEPS, SKIPPED = 50, (7, 16)
DECAY = 0.6
"""Reached after 14 updates: the warm-up and what comes after it both count, and have a step that is skipped each."""
TOLERANCE = 1e-6
"""Of weights of at most 1 beside float64: each update rounds to 6e-8, and the decay forgets what was rounded before."""
QUICK = [(2, "data", 20)]
"""Ranks, layout and steps where minutes count."""


def pieces(stage: Any) -> Pieces:
    """Copies of the weights that this rank's towers hold."""
    with unsharded(stage.towers.values()):
        return {
            f"{name}.{global_name(part, key)}": (parameter.detach().clone(), axis_of(parameter))
            for name, tower in stage.towers.items()
            for part in tower.chunks
            for key, parameter in part.named_parameters()
        }


def build(config: Config, ranks: Ranks) -> tuple[Any, Stream]:
    stage: Any = STAGES[config.stage](config, ranks)
    sizes = {
        "global_batch": config.train.global_batch,
        "seed": 0,
        "rank": ranks.data_reader_rank,
        "size": ranks.world_size,
    }
    return stage, Stream(config.data, stage.spec, **sizes)


def train(stage: Any, stream: Stream, step: int) -> None:
    stage.optimizer.zero_grad()
    stage.step(stream.next())
    bad = torch.tensor(torch.nan) if step in SKIPPED else None
    stage.optimizer.step(lr_factor(step, stage.config.train.steps, stage.config.optim), bad)
    stage.optimizer.gather_weights()


def distances(configs: list[Config], steps: int) -> list[float]:
    """How far the average is from a plain one in float64, for each layout: of this rank's weights the largest."""
    found = []
    for config in configs:
        with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
            stage, stream = build(config, ranks)
            plain = {name: weight.double() for name, (weight, _) in pieces(stage).items()}
            for step in range(steps):
                train(stage, stream, step)
                if step in SKIPPED:
                    continue
                updates = 1 + step - sum(skipped < step for skipped in SKIPPED)
                decay = min(DECAY, (1 + updates) / (10 + updates))
                for name, (weight, _) in pieces(stage).items():
                    plain[name] = decay * plain[name] + (1 - decay) * weight.double()
            last = pieces(stage)
            with stage.optimizer.averaged():
                averaged = pieces(stage)
            assert all(torch.equal(weight, last[name][0]) for name, (weight, _) in pieces(stage).items())
            assert any(not torch.equal(weight, last[name][0]) for name, (weight, _) in averaged.items())
            found.append(max(float((averaged[name][0] - plain[name]).abs().max()) for name in plain))
    return found


def trained(config: Config, measured: bool) -> Pieces:
    """The weights after four steps, after the second of which the average was measured or not."""
    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        stage, stream = build(config, ranks)
        for step in range(4):
            train(stage, stream, step)
            if measured and step == 1:
                with stage.optimizer.averaged():
                    assert stage.evaluate()
        return pieces(stage)


def both_ways(configs: list[Config]) -> list[tuple[Pieces, Pieces]]:
    return [(trained(config, measured=True), trained(config, measured=False)) for config in configs]


@pytest.fixture(scope="module")
def common(material: Material) -> list[str]:
    data = ["data.builtin=none", f"data.train={material.train}", "data.workers=0", "eval.shards=", "eval.knn_shards="]
    teacher = [f"teacher.source=timm:test_vit@{material.teacher}", "teacher.image_size=64"]
    optim = [f"train.steps={STEPS}", "train.global_batch=16", "optim.warmup=1", "optim.lr=1e-2", f"optim.ema={DECAY}"]
    return ["model=tiny", "hardware=cpu", *data, *teacher, *optim]


VARIANTS = {"mim": ["init.vision=none"], "clip": ["init.vision=none", "optim.name=lamb", "clip.logit_scale_max=15"]}


def layouts(stage: str, common: list[str], world_size: int, names: Sequence[str]) -> list[Config]:
    options = [*common, *VARIANTS[stage], "model.vision.layers=4", "model.text.layers=4"]
    return [load(stage, [*options, "train.micro_batch=16", *LAYOUTS[world_size][name]]) for name in names]


@pytest.mark.parametrize(("world_size", "layout", "steps"), QUICK)
def test_it_is_a_plain_average_in_float64(common: list[str], world_size: int, layout: str, steps: int) -> None:
    for found in run_ranks(distances, world_size, layouts("mim", common, world_size, [layout]), steps):
        assert max(found) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", VARIANTS)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_it_is_a_plain_average_in_every_layout(common: list[str], stage: str, world_size: int) -> None:
    names = list(LAYOUTS[world_size])
    for found in run_ranks(distances, world_size, layouts(stage, common, world_size, names), STEPS):
        assert max(found) < TOLERANCE, dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, ["data, overlapped", "fully sharded"]),
        pytest.param(4, ["tensor, pipeline", "virtual pipeline, data"], marks=pytest.mark.slow),
    ],
)
def test_training_continues_after_a_measurement_as_without_it(
    common: list[str], material: Material, world_size: int, names: list[str]
) -> None:
    tests = [f"eval.shards={material.test}", "eval.batch_size=24"]
    found = run_ranks(both_ways, world_size, layouts("mim", [*common, *tests], world_size, names))
    for case in zip(*found, strict=True):
        assert_equal(*(join_pieces(each) for each in zip(*case, strict=True)))


def begin(config: Config, folder: Path, background: bool) -> Pieces:
    """Train for three steps, save, train on while it is written; the average as it was when it was saved."""
    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        stage, stream = build(config, ranks)
        for step in range(3):
            train(stage, stream, step)
        with stage.optimizer.averaged():
            average = pieces(stage)
        writing = state.save(folder, stage.towers, stage.optimizer, stage.extra_state(), background)
        train(stage, stream, 3)
        writing.finish()
        return average


def hand_on(config: Config, before: Path, after: Path) -> tuple[Pieces, Pieces]:
    """Load and save; the average that was loaded, and that which is loaded as weights."""
    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        stage, _ = build(config, ranks)
        stage.load_extra_state(state.load(before, stage.towers, stage.optimizer, step=3))
        state.save(after, stage.towers, stage.optimizer, stage.extra_state()).finish()
        with stage.optimizer.averaged():
            average = pieces(stage)
        state.load_weights(before, stage.towers, state.tower_shapes(stage.towers), "ema")
        return average, pieces(stage)


@pytest.mark.parametrize(
    ("background", "compute"),
    [
        (True, "fp32"),
        pytest.param(False, "fp32", marks=pytest.mark.slow),
        pytest.param(True, "bf16", marks=pytest.mark.slow),
    ],
)
def test_it_is_resharded_to_the_bit(common: list[str], tmp_path: Path, background: bool, compute: str) -> None:
    chain: list[tuple[int, list[str]]] = [(2, []), (2, [FULLY]), (1, [])]
    folders = [tmp_path / str(index) for index in range(1 + len(chain))]
    for folder in folders:
        folder.mkdir()
    options = [*common, "train.micro_batch=4", "init.vision=none", f"precision.compute={compute}"]
    first = load("mim", [*options, TENSOR, PIPELINE])
    saved = join_pieces(run_ranks(begin, 4, first, folders[0], background))
    for index, (world_size, layout) in enumerate(chain):
        config = load("mim", [*options, *layout])
        both = run_ranks(hand_on, world_size, config, folders[index], folders[index + 1])
        for everyone in zip(*both, strict=True):
            assert_equal(join_pieces(everyone), saved)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
