"""README.md of an exported folder: what a model is, where it comes from, and how to load it.

The hub reads its front matter.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from w2s.checkpoint.export.formats.base import Guide
from w2s.checkpoint.export.lineage import (
    AVERAGED,
    CONTINUED,
    Ancestor,
    Measurement,
    data_licences,
    lineage,
    measurements,
    sha256,
)
from w2s.checkpoint.weights.released import Released
from w2s.config.sections import ModelConfig, Weights
from w2s.tracking.tables import Cell, Table

PAPER = "[EVA-CLIP-18B, arXiv 2402.04252](https://arxiv.org/abs/2402.04252)"
_METRICS = {"top1": "accuracy", "recall": "recall", "mean_average_precision": "mean_average_precision"}
"""The hub's names of metrics by parts of ours."""
_DIGITS = 12
"""Digits of a digest that are shown in a table."""


@dataclass(frozen=True)
class Facts:
    """What a card says in every format."""

    title: str
    """The model's name."""
    licence: str
    """As the hub calls it."""
    model: ModelConfig
    """Its shape."""
    parameters: int
    """Of the checkpoint's tensors that are written."""
    types: Sequence[str]
    """Types of their numbers."""
    towers: Sequence[str]
    """`visual`, `text` or both."""
    lineage: Sequence[Ancestor]
    """The checkpoint itself, then what it comes from."""
    measured: Sequence[Measurement]
    """What runs have measured of it."""
    data_licences: str
    """What the makers of the training data ask."""


def gather_facts(
    checkpoint: Path,
    released: Released,
    model: ModelConfig,
    *,
    title: str,
    licence: str,
    weights: Weights = "last",
    vision_alone: bool = False,
) -> Facts:
    """Read what there is to say of a checkpoint, or of its vision tower alone."""
    written = [tensor for name, tensor in released.meta.items() if name.startswith("visual.") or not vision_alone]
    return Facts(
        title=title,
        licence=licence,
        model=model,
        parameters=sum(tensor.numel() for tensor in written),
        types=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in written}),
        towers=[
            tower for tower in ("visual", "text") if released.has(tower) and not (vision_alone and tower == "text")
        ],
        lineage=lineage(checkpoint, weights),
        measured=measurements(checkpoint, weights),
        data_licences=data_licences(checkpoint),
    )


def write_card(folder: Path, facts: Facts, guide: Guide) -> None:
    """Write README.md over the files that a folder holds, when all of them are written."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    text = card(facts, guide, {name: (path.stat().st_size, sha256(path)) for name, path in files.items()})
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(facts: Facts, guide: Guide, files: Mapping[str, tuple[int, str]]) -> str:
    """Return the text of a card.

    Args:
        facts: what is known of the model.
        guide: what is to be said of the format.
        files: bytes and SHA-256 by name.
    """
    front = yaml.safe_dump(_front_matter(facts, guide), sort_keys=False, allow_unicode=True)
    sections = {
        f"# {facts.title}": _summary(facts),
        "## Load it": _loading(guide),
        "## Where it comes from": _lineage_table(facts),
        "## Evaluation": _evaluation(facts),
        "## Limits": "\n".join(f"- {limit}" for limit in [*_limits(facts), *guide.limits]),
        "## Licence": _licence(facts),
        "## Files": _table(["file", "bytes", "SHA-256"], [[name, *about] for name, about in files.items()]),
    }
    return f"---\n{front}---\n\n" + "\n\n".join(f"{head}\n\n{body}" for head, body in sections.items()) + "\n"


def _front_matter(facts: Facts, guide: Guide) -> dict[str, object]:
    teachers = [_identifier(each.name.partition(",")[0]) for each in facts.lineage if each.role == "teacher"]
    data = [_identifier(each.data.partition(",")[0]) for each in facts.lineage if each.data]
    names = [name for each in facts.measured for name in each.metrics]
    metrics = [hub for part, hub in _METRICS.items() if any(part in name for name in names)]
    lists = {"base_model": teachers, "datasets": data, "metrics": metrics}
    return {
        "license": facts.licence,
        "library_name": guide.library,
        "pipeline_tag": guide.task,
        "tags": ["clip", "vision", "weak-to-strong", "w2s"],
        **{key: list(dict.fromkeys(values)) for key, values in lists.items() if values},
    }


def _identifier(name: str) -> str:
    """A name as the hub takes it: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")


