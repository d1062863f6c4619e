"""A finished CLIP as a model in MLflow's registry."""

import tempfile
from pathlib import Path

from w2s.config.sections import Config
from w2s.errors import UserError
from w2s.megatron.parallel.process_groups import Ranks
from w2s.tracking.mlflow.model_registry import register, save_model
from w2s.tracking.mlflow.run import stored_run_id
from w2s.tracking.mlflow.store import reason, tracking_uri


def register_clip(config: Config, run: Path, checkpoint: Path | None, ranks: Ranks) -> None:
    """Make a checkpoint the next version of the registered model `tracking.register`, if there is one to make.

    What goes wrong with it is a warning: the run is finished.
    """
    if not (config.tracking.register and checkpoint and ranks.main):
        return
    from w2s.checkpoint.export.exporting import (
        export_checkpoint,  # it brings what peers need, seconds for every other run
    )

    name = config.tracking.register
    again = f"w2s stage eval init.checkpoint={checkpoint} tracking.register={name}"
    try:
        with tempfile.TemporaryDirectory(dir=run) as scratch:
            exported, model = Path(scratch, "clip"), Path(scratch, "model")
            export_checkpoint(checkpoint, "open_clip", exported, weights=config.eval.weights)
            save_model(exported, model)
            uri, run_id = tracking_uri(config.tracking, Path(config.run.root).expanduser()), stored_run_id(run)
            if run_id is None:
                raise UserError("MLflow has no run of this one")
            address = register(uri, run_id, name, model, {"w2s.checkpoint": str(checkpoint.absolute())})
    except Exception as error:  # a store's own errors are no reason to fail a run that is finished
        print(f"warning: tracking.register={name} failed ({reason(error)}); try again: {again}", flush=True)
        return
    print(f"registered: {address}", flush=True)
