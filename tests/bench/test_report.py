"""`w2s bench step` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.stages.shape_images import write_shapes
from w2s import cli
from w2s.bench.report import Line, Report, planned_milliseconds
from w2s.bench.speed import Speed
from w2s.bench.step import with_batch
from w2s.bench.table import print_report
from w2s.config.load import load

BF16 = ("precision.compute=bf16", "teacher.precision=bf16", "hardware.device=cuda")
TINY = ("model=tiny", "hardware=cpu", "teacher.source=timm:test_vit", "teacher.image_size=64")


class Command:
    """Runs the command in this process, its ranks in others: exit code, standard output, standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr("sys.argv", ["w2s", "bench", "step", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = self.capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err


@pytest.fixture
def bench_step(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Command(monkeypatch, capfd)


def test_a_step_is_planned_as_it_is_measured() -> None:
    config = load("mim", ["model=eva_18b", "teacher=eva02_clip_e_plus", "model.vision.layers=4", *BF16])
    config = with_batch(config, 16, 1)
    found = planned_milliseconds(config, "NVIDIA H100 80GB HBM3", 1)
    # 16 images of the 4 layers alone at half of the peak would take as long as this.
    flops = 3 * 16 * 4 * 257 * 2 * (4 * 5120**2 + 2 * 5120 * 25600)
    assert found is not None and flops / (0.5 * 989e12) < found / 1e3 < 5 * flops / (0.5 * 989e12)
    assert planned_milliseconds(config, "cpu", 1) is None
    assert planned_milliseconds(load("mim", ["model=tiny"]), "NVIDIA H100 80GB HBM3", 1) is None, "float32"


@pytest.mark.slow
def test_one_json_document_with_the_peer_beside_ours(bench_step: Command, tmp_path: Path) -> None:
    shards = write_shapes(tmp_path / "shapes", shards=2, seed=0)
    data = (f"data.train={shards}", "data.builtin=none", "data.lanes=2", "--data", "real")
    sizes = ("--layers", "1", "--micro-batch", "4", "--micro-batch", "8", "--steps", "2", "--rounds", "1")
    code, out, error = bench_step("mim", *TINY, *data, *sizes, "--vs", "timm", "--json")
    assert (code, "error" in error) == (0, False), error
    report = json.loads(out)
    assert (report["layers"], report["full_layers"]) == ({"vision": 1}, {"vision": 2})
    assert (report["device"], report["bf16_peak_tflops"], report["teacher_gflop"] > 0) == ("cpu", None, True)
    assert [row["global_batch"] for row in report["rows"]] == [4, 8]
    for row in report["rows"]:
        ours, peer = row["ours"], row["peer"]
        for side in (ours, peer):
            assert sum(side["parts"].values()) == pytest.approx(side["milliseconds"])
            assert side["parts"]["data"] > 0.01  # real samples are decoded: noise takes a microsecond
            assert side["samples_per_second"] == pytest.approx(1e3 * row["global_batch"] / side["milliseconds"])
            assert side["mfu"] is None
        assert row["ratio"] == pytest.approx(ours["samples_per_second"] / peer["samples_per_second"])
        assert ours["model_tflops"] / peer["model_tflops"] == pytest.approx(row["ratio"])


@pytest.mark.slow
def test_two_ranks_that_split_the_towers(bench_step: Command) -> None:
    layout = ("--nproc", "2", "parallel.tensor=2", "clip.two_pass=always", "--micro-batch", "4", "--steps", "2")
    code, out, error = bench_step("clip", *TINY, *layout, "--json")
    assert code == 0, error
    report = json.loads(out)
    (row,) = report["rows"]
    assert (report["ranks"], row["global_batch"], row["peer"], row["ratio"]) == (2, 4, None, None)
    assert row["ours"]["parts"]["communication"] > 0
    # Both towers go forward twice: 4 passes' worth for 3.
    assert row["ours"]["hardware_tflops"] / row["ours"]["model_tflops"] == pytest.approx(4 / 3, rel=0.05)


@pytest.mark.gpu
def test_shares_of_a_gpus_peak_beside_the_compiled_peer(bench_step: Command) -> None:
    overrides = ("model=eva_s", "hardware.device=cuda", "precision.compute=bf16", "teacher.source=timm:test_vit")
    sizes = ("--layers", "2", "--micro-batch", "16", "--steps", "3", "--rounds", "1")
    code, out, error = bench_step("mim", *overrides, "teacher.image_size=64", *sizes, "--vs", "timm", "--json")
    assert code == 0, error
    report = json.loads(out)
    (row,) = report["rows"]
    for side in (row["ours"], row["peer"]):
        assert sum(side["parts"].values()) == pytest.approx(side["milliseconds"])
        assert 0 < side["memory_gib"] < 10  # the weights of two small layers and 16 images: far from a card's memory
        if report["bf16_peak_tflops"]:
            assert 0 < side["mfu"] <= side["hfu"] < side["towers_mfu"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval",), "w2s bench step measures training: use stage mim or clip, not eval"),
        (("mim", "--vs", "open_clip"), "--vs open_clip does not run stage mim: use --vs timm"),
        (("mim", "--layers", "3"), "--layers 3: the vision tower has 2 layers, use at most as many"),
        (("mim", "--nproc", "2", "--micro-batch", "3", "parallel.pipeline=2"), "is not divisible by 2 ranks"),
        (("mim", "train.micro_batchs=3"), "unknown key train.micro_batchs"),
        (("mim", "--data", "none"), "Invalid value for '--data'"),
    ],
)
def test_mistakes(bench_step: Command, arguments: tuple[str, ...], message: str) -> None:
    stage, *rest = arguments
    code, out, error = bench_step(stage, *(TINY if stage != "eval" else ()), *rest)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error


def test_it_is_no_rank_of_torchrun(bench_step: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = bench_step("mim", *TINY)
    assert (code, "use --nproc in the place of torchrun or srun" in error) == (2, True)


def speed(milliseconds: float, mfu: float | None) -> Speed:
    parts = {"forward": milliseconds / 4, "backward": milliseconds / 2, "rest": milliseconds / 4}
    return Speed(milliseconds, 64e3 / milliseconds, 500.0, 510.0, 550.0, mfu, mfu, mfu, 61.5, parts)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Line(64, 64, speed(800, 0.5056), speed(1200, 0.3), 1.5, (1.5,)), Line(128, 128, None, None)]
    report = Report(
        "mim", "eva_18b", {"vision": 4}, {"vision": 48}, "teacher", 2264.0, "NVIDIA H100 80GB HBM3", 989.0, 1, {}, {},
        "synthetic", 10, "timm", True, 1, {}, rows,
    )  # fmt: skip
    print_report(report)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "eva_18b mim: 4 of 48 vision layers, synthetic data, 1 x NVIDIA H100 80GB HBM3"
    assert "ms 800 1200" in lines
    assert "samples/s, ratio 1.5" in lines
    assert "MFU % 50.56 30" in lines
    assert "ms: backward 400 600" in lines
    assert "w2s 128: out of timm 128: out of" in lines
