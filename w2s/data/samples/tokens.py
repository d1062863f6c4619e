"""Captions to token numbers."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from w2s.errors import MissingPackageError


@functools.cache
def _tokenizer() -> Callable[..., torch.Tensor]:
    """Return open_clip's tokenizer, made at the first caption of a process.

    Only its file is loaded: the package around it imports timm and torchvision, seconds in every reading process.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise MissingPackageError("captions need open_clip's tokenizer: pip install open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    if spec is None or spec.loader is None:
        raise MissingPackageError(
            f"captions need open_clip's tokenizer, {path} is not there: reinstall open_clip_torch"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer: Callable[..., torch.Tensor] = module.SimpleTokenizer()
    return tokenizer


def tokenize(captions: Sequence[str], context_length: int) -> torch.Tensor:
    """Tokenize with CLIP's byte-pair encoding, as open_clip does.

    Returns:
        int64 [len(captions), context_length]: start token, text, end token, zeros. A caption that is too long is cut
        and still closes with the end token, which has the highest number of all tokens.

    Raises:
        MissingPackageError: open_clip is not installed.
    """
    return _tokenizer()(list(captions), context_length=context_length)
