"""A finished CLIP as a new version of a model in MLflow's registry, which `mlflow.pyfunc` loads."""

import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

from w2s.config.sections import Config
from w2s.errors import UserError
from w2s.megatron.parallel.process_groups import Ranks
from w2s.tracking.mlflow.run import stored_run_id
from w2s.tracking.mlflow.store import connect, load_mlflow, reason, tracking_uri

_NEEDED = ("mlflow", "open_clip_torch", "timm", "torch", "torchvision", "pillow", "pandas")
_CODE = Path(__file__).with_name("registered_clip.py")
_ARTIFACT = "registered_model"


def register_clip(config: Config, run: Path, checkpoint: Path | None, ranks: Ranks) -> None:
    """Make a checkpoint the next version of the registered model `tracking.register`, if there is one to make.

    What goes wrong with it is a warning: the run is finished.
    """
    if not (config.tracking.register and checkpoint and ranks.main):
        return
    name = config.tracking.register
    try:
        address = _register(config, run, checkpoint)
    except Exception as error:  # a store's own errors are no reason to fail a run that is finished
        again = f"w2s stage eval init.checkpoint={checkpoint} tracking.register={name}"
        print(f"warning: tracking.register={name} failed ({reason(error)}); try again: {again}", flush=True)
        return
    print(f"registered: {address}", flush=True)


def _register(config: Config, run: Path, checkpoint: Path) -> str:
    """Export and upload a checkpoint; return the address of the new version, `models:/NAME/VERSION`."""
    load_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    from w2s.checkpoint.export.exporting import export_checkpoint  # what peers need: seconds for every other run

    name = config.tracking.register
    with tempfile.TemporaryDirectory(dir=run) as scratch:
        exported, model = Path(scratch, "clip"), Path(scratch, "model")
        export_checkpoint(checkpoint, "open_clip", exported, weights=config.eval.weights)
        _save_model(exported, model)
        run_id = stored_run_id(run)
        if run_id is None:
            raise UserError("MLflow has no run of this one")
        client = connect(tracking_uri(config.tracking, Path(config.run.root).expanduser()))
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        client.log_artifacts(run_id, str(model), _ARTIFACT)
        source = f"{client.get_run(run_id).info.artifact_uri}/{_ARTIFACT}"
        tags = {"w2s.checkpoint": str(checkpoint.absolute())}
        made = client.create_model_version(name, source, run_id=run_id, tags=tags)
        return f"models:/{name}/{made.version}"


def _save_model(exported: Path, folder: Path) -> None:
    """Write a model of MLflow that embeds images and texts, around a CLIP exported for open_clip.

    Its signature: columns `image` (bytes of an encoded image) and `text`, both optional, to `image_embedding` and
    `text_embedding`, unit vectors.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, DataType

    kinds = {"image": DataType.binary, "text": DataType.string}
    inputs = Schema([ColSpec(kind, name, required=False) for name, kind in kinds.items()])
    outputs = Schema([ColSpec(Array(DataType.float), f"{name}_embedding", required=False) for name in kinds])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no example of an input
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(_CODE),
            artifacts={"clip": str(exported)},
            signature=ModelSignature(inputs, outputs),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _NEEDED],  # no index has +cpu
        )
