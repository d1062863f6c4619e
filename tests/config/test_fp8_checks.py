"""FP8 that could not run, or would do nothing, is refused before a run starts, with the fix."""

import sys
from pathlib import Path

import pytest

from tests.config.refusals import accepts, refusal
from tests.config.test_layout_checks import BIG
from w2s.config import gpu
from w2s.config.checks import check
from w2s.config.gpu import Card
from w2s.config.load import load
from w2s.errors import ConfigError, MissingPackageError

HOPPER, AMPERE = Card("NVIDIA H100", (9, 0)), Card("NVIDIA A100", (8, 0))
ON_GPU = ["model=eva_18b", "hardware=h100", "data.lanes=64", "data.train=x", "mim.masked_patches=105"]
ON_GPU += ["train.global_batch=256", "train.micro_batch=16"]


def machine(monkeypatch: pytest.MonkeyPatch, card: Card | None, engine: bool) -> None:
    """Pretend a card and an installed Transformer Engine."""
    monkeypatch.setattr(gpu, "card", lambda: card)
    monkeypatch.setattr(gpu, "transformer_engine_installed", lambda: engine)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8 if card else 0)
    monkeypatch.setattr(gpu, "cuda_version", lambda: (13, 0) if card else None)


def test_recipes_run_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, HOPPER, True)
    for recipe in ("delayed", "tensorwise", "blockwise"):
        assert accepts("mim", *ON_GPU, f"precision.fp8={recipe}", ranks=8)
    assert accepts(
        "mim", *ON_GPU, "precision.fp8=delayed", "precision.fp8_history=64", "precision.fp8_margin=1", ranks=8
    )
    ends = ["precision.fp8_bf16_first=1", "precision.fp8_bf16_last=1", "precision.fp8_bf16_layers=[vision.7]"]
    assert accepts("mim", *ON_GPU, "precision.fp8=tensorwise", *ends, "precision.fp8_primary_weights=true", ranks=8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["precision.fp8=tensorwise", "precision.linear=local"],
            "precision.fp8=tensorwise needs Transformer Engine's linears, these are local (precision.linear=local): "
            "use precision.fp8=emulated for a rehearsal, or precision.fp8=none",
        ),
        (
            ["precision.fp8=tensorwise", "precision.compute=fp32"],
            "precision.fp8=tensorwise with precision.compute=fp32: use precision.compute=bf16",
        ),
        (
            ["precision.fp8=delayed", "precision.fp8_bf16_last=1"],
            "precision.fp8_bf16_last=1 with precision.fp8=delayed, whose one FP8 context spans all layers: "
            "use precision.fp8=tensorwise",
        ),
        (
            ["precision.fp8=delayed", "precision.fp8_bf16_layers=[vision.3]"],
            "precision.fp8_bf16_layers=[vision.3] with precision.fp8=delayed",
        ),
        (
            ["precision.fp8=tensorwise", "precision.fp8_bf16_layers=[vision.48]"],
            "precision.fp8_bf16_layers: there is no layer vision.48: did you mean vision.4",
        ),
        (
            ["precision.fp8=tensorwise", "precision.fp8_bf16_first=24", "precision.fp8_bf16_last=24"],
            "precision.fp8_bf16_first=24 and precision.fp8_bf16_last=24 leave no layer of 48 in FP8",
        ),
        (
            ["precision.fp8=tensorwise", "train.micro_batch=8"],
            "train.micro_batch=8 makes 8 x 257 tokens for 1 rank, precision.fp8=tensorwise needs a multiple of 16 on "
            "each: use train.micro_batch=16 or 32",
        ),
        (
            ["precision.fp8=tensorwise", "parallel.tensor=8", "parallel.sequence=true"],
            "train.micro_batch=16 makes 16 x 257 tokens for 8 ranks, precision.fp8=tensorwise needs a multiple of 16 "
            "on each: use train.micro_batch=128 or 256",
        ),
        (
            ["precision.fp8=blockwise", "parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=32"],
            "train.micro_batch=32 makes 32 x 257 tokens for 2 ranks, precision.fp8=blockwise needs a multiple of 128",
        ),
        (
            ["precision.fp8=tensorwise", "model.vision.mlp_width=25608"],
            "model.vision.mlp_width=25608 makes 25608 columns, FP8 needs a multiple of 16: use a multiple of 16",
        ),
        (
            ["precision.fp8=tensorwise", "parallel.tensor=8", "model.vision.mlp_width=25664"],
            "model.vision.mlp_width=25664 makes 3208 columns on each of parallel.tensor=8 ranks, FP8 needs a multiple "
            "of 16: use parallel.tensor=1, 2 or 4",
        ),
        (["precision.fp8_format=e4m3"], "precision.fp8_format=e4m3 does nothing with precision.fp8=none: leave it out"),
        (
            ["precision.fp8_primary_weights=true"],
            "precision.fp8_primary_weights=true does nothing with precision.fp8=none: leave it out",
        ),
        (
            ["precision.fp8_bf16_layers=[vision.0]"],
            "precision.fp8_bf16_layers=[vision.0] does nothing with precision.fp8=none",
        ),
        (
            ["precision.fp8=tensorwise", "precision.fp8_history=64"],
            "precision.fp8_history=64 does nothing with precision.fp8=tensorwise: leave it out, or use "
            "precision.fp8=delayed",
        ),
        (
            ["precision.fp8=emulated", "precision.linear=te"],
            "precision.fp8=emulated is made of local linears, not of precision.linear=te",
        ),
        (
            ["precision.fp8=emulated", "precision.fp8_primary_weights=true"],
            "precision.fp8_primary_weights=true needs Transformer Engine's tensors",
        ),
    ],
)
def test_what_cannot_run_on_hopper_is_refused(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    machine(monkeypatch, HOPPER, True)
    if "parallel.tensor=8" in overrides and "parallel.sequence=true" in overrides:
        overrides = [*overrides, "train.global_batch=256"]
    assert refusal("mim", *ON_GPU, *overrides, ranks=8).startswith(message)


def test_blocks_want_widths_of_128_under_sequence_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, HOPPER, True)
    options = ["precision.fp8=blockwise", "parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=256"]
    wide = ["model.vision.width=5120", "model.vision.heads=40"]
    narrow = ["model.vision.width=1088", "model.vision.heads=8"]
    assert accepts("mim", *ON_GPU, *options, *wide, ranks=2)
    assert refusal("mim", *ON_GPU, *options, *narrow, ranks=2).startswith(
        "model.vision.width=1088 with precision.fp8=blockwise and parallel.sequence=true must be a multiple of 128"
    )


