"""What a backend tells Megatron, and what a checkpoint keeps of the scales of one backend for another."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed import run_ranks
from tests.megatron.spawn import SHAPE, TARGET_WIDTH
from w2s.config.sections import OptimConfig, ParallelConfig, PrecisionConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.checkpoint import state
from w2s.megatron.fp8 import transformer_engine
from w2s.megatron.fp8.fp8_formats import sampled
from w2s.megatron.fp8.fp8_stats import Fp8Stats, fp8_metrics
from w2s.megatron.fp8.linears import Linears, without_fp8
from w2s.megatron.fp8.whole_linears import ColumnLinear, RowLinear
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.model.tower import transformer_config
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.optimizer import Optimizer
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower, data_parallel, shard
from w2s.towers.initial import vision_rule
from w2s.towers.masked_student import MaskedStudent
from w2s.towers.vision import vision_stack

EMULATED = PrecisionConfig(fp8="emulated")


def student(parallel: ParallelConfig, linears: Linears) -> ShardedTower[MaskedStudent]:
    def chunk(number: int) -> MaskedStudent:
        made = MaskedStudent(SHAPE, [Target(TARGET_WIDTH)], parallel, torch.float32, number, linears)
        init_parameters(made, vision_rule(SHAPE, post_norm=0.5), seed=1)
        return made

    return data_parallel(shard(chunk, parallel, torch.device("cpu")), parallel, linears.precision)


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        (PrecisionConfig(), {"fp8": None}),
        (PrecisionConfig(fp8="tensorwise"), {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": False}),
        (PrecisionConfig(fp8="blockwise"), {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
        (
            PrecisionConfig(fp8="tensorwise", fp8_format="e4m3", fp8_primary_weights=True),
            {"fp8": "e4m3", "fp8_param": True},
        ),
        (
            PrecisionConfig(fp8="delayed", fp8_history=64, fp8_margin=2),
            {
                "fp8": "hybrid",
                "fp8_recipe": "delayed",
                "fp8_amax_history_len": 64,
                "fp8_amax_compute_algo": "max",
                "fp8_margin": 2,
            },
        ),
    ],
)
def test_megatron_is_told_the_recipe(alone: Ranks, precision: PrecisionConfig, settings: dict[str, Any]) -> None:
    stack, parallel = vision_stack(SHAPE, 1, ParallelConfig()), ParallelConfig()
    config = transformer_config(stack, parallel, torch.bfloat16, Linears("te", precision))
    assert {name: getattr(config, name) for name in settings} == settings
    # Transformer Engine makes its weights on the GPU, where FP8 ones can be; local ones come from the CPU.
    assert not config.use_cpu_initialization
    local = transformer_config(stack, parallel, torch.bfloat16, Linears("local", EMULATED))
    assert local.use_cpu_initialization and local.fp8 is None


def test_the_layers_of_each_kind(alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = Linears("local", EMULATED, frozenset({1}))
    assert (emulated.column(1), emulated.row(1)) == (ColumnLinear, RowLinear)
    assert emulated.column(0).__name__ == "Fp8ColumnParallelLinear"
    asked: list[bool] = []
    monkeypatch.setattr(transformer_engine, "column_linear", lambda bf16: asked.append(bf16) or ColumnParallelLinear)
    te = Linears("te", PrecisionConfig(fp8="tensorwise"), frozenset({1}))
    assert te.column(0) is te.column(1) is ColumnParallelLinear
    assert asked == [False, True]


def test_without_fp8_is_undone(alone: Ranks) -> None:
    (part,) = student(ParallelConfig(), Linears("local", EMULATED)).chunks
    part.config.fp8 = "hybrid"
    with without_fp8([part]):
        assert (part.blocks.config.fp8, part.blocks.layers[0].mlp.linear_fc1.training) == (None, False)
    assert (part.blocks.config.fp8, part.blocks.layers[0].mlp.linear_fc1.training) == ("hybrid", True)


def test_every_backend_has_the_same_parameters(alone: Ranks) -> None:
    shapes = [
        {name: value.shape for name, value in student(ParallelConfig(), linears).chunks[0].named_parameters()}
        for linears in (Linears(), Linears("local", EMULATED))
    ]
    assert shapes[0] == shapes[1]


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let local linears keep scales as Transformer Engine's do: nothing before their first pass, then a pickle."""

    def get(self: nn.Module) -> Tensor:
        return getattr(self, "history", torch.empty(0, dtype=torch.uint8))

    def set_(self: nn.Module, history: Tensor | None) -> None:
        if history is not None and len(history):
            self.history = history

    for linear in (ColumnParallelLinear, RowParallelLinear):
        monkeypatch.setattr(linear, "get_extra_state", get)
        monkeypatch.setattr(linear, "set_extra_state", set_)


def linears_in(tower: ShardedTower[MaskedStudent]) -> list[Any]:
    kinds = ColumnParallelLinear | RowParallelLinear
    return [module for module in tower.chunks[0].modules() if isinstance(module, kinds)]


