from pathlib import Path

from tests.pipeline.launcher import Launcher, overrides
from tests.pipeline.seeded import write_seeded
from w2s.config.sections import Config
from w2s.pipeline.meaning import meaning_of
from w2s.pipeline.parent import metrics, params
from w2s.pipeline.results import Results, Run
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan


def measure(config: Config) -> dict[str, float]:
    """Of an evaluation its seed in percent, of the masked arm twice that."""
    times = 2 if config.run.name.startswith("eval_masked") else 1
    return {"tux/zero_shot/top1": times * config.run.seed / 100, "tux/zero_shot/chance_top1": 0.0016}


def finished(plan: Plan) -> list[Run]:
    runs = [Run(task, plan.config(task, {})) for task in plan.tasks()]
    write = Launcher(measure)
    for run in runs:
        write(run.config, 1)
    return runs


def test_every_step_has_the_keys_that_it_is_given(tmp_path: Path) -> None:
    plan = Plan(
        load_pipeline(write_seeded(tmp_path)),
        overrides(tmp_path, "scratch:data.train=https://me:secret@host/a.tar", "masked:train.steps=44"),
        fresh=False,
    )
    given = params("seeded", plan)
    assert (given["pipeline"], given["seeds"]) == ("seeded", [3, 5])
    assert given["masked.train.steps"] == "44"  # the later of two values
    assert given["masked_clip.data.train"] == "train"
    assert given["scratch.data.train"] == "https://me:***@host/a.tar"
    assert given["masked_clip.init.vision"] == "{masked}"
    assert given["scratch_long.train.steps"] == str(plan.config(plan.tasks()[3], {}).train.steps)
    assert "eval_masked.train.steps" not in given
    assert not {"scratch.optim.lr", "scratch.tracking.enabled", "scratch.run.root"} & given.keys()


def test_headlines_are_means_over_the_runs_so_far(tmp_path: Path) -> None:
    runs = finished(Plan(load_pipeline(write_seeded(tmp_path)), overrides(tmp_path), fresh=False))
    of_step = [run for run in runs if run.task.step.name == "eval_masked"]
    assert metrics(of_step[:1]) == {"eval_masked/tux/zero_shot/top1": 0.06}
    assert metrics(of_step) == {"eval_masked/tux/zero_shot/top1": 0.08}


def test_what_the_figures_mean(tmp_path: Path) -> None:
    plan = Plan(load_pipeline(write_seeded(tmp_path)), overrides(tmp_path), fresh=False)
    assert meaning_of(Results(plan.pipeline, finished(plan))) == (
        "zero-shot top-1, tux: eval_masked has 0.0800, 0.0400 ahead of eval_scratch (0.0400), ahead in 2 of 2 seeds."
    )
    alone = Plan(load_pipeline(write_seeded(tmp_path, seeds="[3]")), overrides(tmp_path), fresh=False)
    assert meaning_of(Results(alone.pipeline, finished(alone))).endswith(
        "(0.0300). One run each: as small a difference may be chance."
    )
