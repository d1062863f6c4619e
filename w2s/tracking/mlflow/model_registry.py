"""A finished CLIP as a new version of a model in MLflow's registry, which `mlflow.pyfunc` loads."""

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from w2s.tracking.mlflow.store import connect, load_mlflow

_NEEDED = ("mlflow", "open_clip_torch", "timm", "torch", "torchvision", "pillow", "pandas")
_CODE = Path(__file__).with_name("registered_clip.py")
_ARTIFACT = "registered_model"


def save_model(exported: Path, folder: Path) -> None:
    """Writes a model of MLflow that embeds images and texts.

    Its signature: columns `image` (bytes of an encoded image) and `text`, both optional, to `image_embedding` and
    `text_embedding`, unit vectors.

    Args:
        exported: a CLIP as a folder of open_clip.
        folder: the new folder.
    """
    load_mlflow()
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


def register(uri: str, run_id: str, name: str, model: Path, tags: Mapping[str, str]) -> str:
    """Uploads a model to a run and makes it the next version of a registered model.

    Args:
        uri: address of the store.
        run_id: the run that made it.
        name: the registered model; made where there is none.
        model: what `save_model` wrote.
        tags: of the version.

    Returns:
        Its address, `models:/NAME/VERSION`.

    Raises:
        Exception: whatever MLflow raises.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    client = connect(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    client.log_artifacts(run_id, str(model), _ARTIFACT)
    source = f"{client.get_run(run_id).info.artifact_uri}/{_ARTIFACT}"
    made = client.create_model_version(name, source, run_id=run_id, tags=dict(tags))
    return f"models:/{name}/{made.version}"
