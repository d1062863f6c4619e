"""The evaluation stage: zero-shot classification, retrieval, k-NN and a linear probe of a finished CLIP."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from w2s.checkpoint.export.registry import register_clip
from w2s.checkpoint.find import find_any
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.starts.handover import load_all
from w2s.config.layout_checks import check_towers
from w2s.config.load import model_from
from w2s.config.precision import compute_dtype
from w2s.config.sections import Config, Resize
from w2s.config.suites import Suite, load_suite
from w2s.data.builtin.builtin_sets import without_left_out
from w2s.evaluation.by_texts import ClipResult
from w2s.evaluation.clip_evaluator import ClipEvaluator
from w2s.evaluation.clip_pictures import show_attention, show_set
from w2s.evaluation.metric_names import of_sets, under
from w2s.evaluation.suite import as_measured, differences, find_sets, means, score, table
from w2s.megatron.parallel.optimizer import Towers
from w2s.megatron.parallel.process_groups import Ranks
from w2s.run import open_run, origins, recorded, test_inputs
from w2s.towers.build import build_clip
from w2s.tracking.tracker import Tracker


def run(config: Config) -> None:
    """Evaluate the CLIP that `init.checkpoint` names."""
    started = time.perf_counter()
    checkpoint = find_any(config.init.checkpoint, Path(config.run.root).expanduser(), key="init.checkpoint")
    with open_run(config) as (ranks, heartbeat, folder):
        heartbeat.at("evaluating", long=True)
        suite = load_suite(config.eval.suite) if config.eval.suite else None
        if suite is None:
            sets = without_left_out(config.data, config.eval.sets)
        else:
            sets = find_sets(config.eval.suite, suite, config.eval.root)
        trained = read_meta(checkpoint)
        loss = replace(config.clip, loss=trained.setting("clip", "loss"))
        config = replace(config, model=model_from(trained.config), clip=loss, eval=replace(config.eval, sets=sets))
        check_towers(config)
        inputs = test_inputs(config)
        facts = {**origins(config, str(checkpoint)), "checkpoint": str(checkpoint.absolute())}
        tracker = Tracker(config, folder, main=ranks.main, facts=facts)
        with recorded(tracker, folder, config, started, ranks) as metrics:
            tracker.inputs(inputs)
            metrics |= evaluate(config, suite, checkpoint, tracker, ranks)
    register_clip(config, folder, checkpoint, ranks)


def evaluate(config: Config, suite: Suite | None, checkpoint: Path, tracker: Tracker, ranks: Ranks) -> dict[str, float]:
    """Measure a checkpoint, show tables and pictures, return the metrics."""
    vision, text = build_clip(config, compute_dtype(config.precision), ranks.device)
    load_all({"vision": vision, "text": text}, checkpoint, config.eval.weights)
    evaluator = ClipEvaluator(config, ranks)
    measured, resized, sizes = dict[str, dict[str, float]](), dict[str, Resize](), dict[str, int]()
    for name, rules, result in _measure({"vision": vision, "text": text}, evaluator, suite):
        measured[name], resized[name], sizes[name] = result.metrics, result.resize, len(rules.test_set(name))
        if config.tracking.pictures:
            show_set(name, result, rules, tracker)
        if config.tracking.pictures and len(measured) == 1:  # of one set says enough
            show_attention(name, vision, rules, tracker)
    metrics = of_sets(measured) | evaluator.baselines()
    if suite is not None:
        metrics |= under(Path(config.eval.suite).stem, means(suite, measured))
        tracker.table("suite", *table(suite, _name(checkpoint), measured, resized), suite.title)
        for difference in differences(suite, sizes):
            tracker.message(difference)
    meta = read_meta(checkpoint)
    tracker.log(meta.step, meta.samples, metrics)
    tracker.results(metrics, str(checkpoint))
    return metrics


def _measure(
    towers: Towers, evaluator: ClipEvaluator, suite: Suite | None
) -> Iterator[tuple[str, ClipEvaluator, ClipResult]]:
    """Measure the test sets one after the other, each with the probe of its rules."""
    vision, text = towers["vision"], towers["text"]
    sets = evaluator.config.eval.by_name
    if suite is None:
        galleries = evaluator.galleries(vision)
        for name in sets:
            yield name, evaluator, evaluator.measure(vision, text, name, galleries=galleries)
        return
    for one in suite.sets:
        if one.name in sets:
            rules = ClipEvaluator(as_measured(evaluator.config, suite, one, sets[one.name]), evaluator.ranks)
            galleries, its_score = rules.galleries(vision), partial(score, one, suite)
            yield one.name, rules, rules.measure(vision, text, one.name, galleries=galleries, score=its_score)


def _name(checkpoint: Path) -> str:
    """The run that a checkpoint is of."""
    return checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.name
