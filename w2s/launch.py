"""Launching a stage: in this process, which is a rank, or on local ranks that are started for it."""

import gc
import importlib
import logging
import os
from pathlib import Path

from w2s.config.sections import Config
from w2s.data.stream.workers import prepare_workers
from w2s.errors import ConfigError, UserError
from w2s.processes.cleanup import marked, sweep, temporary
from w2s.processes.elastic import RankError, launch
from w2s.processes.host import keep_freed_memory, keep_printing, use_huge_pages
from w2s.redaction import shown


def run_stage(config: Config) -> None:
    """Run the stage of a configuration in this process, which is a rank."""
    sweep(temporary())
    keep_printing()
    keep_freed_memory()
    use_huge_pages()
    show_notes()
    if config.data.workers:
        prepare_workers()
    with marked():
        stage = importlib.import_module(f"w2s.stages.{config.stage}")
        gc.freeze()  # Megatron collects garbage with each checkpoint: what imports have made need not be looked through
        stage.run(config)


def show_notes() -> None:
    """Let the user read, once for all ranks, what w2s notes: data that is built, samples that are skipped."""
    level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR
    logger = logging.getLogger("w2s")
    logger.setLevel(level)
    if not logger.handlers:
        notes = _Notes()
        notes.setFormatter(_Note())
        logger.addHandler(notes)


class _Notes(logging.Handler):
    """Prints on what is standard output at that moment: while a bar is shown, that puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), flush=True)
        except (OSError, ValueError):  # standard output is gone
            self.handleError(record)


class _Note(logging.Formatter):
    """A line of its own, as a terminal may show it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"note: {shown(record.getMessage())}"


def launch_stage(config: Config, ranks: int, restarts: int) -> None:
    """Run a stage on local ranks, as `launch` does; where they have died, their run in MLflow ends as FAILED."""
    if config.checkpoint.memory and not restarts:
        raise ConfigError("checkpoint.memory=true is for ranks that are started again: use it with --restarts N")
    try:
        launch(run_stage, config, ranks, restarts)
    except RankError as error:
        if error.exit_code != UserError.exit_code:
            # What a launcher that has nothing to tell of does without.
            from w2s.checkpoint.find import unfinished_folder
            from w2s.tracking.history import read_history
            from w2s.tracking.mlflow.run import end_abandoned

            folder, root = unfinished_folder(config), Path(config.run.root).expanduser()
            end_abandoned(config.tracking, root, folder, read_history(folder))
        raise
