"""README.md of an exported folder: what a model is, where it comes from, and how to load it.

Its text is in card.md.jinja. The hub reads its front matter.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from w2s.checkpoint.export.formats.base import Export, Guide
from w2s.checkpoint.export.lineage import (
    Ancestor,
    Measurement,
    data_licences,
    lineage,
    measurements,
    samples_seen,
    sha256,
)
from w2s.config.sections import Weights
from w2s.tracking.tables import Cell, Table

_METRICS = {"top1": "accuracy", "recall": "recall", "mean_average_precision": "mean_average_precision"}
"""The hub's names of metrics by parts of ours."""
_DIGITS = 12
"""Digits of a digest that are shown in a table."""
_ORIGINS = ["", "name", "steps", "samples", "commit of w2s", "configuration", "training data", "weights"]


def write_card(folder: Path, export: Export, guide: Guide, checkpoint: Path, weights: Weights, **named: str) -> None:
    """Write README.md over the files that a folder holds, when all of them are written.

    Args:
        folder: the export.
        export: what was exported.
        guide: what is to be said of the format.
        checkpoint: which one it is of.
        weights: which of its weights.
        named: the model's `title`, and its `licence` as the hub calls it.
    """
    released, vision_alone = export.released, guide.vision_alone
    written = [tensor for name, tensor in released.meta.items() if name.startswith("visual.") or not vision_alone]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = card(
        guide,
        lineage(checkpoint, weights),
        measurements(checkpoint, weights),
        **named,
        towers=[each for each in ("visual", "text") if released.has(each) and not (vision_alone and each == "text")],
        parameters=sum(tensor.numel() for tensor in written),
        types=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in written}),
        vision=export.model.vision,
        text=export.model.text,
        embed_dim=export.model.embed_dim,
        data_licences=data_licences(checkpoint),
        files=_table(
            ["file", "bytes", "SHA-256"],
            [[str(path.relative_to(folder)), path.stat().st_size, sha256(path)] for path in files],
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(guide: Guide, lineage: Sequence[Ancestor], measured: Sequence[Measurement], **facts: Any) -> str:
    """Return the text of a card.

    Args:
        guide: what is to be said of the format.
        lineage: the checkpoint itself, then what it comes from.
        measured: what runs have measured of it.
        facts: the other names of card.md.jinja.
    """
    origins: list[list[Cell]] = [
        [
            each.role, each.name, each.step, each.samples, each.commit[:_DIGITS], each.config, each.data,
            each.weights[:_DIGITS],
        ]
        for each in lineage
    ]  # fmt: skip
    figures: list[list[Cell]] = [
        [name, value, each.data, each.run] for each in measured for name, value in each.metrics.items()
    ]
    front = {"license": facts["licence"], "library_name": guide.library, **_front_matter(guide, lineage, measured)}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("w2s.checkpoint.export", "."),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("card.md.jinja").render(
        **facts,
        guide=guide,
        lineage=lineage,
        measured=measured,
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        origins=_table(_ORIGINS, origins),
        samples=samples_seen(lineage),
        figures=_table(["measure", "value", "on", "measured by the run"], figures),
    )


def _front_matter(guide: Guide, lineage: Sequence[Ancestor], measured: Sequence[Measurement]) -> Mapping[str, object]:
    teachers = [_identifier(each.name.partition(",")[0]) for each in lineage if each.role == "teacher"]
    data = [_identifier(each.data.partition(",")[0]) for each in lineage if each.data]
    names = [name for each in measured for name in each.metrics]
    metrics = [hub for part, hub in _METRICS.items() if any(part in name for name in names)]
    lists = {"base_model": teachers, "datasets": data, "metrics": metrics}
    return {
        "pipeline_tag": guide.task,
        "tags": ["clip", "vision", "weak-to-strong", "w2s"],
        **{key: list(dict.fromkeys(values)) for key, values in lists.items() if values},
    }


def _identifier(name: str) -> str:
    """A name as the hub takes it: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    return Table("", columns, rows).to_markdown().partition("\n\n")[2].strip()