def test_the_text_tower_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, HOPPER, True)
    options = [*ON_GPU, "precision.fp8=tensorwise", "train.micro_batch=8", "model.vision.patch_size=16"]
    # the image tower sees CLS and 15 of 196 patches: 8 x 16 tokens
    few = "clip.patch_dropout=0.92"
    assert accepts("clip", *options, few, "model.text.context_length=78", ranks=8)
    assert refusal("clip", *options, few, ranks=8).startswith("train.micro_batch=8 makes 8 x 77 tokens for 1 rank")


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, HOPPER, False)
    assert refusal("mim", *ON_GPU, "precision.fp8=tensorwise", ranks=8) == (
        "precision.fp8=tensorwise needs Transformer Engine's linears, these are local (Transformer Engine is not "
        "installed (pip install 'w2s[gpu]')): use precision.fp8=emulated for a rehearsal, or precision.fp8=none"
    )
    with pytest.raises(MissingPackageError, match=r"linear=te, but Transformer Engine is not installed: pip"):
        check(load("mim", [*ON_GPU, "precision.linear=te"]), 8, 8)


def test_blocks_want_a_new_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, HOPPER, True)
    monkeypatch.setattr(gpu, "cuda_version", lambda: (12, 8))
    blocks = [*ON_GPU, "precision.fp8=blockwise"]
    assert refusal("mim", *blocks, ranks=8) == (
        "precision.fp8=blockwise needs CUDA 12.9 or newer, torch has 12.8: use precision.fp8=tensorwise"
    )
    monkeypatch.setattr(gpu, "cuda_version", lambda: (12, 9))
    assert accepts("mim", *blocks, ranks=8)


def test_cards_that_are_no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, AMPERE, True)
    assert accepts("mim", *ON_GPU, "precision.linear=te", ranks=8)
    assert refusal("mim", *ON_GPU, "precision.linear=te", "precision.fp8=tensorwise", ranks=8).startswith(
        "precision.fp8=tensorwise needs Hopper or a newer card, this is NVIDIA A100"
    )


def test_a_card_without_fp8_rehearses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, AMPERE, True)
    rehearsal = [*ON_GPU, "precision.fp8=emulated"]
    assert refusal("mim", *rehearsal, ranks=8) == (
        "precision.fp8=emulated on NVIDIA A100, which has no FP8: use hardware=cpu for a rehearsal"
    )
    assert accepts("mim", *rehearsal, "hardware.device=cpu", ranks=8)


def test_a_cpu_rehearses_and_no_more() -> None:
    assert accepts("mim", *BIG, "train.micro_batch=16", "precision.fp8=emulated")
    assert refusal("mim", *BIG, "precision.linear=te") == (
        "precision.linear=te with hardware.device=cpu: Transformer Engine runs on NVIDIA GPUs alone, "
        "use precision.linear=auto"
    )
    assert "precision.fp8=emulated for a rehearsal" in refusal("mim", *BIG, "precision.fp8=delayed")
    assert refusal("mim", *BIG, "train.micro_batch=8", "precision.fp8=emulated").startswith(
        "train.micro_batch=8 makes 8 x 257 tokens for 1 rank"
    ), "what a GPU would refuse"


def test_recipes_by_a_wrong_name() -> None:
    for name, message in {
        "mxfp8": "mxfp8 needs Blackwell's tensor cores, Hopper has none: use tensorwise",
        "nvfp4": "nvfp4 needs Blackwell's tensor cores, Hopper has none: use tensorwise",
        "tensorvise": "did you mean tensorwise?",
        "block": "did you mean blockwise?",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load("mim", [f"precision.fp8={name}"])
        assert str(caught.value) == (
            f"precision.fp8={name} is not one of none, delayed, tensorwise, blockwise, emulated: {message}"
        )


def test_looking_for_transformer_engine_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu.transformer_engine_installed()
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gpu.transformer_engine_installed() and "transformer_engine" not in sys.modules