def _summary(facts: Facts) -> str:
    vision, text = facts.model.vision, facts.model.text
    lines = [f"{facts.parameters:,} parameters in {' and '.join(facts.types)}."]
    if "visual" in facts.towers:
        lines.append(
            f"Vision: {vision.layers} layers x {vision.width}, {vision.heads} heads, {vision.norm}, "
            f"{vision.norm_placement}-norm; images of {vision.image_size} px in patches of {vision.patch_size}."
        )
    if "text" in facts.towers:
        lines.append(
            f"Text: {text.layers} layers x {text.width}, {text.heads} heads; {text.context_length} tokens of CLIP's "
            f"byte-pair encoding. Both end in {facts.model.embed_dim} channels."
        )
    how = f"trained with w2s by the recipe of {PAPER}" if facts.lineage[0].step else "written by w2s"
    kind = "A CLIP" if len(facts.towers) == 2 else f"A {'vision' if 'visual' in facts.towers else 'text'} tower"
    return f"{kind}, {how}: " + " ".join(lines)


def _loading(guide: Guide) -> str:
    return "\n\n".join(f"{each.peer}:\n\n```{each.language}\n{each.code}\n```" for each in guide.snippets)


def _lineage_table(facts: Facts) -> str:
    columns = ["", "name", "steps", "samples", "commit of w2s", "configuration", "training data", "weights"]
    rows: list[list[Cell]] = [
        [
            each.role, each.name, each.step, each.samples, each.commit[:_DIGITS], each.config, each.data,
            each.weights[:_DIGITS],
        ]
        for each in facts.lineage
    ]  # fmt: skip
    # a run that continues from another one's checkpoint counts its samples too, and so does an average of checkpoints
    seen = sum(
        each.samples or 0 for each in facts.lineage if not each.role.startswith(("teacher", CONTINUED, AVERAGED))
    )
    return (
        f"{_table(columns, rows)}\n\nSamples seen without those of the teachers: {seen:,}. Digests are of all "
        "settings that change the result, of the names of the shards, and of weights the first digits of the SHA-256 "
        "of a file or of a checkpoint's list of checksums. What is empty was not known when this was exported."
    )


def _evaluation(facts: Facts) -> str:
    if not facts.measured:
        return "Nothing was measured of these weights."
    rows: list[list[Cell]] = [
        [name, value, each.data, each.run] for each in facts.measured for name, value in each.metrics.items()
    ]
    of_whole = "" if "text" in facts.towers else "Of the whole model that it is the vision tower of.\n\n"
    return of_whole + _table(["measure", "value", "on", "measured by the run"], rows)


def _limits(facts: Facts) -> list[str]:
    vision, text = facts.model.vision, facts.model.text
    limits = [f"An image is seen as {vision.image_size} x {vision.image_size} pixels; finer detail is lost."]
    if "text" in facts.towers:
        limits.append(f"A caption is cut after {text.context_length} tokens.")
    else:
        limits.append("It embeds no text: it does not tell which words describe an image.")
    return [
        *limits,
        "It knows what its training data and its teachers knew, with their gaps and their biases.",
        "The figures above are all that was measured: one training, no tests of safety or fairness.",
    ]


def _licence(facts: Facts) -> str:
    lines = [f"The weights: {facts.licence}. w2s itself: Apache-2.0."]
    if facts.data_licences:
        lines.append(f"The training data:\n\n```text\n{facts.data_licences}\n```")
    return "\n\n".join(lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    return Table("", columns, rows).to_markdown().partition("\n\n")[2].strip()
