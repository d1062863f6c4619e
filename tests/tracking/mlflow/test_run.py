import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from w2s.config.naming import flatten
from w2s.config.sections import TrackingConfig
from w2s.tracking.mlflow.datasets import DataInput
from w2s.tracking.mlflow.delivery import clean_name
from w2s.tracking.mlflow.run import MlflowRun, Status, end_abandoned
from w2s.tracking.mlflow.store import artifact_location, load_mlflow, tracking_uri

QUIET = TrackingConfig(system_metrics=False)


def start(root: Path, tracking: TrackingConfig = QUIET, **arguments: Any) -> MlflowRun:
    run = MlflowRun(tracking, root, "mim", tags={"w2s.stage": "mim"}, params={"train.steps": 40}, **arguments)
    _ = run.run_id  # waits until the store has answered, or does not
    return run


def runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("w2s")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def test_metrics_inputs_and_files_arrive(root: Path, client: MlflowClient, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    run = start(root)
    run.log({"loss": -0.5, "recall@1": 0.25}, step=10, samples=640)
    run.inputs([DataInput("emoji", "shards/{0..3}.tar", "abc", "training")])
    run.artifact(note, "notes")
    run.end("FINISHED")
    assert run.warnings() == []
    (stored,) = runs(client)
    assert stored.data.metrics == {"loss": -0.5, "recall_at_1": 0.25, "samples_seen": 640.0}
    assert client.get_metric_history(str(run.run_id), "loss")[0].step == 10
    assert stored.inputs is not None
    (dataset,) = stored.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("emoji", "abc", "training")
    assert (Path(stored.info.artifact_uri.removeprefix("file://")) / "notes/note.txt").read_text() == "hello"
    assert (root / "mlflow-artifacts").is_dir()


def test_what_is_logged_before_the_store_answers_arrives(
    root: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, load = Event(), load_mlflow
    monkeypatch.setattr("w2s.tracking.mlflow.run.load_mlflow", lambda: answers.wait(60) and load())
    run = MlflowRun(QUIET, root, "mim", tags={}, params={})
    run.log({"loss": 1.0}, step=10, samples=640)
    assert run.page is None and runs(client) == []
    answers.set()
    run.end("FINISHED")
    assert [(point.step, point.value) for point in client.get_metric_history(str(run.run_id), "loss")] == [(10, 1.0)]


def test_a_resumed_run_is_the_same_run_and_its_params_stay(root: Path, client: MlflowClient) -> None:
    first = start(root)
    first.log({"loss": 1.0}, step=10, samples=640)
    first.end("KILLED")
    second = MlflowRun(QUIET, root, "mim", tags={}, params={"train.steps": 99}, run_id=first.run_id)
    assert client.get_run(str(second.run_id)).info.status == "RUNNING"
    second.log({"loss": 0.5}, step=20, samples=1280)
    second.end("FINISHED")
    (stored,) = runs(client)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"train.steps": "40"}
    assert [point.step for point in client.get_metric_history(str(first.run_id), "loss")] == [10, 20]


def test_the_environment_variable_goes_before_the_given_run_and_is_used_once(
    root: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = start(root), start(root)
    monkeypatch.setenv("MLFLOW_RUN_ID", str(one.run_id))
    assert start(root, run_id=two.run_id).run_id == one.run_id
    assert start(root, run_id=two.run_id).run_id == two.run_id
    assert len(runs(client)) == 2


@pytest.mark.parametrize(("before", "after"), [(None, "FAILED"), ("FINISHED", "FINISHED"), ("KILLED", "KILLED")])
def test_the_run_of_dead_ranks_is_ended(
    root: Path, client: MlflowClient, tmp_path: Path, before: Status | None, after: str
) -> None:
    run = start(root, folder=tmp_path)
    run.log({"loss": 1.0}, step=10, samples=640)
    run._worker.submit(int).result()  # the thread is done with it
    if before:
        run.end(before)
    lines = [{"step": step, "samples_seen": 64 * step, "time": 1.0, "loss": 10 / step} for step in (10, 20)]
    end_abandoned(QUIET, root, tmp_path, lines)
    (stored,) = runs(client)
    assert stored.info.status == after
    told = sorted((point.step, point.value) for point in client.get_metric_history(str(run.run_id), "loss"))
    assert told == [(10, 1.0), (20, 0.5)][: 1 if before else 2]


def test_a_run_that_never_was_is_not_ended(root: Path, client: MlflowClient, tmp_path: Path) -> None:
    end_abandoned(QUIET, root, tmp_path, [])
    assert runs(client) == []


@pytest.mark.parametrize("lost", ["0123456789abcdef0123456789abcdef", "no such id!"])
def test_an_unknown_run_makes_a_new_one_and_a_warning(root: Path, client: MlflowClient, lost: str) -> None:
    run = start(root, run_id=lost)
    run.end("FINISHED")
    assert [stored.info.run_id for stored in runs(client)] == [run.run_id]
    (warning,) = run.warnings()
    assert lost in warning and str(run.run_id) in warning


def test_a_deleted_run_is_not_continued(root: Path, client: MlflowClient) -> None:
    lost = str(start(root).run_id)
    client.delete_run(lost)
    assert start(root, run_id=lost).run_id != lost


def test_long_and_many_params(root: Path, client: MlflowClient) -> None:
    params = {f"p{index}": "x" * 7000 for index in range(120)}
    run = MlflowRun(QUIET, root, "mim", tags={}, params=params)
    stored = client.get_run(str(run.run_id)).data.params
    assert run.warnings() == []
    assert len(stored) == 120
    assert {len(value) for value in stored.values()} == {6000}


def test_system_metrics_can_be_on(root: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    published = Event()
    publish = SystemMetricsMonitor.publish_metrics

    def publish_and_tell(monitor: SystemMetricsMonitor, metrics: dict[str, float]) -> None:
        publish(monitor, metrics)  # type: ignore[no-untyped-call]
        published.set()

    monkeypatch.setattr(SystemMetricsMonitor, "publish_metrics", publish_and_tell)
    run = start(root, TrackingConfig())
    assert published.wait(30)
    run.end("FINISHED")
    assert "system/cpu_utilization_percentage" in client.get_run(str(run.run_id)).data.metrics


def test_a_child_that_began_before_its_parent_is_adopted(root: Path, client: MlflowClient) -> None:
    child = start(root)
    child.end("FINISHED")
    parent = start(root)
    parent.adopt(str(child.run_id))
    parent.end("FINISHED")
    stored = client.get_run(str(child.run_id))
    assert (stored.data.tags["mlflow.parentRunId"], stored.info.status) == (parent.run_id, "FINISHED")


def test_the_page_of_a_run_is_in_the_view_for_training(root: Path, client: MlflowClient) -> None:
    run = start(root)
    assert run.page is None  # a file has none
    run._uri = "https://host:5000/mlflow/"
    (stored,) = runs(client)
    address = f"https://host:5000/mlflow/#/experiments/{stored.info.experiment_id}/runs/{run.run_id}"
    assert run.page == f"{address}?workflowType=machine_learning"


def test_tracking_that_is_off_never_loads_mlflow(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from w2s.config.sections import TrackingConfig\n"
        "from w2s.tracking.mlflow.run import MlflowRun\n"
        "run = MlflowRun(TrackingConfig(enabled=False), Path(sys.argv[1]), 'x', tags={}, params={})\n"
        "run.log({'loss': 1.0}, 1, 1); run.end('FINISHED')\n"
        "assert run.run_id is None and run.warnings() == [] and 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listens", [True, False])
def test_a_server_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # seconds; the default is only longer
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()  # takes connections and never says a word
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        run = start(tmp_path, TrackingConfig(uri=uri))
        run.log({"loss": 1.0}, 1, 64)
        run.end("FINISHED")
    assert run.run_id is None
    (warning,) = run.warnings()
    assert uri in warning and "tracking.enabled=false" in warning and "\n" not in warning
    assert ("timed out" if listens else "Connection refused") in warning


def test_a_start_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2s.tracking.mlflow.run.OPEN_SECONDS", 0.1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        run = start(tmp_path, TrackingConfig(uri=f"http://127.0.0.1:{server.getsockname()[1]}"))
        (warning,) = run.warnings()  # a server that is gone would refuse
    assert "no answer" in warning


class _Broken(BaseHTTPRequestHandler):
    """A server whose every answer is an error."""

    def do_POST(self) -> None:
        self.send_error(400, "gone mad")

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def broken_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Broken)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_refuses_is_a_warning(tmp_path: Path) -> None:
    with broken_server() as uri:
        run = start(tmp_path, TrackingConfig(uri=uri))
        run.end("FAILED")
    assert run.run_id is None
    assert len(run.warnings()) == 1


def test_what_fails_twice_is_counted_and_the_rest_goes_through(root: Path, client: MlflowClient) -> None:
    run = start(root)
    run.artifact(root / "no such file")
    run.log({"loss": 0.9}, 2, 128)
    run.end("FINISHED")
    (warning,) = run.warnings()
    assert "lacks 0 values of metrics and 1 other things" in warning and "no such file" in warning
    assert client.get_run(str(run.run_id)).data.metrics["loss"] == 0.9


def break_store(monkeypatch: pytest.MonkeyPatch, name: str = "log_batch") -> list[int]:
    """Let a call of the client fail; return a list that grows with every attempt."""
    tried: list[int] = []

    def fail(*_: object, **__: object) -> None:
        tried.append(1)
        raise ConnectionError("gone")

    monkeypatch.setattr(MlflowClient, name, fail)
    return tried


def points(client: MlflowClient, run: MlflowRun, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(str(run.run_id), name)]


def test_after_a_slow_failure_the_store_is_left_alone_but_learns_the_end(
    root: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2s.tracking.mlflow.run._SLOW_SECONDS", 0.0)
    monkeypatch.setattr("w2s.tracking.mlflow.run._PAUSE_FACTOR", 1e9)
    run = start(root)
    tried = break_store(monkeypatch)
    for step in range(20):
        run.log({"loss": 1.0}, step, 64 * step)
    run.end("FINISHED")
    assert len(tried) == 2, "the first one, and once more at the end"
    assert "lacks 40 values of metrics and 0 other things (ConnectionError: gone)" in run.warnings()[0]


def test_a_store_that_comes_back_gets_everything_once(
    root: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        tried = break_store(broken, "create_run")
        run = start(root)
        run.log({"loss": 3.0}, 1, 64)
        assert run.run_id is None and tried
        run._worker.submit(int).result()  # the thread is done with it
    run.log({"loss": 2.0}, 2, 128)
    run._worker.submit(int).result()
    with monkeypatch.context() as broken:
        break_store(broken)
        run.log({"loss": 1.0}, 3, 192)
        run.log({"accuracy": 0.5}, 3, 192)
        run._worker.submit(int).result()
    run.end("FINISHED")
    assert run.warnings() == []
    assert points(client, run, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert points(client, run, "samples_seen") == [(1, 64.0), (2, 128.0), (3, 192.0)]


def test_a_slow_store_takes_what_waits_in_few_calls(
    root: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log_batch, calls, free = start(root), MlflowClient.log_batch, [], Event()

    def slow(*arguments: Any, **named: Any) -> None:
        calls.append(1)
        free.wait()
        log_batch(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    for step in range(600):
        run.log({"loss": float(step)}, step, 64 * step)
    free.set()
    run.end("FINISHED")
    assert 2 <= len(calls) <= 3, "1,200 values, 1,000 a call"
    assert points(client, run, "loss") == [(step, float(step)) for step in range(600)]


def test_a_continued_run_has_each_step_once_and_what_was_lost(root: Path, client: MlflowClient) -> None:
    first = start(root)
    for step in (1, 2, 4):
        first.log({"loss": float(step)}, step, step)
    first.end("KILLED")
    history = [{"step": step, "samples_seen": step, "time": 1.5, "loss": float(step)} for step in (1, 2, 3)]
    again = start(root, run_id=first.run_id, history=[*history[:2], {**history[2], "bad": None}])
    for step in (4, 5):
        again.log({"loss": float(step), "new": 1.0}, step, step)
    again.end("FINISHED")
    assert sorted(points(client, again, "loss")) == [(step, float(step)) for step in (1, 2, 3, 4, 5)]
    assert points(client, again, "new") == [(4, 1.0), (5, 1.0)]
    assert [point.timestamp for point in client.get_metric_history(str(again.run_id), "loss") if point.step == 3] == [
        1500
    ]
    assert len(points(client, again, "bad")) == 1


def test_a_damaged_line_of_the_history_holds_nothing_up(root: Path, client: MlflowClient) -> None:
    history: list[Any] = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "time": None, "loss": 2.0},
        {"step": 3, "time": "now", "loss": 3.0},
        {"step": 4, "time": 1.5, "loss": "garbage", "lr": 0.5},
    ]
    run = start(root, history=history)
    run.log({"loss": 5.0}, 5, 5)
    run.end("FINISHED")
    assert run.warnings() == []
    assert (points(client, run, "loss"), points(client, run, "lr")) == ([(5, 5.0)], [(4, 0.5)])


def test_steps_that_are_done_with_other_samples_are_logged_again(root: Path, client: MlflowClient) -> None:
    run = start(root)
    for step in (1, 2, 3):
        run.log({"loss": 1.0}, step, step)
    run.rewind()
    for step in (2, 3):
        run.log({"loss": 2.0}, step, step)
    run.end("FINISHED")
    assert sorted(points(client, run, "loss")) == [(1, 1.0), (2, 1.0), (2, 2.0), (3, 1.0), (3, 2.0)]


def test_what_the_store_will_never_take_holds_nothing_up(
    root: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2s.tracking.mlflow.delivery.clean_name", str)
    run = start(root)
    run.log({"not a name!?": 1.0}, 1, 1)
    run._worker.submit(int).result()
    run.log({"loss": 1.0}, 2, 2)
    run.end("FINISHED")
    assert "lacks 2 values" in run.warnings()[0]
    assert points(client, run, "loss") == [(2, 1.0)]


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(TrackingConfig(), Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert tracking_uri(TrackingConfig(), Path("runs")) == "http://host"
    assert tracking_uri(TrackingConfig(uri="http://mine"), Path("runs")) == "http://mine"
    assert (
        artifact_location("postgresql+psycopg2://host/db", Path("runs")) == f"file://{tmp_path}/runs/mlflow-artifacts"
    )
    assert artifact_location("http://host", Path("runs")) is None


def test_names() -> None:
    assert clean_name("retrieval/recall@5 (%)") == "retrieval/recall_at_5 ___"
    assert clean_name("größe") == "gr__e"
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
