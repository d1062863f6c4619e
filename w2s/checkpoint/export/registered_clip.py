"""The code of a registered model: MLflow copies this file and runs it where the model is loaded, without w2s.

It embeds images and texts with open_clip and the exported folder beside it.
"""

import io
import json
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image

_BATCH = 64


class Clip(PythonModel):
    """A CLIP that takes rows with an encoded `image`, a `text`, or both."""

    def load_context(self, context: Any) -> None:
        """Build the CLIP from the folder that the model carries."""
        folder = Path(context.artifacts["clip"])
        vision = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
        described, name = {}, f"local-dir:{folder}"
        if (folder / "config.json").is_file():  # it describes a tower that open_clip knows by no name
            described = {"vision_cfg": {**vision, "timm_model_name": name}}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.clip, _, self.preprocess = open_clip.create_model_and_transforms(name, device=self.device, **described)
        self.clip.eval()
        self.tokenize = open_clip.get_tokenizer(name)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a column `image_embedding` where there is `image`, `text_embedding` where there is `text`.

        Args:
            context: of MLflow.
            model_input: encoded images (bytes) in the column `image`, texts in the column `text`.
            params: none are known.

        Returns:
            Unit vectors as lists of numbers; None in rows that have no image, or no text.
        """
        columns = {"image": self._encode_image, "text": self._encode_text}
        embedded = {
            f"{name}_embedding": _by_batch(list(model_input[name]), embed)
            for name, embed in columns.items()
            if name in model_input
        }
        return pd.DataFrame(embedded, index=model_input.index, dtype=object)

    @torch.inference_mode()
    def _encode_image(self, images: list[bytes]) -> Any:
        pixels = [self.preprocess(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
        return self.clip.encode_image(torch.stack(pixels).to(self.device), normalize=True)

    @torch.inference_mode()
    def _encode_text(self, texts: list[str]) -> Any:
        return self.clip.encode_text(self.tokenize(texts).to(self.device), normalize=True)


def _by_batch(entries: list[Any], embed: Any) -> list[list[float] | None]:
    embedded: list[list[float] | None] = [None] * len(entries)
    present = [row for row, entry in enumerate(entries) if isinstance(entry, str | bytes | bytearray)]
    for first in range(0, len(present), _BATCH):
        rows = present[first : first + _BATCH]
        for row, vector in zip(rows, embed([entries[row] for row in rows]).float().tolist(), strict=True):
            embedded[row] = vector
    return embedded


set_model(Clip())
