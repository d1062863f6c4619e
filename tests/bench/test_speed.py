import pytest

from w2s.bench.speed import bf16_peak, speed
from w2s.bench.step import Row
from w2s.config.load import load
from w2s.planning.model.teacher import PlannedTeacher

TEACHER = 2.264e12
"""FLOPs of EVA02-CLIP-E+'s forward pass."""


def measured(device: str, parts: dict[str, float]) -> tuple[list[PlannedTeacher], str, Row]:
    row = Row(16, 16, parts, memory_gib=60.0)
    return [PlannedTeacher(1024, 1792, 1024, image_size=224, weights=0, working=0, flops=TEACHER)], device, row


def test_eva_18b_at_half_of_an_h100() -> None:
    """29.63 TFLOP an image are 16.7 images a second at 50 % of 989 TFLOP/s."""
    config = load("mim", ["model=eva_18b", "train.global_batch=16", "train.micro_batch=16"])
    seconds = 16 / 16.7
    parts = {"teacher": 80.0, "forward": 300.0, "backward": 500.0, "rest": 1e3 * seconds - 880}
    found = speed(config, *measured("NVIDIA H100 80GB HBM3", parts), world_size=1)
    assert found is not None
    assert found.samples_per_second == pytest.approx(16.7)
    assert found.mfu == pytest.approx(0.50, rel=0.005)
    assert found.model_tflops == pytest.approx(16.7 * 29.63, rel=0.005)
    # The student alone: 27.36 TFLOP an image in the 800 ms of its passes.
    assert found.towers_tflops == pytest.approx(16 * 27.36 / 0.8, rel=0.005)
    assert found.towers_mfu == pytest.approx(found.towers_tflops / 989)
    # Flash attention computes the scores again, 0.7 % of a forward pass and less: nothing else is computed twice.
    assert found.hardware_tflops / found.model_tflops == pytest.approx(1.001, abs=0.001)


def test_recomputed_layers_count_as_hardware_only() -> None:
    config = load("mim", ["model=eva_18b", "train.global_batch=16", "parallel.recompute=full"])
    found = speed(config, *measured("NVIDIA H100 80GB HBM3", {"forward": 1.0, "backward": 1.0}), world_size=1)
    assert found is not None
    assert found.hfu == pytest.approx(found.hardware_tflops / 989)
    assert found.hardware_tflops / found.model_tflops == pytest.approx(1.31, abs=0.005)


def test_a_rank_has_its_share_of_the_flops() -> None:
    config, parts = load("mim", ["model=eva_18b", "train.global_batch=16"]), {"forward": 1.0, "backward": 1.0}
    one, four = (speed(config, *measured("cpu", parts), world_size=size) for size in (1, 4))
    assert one is not None
    assert four is not None
    assert four.samples_per_second == one.samples_per_second
    assert four.model_tflops == pytest.approx(one.model_tflops / 4)
    assert (one.mfu, one.hfu, one.towers_mfu) == (None, None, None)


def test_a_step_that_did_not_fit_has_no_speed() -> None:
    assert speed(load("mim", ["model=eva_18b"]), *measured("NVIDIA H100 80GB HBM3", {}), world_size=1) is None


def test_peaks_are_those_of_sxm_cards() -> None:
    assert bf16_peak("NVIDIA H100 80GB HBM3") == bf16_peak("NVIDIA H200") == 989
    assert bf16_peak("NVIDIA A100-SXM4-40GB") == 312
    assert bf16_peak("NVIDIA H100 PCIe") is None
    assert bf16_peak("cpu") is None
