"""The planner beside training runs that others have published (`published.yaml`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import yaml
from rich.console import Console

from w2s.config.load import load
from w2s.config.sections import Config
from w2s.planning.memory.planned_stage import PlannedStage
from w2s.planning.model.flops import TowerFlops
from w2s.planning.model.towers import PlannedTower, planned_towers
from w2s.planning.time.cards import Card, card
from w2s.planning.time.duration import StepModel
from w2s.tracking.tables import Cell, Table

_COMMON = ("precision.compute=bf16", "eval.shards=", "eval.knn_shards=", "data.builtin=none")


@dataclass(frozen=True)
class Row:
    """A run, as it was measured and as it is planned."""

    name: str
    source: str
    gpus: int
    card: str
    width: int
    """Of its widest tower."""
    fitted: bool
    """Whether it was used to choose estimates."""
    unit: str
    """`mfu` in per cent of the dense BF16 peak, `tokens` or `samples` a second of a GPU."""
    published: float
    planned: float

    @property
    def ratio(self) -> float:
        """What is planned over what is published: above 1 the planner is too kind."""
        return self.planned / self.published


def rows() -> list[Row]:
    """Plan all runs."""
    content: dict[str, Any] = yaml.safe_load((files("w2s.planning") / "published.yaml").read_text(encoding="utf-8"))
    return [
        Row(
            case["name"],
            case["source"],
            case["gpus"],
            case["card"],
            case["width"] if kind == "language" else case["vision"][1],
            case["fitted"],
            case["unit"],
            case["value"],
            plan(case),
        )
        for kind, plan in (("language", _language), ("clip", _clip))
        for case in content[kind]
    ]


def _language(case: Mapping[str, Any]) -> float:
    """A language model: causal attention computes half of the scores, and a head gives logits of all tokens."""
    layers, width, tokens = case["layers"], case["width"], case["tokens"]
    flops = TowerFlops(
        embedding=0,
        linears=layers * 2 * tokens * (4 * width**2 + 2 * width * case["mlp"]),
        attention=layers * 4 * tokens**2 * width / 2,
        head=2 * tokens * width * case["vocabulary"],
    )
    # Tensor-parallel ranks share the logits; Megatron's utilisation counts all scores, as if none were masked.
    shared = replace(flops, head=flops.head / case.get("tensor", 1))
    counted = replace(flops, attention=2 * flops.attention)
    pipeline, virtual = case.get("pipeline", 1), case.get("virtual", 1)
    stages = pipeline * virtual
    split = tuple(layers // stages + (stage < layers % stages) for stage in range(stages))
    tower = PlannedTower(
        name="text",
        width=width,
        heads=case["heads"],
        mlp_width=case["mlp"],
        tokens=tokens,
        sequence=tokens,
        post_norm=False,
        norm_vectors=1,
        qkv_bias="none",
        split=split,
        own_first=(case["vocabulary"] * width,),
        own_last=(),
        first=(),
        last=(width, case["vocabulary"] * width),
        logit_parameters=0,
        embedding_elements=0,
        normed_tokens=tokens,
        head_tokens=tokens,
        head_width=case["vocabulary"],
        flops=shared,
    )
    config = _config("mim", case)
    seconds = _seconds(config, _card(case), [tower], case["gpus"])
    samples = case["batch"] / seconds / case["gpus"]
    if case["unit"] == "mfu":
        return float(100 * samples * counted.model / (card(case["card"]).bf16_tflops * 1e12))
    return float(samples * tokens)


def _clip(case: Mapping[str, Any]) -> float:
    """A CLIP in one pass: the loss of each rank is over the features of all."""
    names = ("layers", "width", "heads", "mlp_width")
    towers = {
        f"model.{tower}.{name}={value}"
        for tower in ("vision", "text")
        for name, value in zip(names, case[tower], strict=True)
    }
    images = ("model.vision.image_size=224", "model.vision.patch_size=14", "model.text.context_length=77")
    config = _config("clip", case, *towers, *images, f"model.embed_dim={case['embed']}", "clip.patch_dropout=0")
    seconds = _seconds(config, _card(case), planned_towers(config), case["gpus"])
    return float(case["batch"] / seconds / case["gpus"])


def _card(case: Mapping[str, Any]) -> Card:
    kind, clock = card(case["card"]), case.get("clock", 1.0)
    slower = {"bf16_gemm": clock * kind.bf16_gemm, "fp8_gemm": clock * kind.fp8_gemm}
    return replace(kind, hbm_tbs=case.get("hbm_tbs", kind.hbm_tbs), **slower)


def _config(stage: str, case: Mapping[str, Any], *overrides: str) -> Config:
    tensor, pipeline = case.get("tensor", 1), case.get("pipeline", 1)
    replicas = case["gpus"] // (tensor * pipeline)
    layout = [
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual_pipeline={case.get('virtual', 1)}",
        f"parallel.recompute={case.get('recompute', 'none')}",
        f"parallel.recompute_layers={case.get('recompute_layers', 0)}",
        f"train.global_batch={case['batch']}",
        f"train.micro_batch={case.get('micro', case['batch'] // replicas)}",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
        *(["parallel.sequence=true"] if tensor > 1 else []),
        *(["precision.fp8=tensorwise"] if case.get("fp8") else []),
    ]
    return load(stage, [*_COMMON, *layout, *overrides])


def _seconds(config: Config, kind: Card, towers: Sequence[PlannedTower], gpus: int) -> float:
    stage = PlannedStage(config, gpus, towers, ())
    return StepModel(stage, kind, stage.states(0)).time().total


def print_rows(as_json: bool) -> None:
    """Print all runs, as a table or as JSON."""
    cases = rows()
    if as_json:
        print(json.dumps([{**asdict(row), "ratio": row.ratio} for row in cases], indent=2))
        return
    columns = ["run", "GPUs", "width", "unit", "theirs", "ours", "ratio", ""]
    cells: list[list[Cell]] = [
        [
            row.name,
            f"{row.gpus} {row.card}",
            row.width,
            row.unit,
            f"{row.published:.4g}",
            f"{row.planned:.4g}",
            round(row.ratio, 2),
            "fitted" if row.fitted else "checked",
        ]
        for row in cases
    ]
    console = Console(highlight=False)
    console.print(Table("runs that others have published, and what the planner says", columns, cells).to_rich())
    console.print("sources: w2s/planning/published.yaml; fitted runs have chosen the planner's estimates")
