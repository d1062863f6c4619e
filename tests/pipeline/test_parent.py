from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.pipeline.launcher import finished, overrides
from tests.pipeline.seeded import twice_for_masked, write_seeded
from w2s.config.sections import TrackingConfig
from w2s.errors import StopRun
from w2s.pipeline.parent import headline_means, parent_params, parent_run
from w2s.pipeline.result_tables import meaning_of
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan
from w2s.tracking.mlflow.run import MlflowRun

QUIET = TrackingConfig(system_metrics=False)


def test_every_step_has_the_keys_that_it_is_given(tmp_path: Path) -> None:
    plan = Plan(
        load_pipeline(write_seeded(tmp_path)),
        overrides(tmp_path, "scratch:data.train=https://me:secret@host/a.tar", "masked:train.steps=44"),
        fresh=False,
    )
    given = parent_params("seeded", plan)
    assert (given["pipeline"], given["seeds"]) == ("seeded", [3, 5])
    assert given["masked.train.steps"] == "44"  # the later of two values
    assert given["masked_clip.data.train"] == "train"
    assert given["scratch.data.train"] == "https://me:***@host/a.tar"
    assert given["masked_clip.init.vision"] == "{masked}"
    assert given["scratch_long.train.steps"] == str(plan.config(plan.tasks()[3], {}).train.steps)
    assert "eval_masked.train.steps" not in given
    assert not {"scratch.optim.lr", "scratch.tracking.enabled", "scratch.run.root"} & given.keys()


def test_headlines_are_means_over_the_runs_so_far(tmp_path: Path) -> None:
    plan = Plan(load_pipeline(write_seeded(tmp_path)), overrides(tmp_path), fresh=False)
    of_step = finished(plan, twice_for_masked).named("eval_masked")
    assert headline_means(of_step[:1]) == {"eval_masked/tux/zero_shot/top1": 0.06}
    assert headline_means(of_step) == {"eval_masked/tux/zero_shot/top1": 0.08}


def test_what_the_figures_mean(tmp_path: Path) -> None:
    plan = Plan(load_pipeline(write_seeded(tmp_path)), overrides(tmp_path), fresh=False)
    assert meaning_of(finished(plan, twice_for_masked)) == (
        "zero-shot top-1, tux: eval_masked has 0.0800, 0.0400 ahead of eval_scratch (0.0400), ahead in 2 of 2 seeds."
    )
    alone = Plan(load_pipeline(write_seeded(tmp_path, seeds="[3]")), overrides(tmp_path), fresh=False)
    assert meaning_of(finished(alone, twice_for_masked)).endswith(
        "(0.0300). One run each: as small a difference may be chance."
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError("x"), "FAILED"), (StopRun("stop", 15), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_parent_and_child(root: Path, client: MlflowClient, error: BaseException | None, status: str) -> None:
    try:
        with parent_run(QUIET, root / "run-1234", tags={"w2s.group": "run-1234"}, params={"a": 1}) as parent:
            child = MlflowRun(QUIET, root, "mim", tags={}, params={}, parent_run_id=parent.run_id)
            child.end("FINISHED")
            if error:
                raise error
    except BaseException as caught:
        assert caught is error
    assert client.get_run(str(child.run_id)).data.tags["mlflow.parentRunId"] == parent.run_id
    stored = client.get_run(str(parent.run_id))
    assert (stored.info.status, stored.info.run_name) == (status, "run-1234")
    with parent_run(QUIET, root / "run-1234", tags={}, params={}) as again:
        assert again.run_id == parent.run_id