def save_student(folder: Path, scale: int | None) -> ShardedTower[MaskedStudent]:
    folder.mkdir()
    tower = student(ParallelConfig(), Linears())
    optimizer = Optimizer({"vision": tower}, OptimConfig(), torch.float32)
    optimizer.prepare_to_load()
    for linear in linears_in(tower) if scale is not None else ():
        linear.history = torch.frombuffer(bytearray(pickle.dumps([scale] * 4)), dtype=torch.uint8)
    state.save(folder, {"vision": tower}, optimizer, {}).finish()
    return tower


def load_student(folder: Path) -> ShardedTower[MaskedStudent]:
    tower = student(ParallelConfig(), Linears())
    optimizer = Optimizer({"vision": tower}, OptimConfig(), torch.float32)
    state.load(folder, {"vision": tower}, optimizer, step=1)
    return tower


def test_scales_come_back_in_the_run_that_kept_them(alone: Ranks, scales: None, tmp_path: Path) -> None:
    save_student(tmp_path / "kept", scale=7)
    histories = [pickle.loads(bytes(linear.history)) for linear in linears_in(load_student(tmp_path / "kept"))]
    assert histories == [[7, 7, 7, 7]] * 8  # four linears in each of two layers


def test_scales_are_neither_asked_for_nor_handed_over(
    alone: Ranks, scales: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, bare = save_student(tmp_path / "kept", scale=7), save_student(tmp_path / "bare", scale=None)
    assert not any("_extra_state" in name for name in stored_names(tmp_path / "bare"))
    assert sum("_extra_state" in name for name in stored_names(tmp_path / "kept")) == 8
    assert not [linear for linear in linears_in(load_student(tmp_path / "bare")) if hasattr(linear, "history")]
    # the next stage takes the weights alone
    heir = student(ParallelConfig(), Linears())
    names = state.saved_shapes(tmp_path / "kept")
    assert not any("_extra_state" in name for name in names)
    state.load_weights(tmp_path / "kept", {"vision": heir}, names)
    assert not [linear for linear in linears_in(heir) if hasattr(linear, "history")]
    # linears that know no scales read both
    monkeypatch.undo()
    for folder, written in (("kept", kept), ("bare", bare)):
        read = load_student(tmp_path / folder)
        for name, value in written.chunks[0].named_parameters():
            assert torch.equal(dict(read.chunks[0].named_parameters())[name], value)


def stored_names(folder: Path) -> list[str]:
    return list(FileSystemReader(str(folder)).read_metadata().state_dict_metadata)


def watched(parallel: ParallelConfig, more: int = 0) -> dict[str, float]:
    """What the watch of a student's first pass says, with `more` micro-batches after it."""
    with process_groups.initialize_groups(parallel, torch.device("cpu")) as ranks:
        tower = student(parallel, Linears("local", EMULATED))
        (part,) = tower.chunks
        generator = torch.Generator().manual_seed(0)
        micro_batches = torch.randn(1 + more, 16, 3, SHAPE.image_size, SHAPE.image_size, generator=generator)
        images = micro_batches[0]
        masks = torch.zeros(16, SHAPE.patches, dtype=torch.bool)
        masks[:, ::3] = True
        everywhere = torch.arange(SHAPE.patches).expand(16, -1)
        watch = Fp8Stats({"vision": tower})
        with watch.recording():
            for images in micro_batches:
                predictions, *_ = part(images, masks, everywhere)
                (predictions * torch.exp(torch.arange(16.0) - 8)[:, None, None]).square().sum().backward()
        part(images, masks, everywhere)  # nobody looks
        found = fp8_metrics(ranks.gather(watch.read()))
        assert not watch.read(), "a reading begins anew"
        return found


def test_the_watch_says_the_same_in_every_layout() -> None:
    (whole,) = run_ranks(watched, 1, ParallelConfig())
    assert 0 < whole["fp8_underflow"] < 1 and len(whole) == 2 + 2 * 3 * 3
    for sequence in (False, True):
        for split in run_ranks(watched, 2, ParallelConfig(tensor=2, sequence=sequence)):
            # amax: float32 sums in another order; shares: some of 272 x 32 values and more lie at the edge.
            assert split == pytest.approx(whole, rel=1e-4, abs=1e-4)


def test_the_watch_looks_at_the_first_micro_batch() -> None:
    (first,), (several,) = (run_ranks(watched, 1, ParallelConfig(), more) for more in (0, 2))
    # The first forward pass is the same; a drawn batch is not.
    assert several == first


def test_the_watch_looks_at_a_sixteenth_of_a_large_matrix() -> None:
    rows = torch.arange(40 * 128 + 7)[:, None].expand(-1, 3)
    blocks = sampled(rows)[:, 0].unflatten(0, (-1, 128))
    assert blocks[:, 0].tolist() == [0, 16 * 128, 32 * 128]
    assert torch.equal(blocks - blocks[:, :1], torch.arange(128).expand(3, -1))
    assert len(sampled(rows[:2048])) == 2048
