"""What a finished pipeline says: figures over the seeds, differences, cost and choices in tables, and a sentence."""

from collections.abc import Iterator, Sequence
from statistics import mean

from w2s.pipeline.comparison import by_seed, comparison
from w2s.pipeline.results import Cost, Results, Run, TrialOutcome, chain_costs, spread
from w2s.pipeline.steps import Step
from w2s.tracking.headlines import readings
from w2s.tracking.tables import Cell, Table

_FIRST = ("mean of a suite", "zero-shot top-1", "mean average precision", "mean recall at 10")
"""Headlines that say most of a CLIP; where there are none, the first that two steps share counts."""


def tables(results: Results, choices: Sequence[TrialOutcome]) -> dict[str, Table]:
    """The tables by file name; of a pipeline without seeds the summary alone."""
    if not results.pipeline.seeds:
        return {"summary": summary(results, results.pipeline.steps)}
    training = [step for step in results.pipeline.steps if step.stage != "eval"]
    shown = {
        "arms": arms(results),
        "differences": differences(results),
        "training": summary(results, training),
        "cost": costs(results),
    }
    if results.pipeline.compare:
        shown["comparison"] = comparison(results, results.pipeline.compare)
    return shown | ({"choices": chosen(choices)} if choices else {})


def summary(results: Results, steps: Sequence[Step]) -> Table:
    """The headlines of every step that has some, beside their baselines, and what each step took."""
    rows: list[list[Cell]] = []
    for step in steps:
        runs = results.of(step)
        seconds, memory = (mean(run.result[key] for run in runs) for key in ("seconds", "peak_memory_gib"))
        name, took = step.name, [f"{seconds:.0f} s", f"{memory:.1f} GiB"]
        for label, values in by_label(runs).items():
            others = {other: by_label(results.named(other)).get(label) for other in step.beside}
            beside = _baselines(runs, label) + [f"{other} {spread(them)}" for other, them in others.items() if them]
            rows.append([name, label, spread(values), ", ".join(beside), *took])
            name, took = "", ["", ""]
        if name:
            rows.append([name, "", "", "", *took])
    return Table(f"Summary{_over(results)}", ["step", "metric", "value", "beside", "time", "memory"], rows)


def arms(results: Results) -> Table:
    """A row for each headline, a column for each evaluated step; the baselines come last."""
    steps = [step for step in results.pipeline.steps if step.stage == "eval"]
    values_of = {step.name: by_label(results.of(step)) for step in steps}
    rows: list[list[Cell]] = []
    for label in dict.fromkeys(label for values in values_of.values() for label in values):
        values = [spread(values_of[step.name].get(label, [])) for step in steps]
        beside = dict.fromkeys(text for step in steps for text in _baselines(results.of(step), label))
        rows.append([label, *values, ", ".join(beside)])
    return Table(f"Results{_over(results)}", ["metric", *values_of, "beside"], rows)


def differences(results: Results) -> Table:
    """Each step less the steps beside it, seed by seed."""
    rows: list[list[Cell]] = []
    for name, other, shared in _beside(results):
        for label, (ours, theirs) in shared.items():
            gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
            above = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
            rows.append([f"{name} - {other}", label, spread(gaps), above, by_seed(gaps)])
    seeds = ", ".join(map(str, results.pipeline.seeds))
    columns = ["difference", "metric", "mean ± deviation", "above 0", "by seed"]
    return Table(f"Paired differences, seeds {seeds}", columns, rows)


def costs(results: Results) -> Table:
    """What a run of each training step took, and each evaluated step with all that it builds on."""
    rows: list[list[Cell]] = []
    for step in results.pipeline.steps:
        if step.stage == "eval":
            rows.append([f"{step.name}, all its steps", *_cost(chain_costs(results, step))])
        else:
            rows.append([step.name, *_cost([Cost.of([run]) for run in results.of(step)])])
    return Table(f"Training{_over(results)}", ["step", "samples", "seconds", "TFLOP"], rows)


def chosen(choices: Sequence[TrialOutcome]) -> Table:
    """The candidates of each choice with their scores."""
    rows: list[list[Cell]] = []
    for each in choices:
        key, candidates = each.choice.key, each.choice.among
        for value, score, trial in zip(candidates, each.scores, each.trials, strict=True):
            mark = "chosen" if value == each.value else ""
            rows.append([each.step.name, f"{key}={value}", each.choice.by, score, trial.config.train.steps, mark])
    return Table("Choices", ["step", "candidate", "metric", "score", "steps", ""], rows)


def meaning_of(results: Results) -> str:
    """Say how far each step is ahead of the steps beside it, by the headline that says most."""
    sentences = []
    for name, other, shared in _beside(results):
        if shared:
            label = min(shared, key=_rank)
            sentences.append(_sentence(name, other, label, *shared[label]))
    if sentences and len(results.pipeline.seeds) <= 1:
        sentences.append("One run each: as small a difference may be chance.")
    return " ".join(sentences)


def _rank(label: str) -> int:
    return next((rank for rank, first in enumerate(_FIRST) if label.startswith(first)), len(_FIRST))


def _sentence(name: str, other: str, label: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    gap = mean(ours) - mean(theirs)
    place = f"{abs(gap):.4f} {'ahead of' if gap > 0 else 'behind'}" if gap else "level with"
    ahead = sum(a > b for a, b in zip(ours, theirs, strict=True))
    seeds = f", ahead in {ahead} of {len(ours)} seeds" if len(ours) > 1 else ""
    return f"{label}: {name} has {mean(ours):.4f}, {place} {other} ({mean(theirs):.4f}){seeds}."


def _beside(results: Results) -> Iterator[tuple[str, str, dict[str, tuple[list[float], list[float]]]]]:
    """Each step and a step beside it, with both their values of the headlines that they share."""
    for step in results.pipeline.steps:
        ours = by_label(results.of(step))
        for other in step.beside:
            theirs = by_label(results.named(other))
            yield step.name, other, {label: (ours[label], theirs[label]) for label in ours if label in theirs}


def by_label(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The headlines of a step's runs, each with its values in the order of the seeds."""
    by_run = [{each.label: each.value for each in readings(run.metrics)} for run in runs]
    return {label: [values[label] for values in by_run] for label in by_run[0]}


def _baselines(runs: Sequence[Run], label: str) -> list[str]:
    """What a headline is compared with, as means over the runs."""
    of_runs = [each.baselines for run in runs for each in readings(run.metrics) if each.label == label]
    names = of_runs[0] if of_runs else {}
    return [f"{name} {mean(baselines[name] for baselines in of_runs):.4f}" for name in names]


def _cost(costs: Sequence[Cost]) -> list[Cell]:
    first, seconds = costs[0], mean(cost.seconds for cost in costs)
    return [first.samples, f"{seconds:.0f}", f"{first.flops / 1e12:.4g}"]


def _over(results: Results) -> str:
    count = len(results.pipeline.seeds)
    return f", mean ± standard deviation over {count} seeds" if count > 1 else ""
