"""What stands beside exported towers: how images and texts become their inputs, in the files of transformers.

The tokenizer is CLIP's byte-pair encoding, whose vocabulary and merges are open_clip's. With `tokenizer.json` alone the
`tokenizers` library gives the sequences that w2s and open_clip make: start token, text, end token, zeros.
"""

from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from w2s.checkpoint.export.formats.base import write_json
from w2s.config.sections import ModelConfig, VisionConfig
from w2s.towers.vision import channel_statistics

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What is encoded piece by piece: contractions, words, single digits, runs of other signs."""
BICUBIC = 3
"""Pillow's number of the filter."""
LIMITS = (
    "transformers' image processor cuts out the middle of an image one pixel off from where w2s and open_clip do, for "
    "half of the margins that are odd.",
    "The tokenizer leaves out open_clip's repair of broken characters and HTML entities.",
)
"""How what it makes differs from what w2s and open_clip do."""


def write_processor(folder: Path, model: ModelConfig, processor: str | None = None) -> None:
    """Write `preprocessor_config.json`, `tokenizer.json` and `tokenizer_config.json`.

    Args:
        folder: where to.
        model: whose inputs they make.
        processor: transformers' class of the two together, where a model of it is beside them.
    """
    named = {"processor_class": processor} if processor else {}
    length = model.text.context_length
    write_json(folder / "preprocessor_config.json", image_config(model.vision) | named)
    write_json(folder / "tokenizer.json", tokenizer(length))
    write_json(folder / "tokenizer_config.json", tokenizer_config(length) | named)


def image_config(vision: VisionConfig) -> dict[str, Any]:
    """Return what makes a tower's pixels [3, size, size] of an image: the test transform of CLIP."""
    size, (mean, std) = vision.image_size, channel_statistics(vision)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def tokenizer_config(context_length: int) -> dict[str, Any]:
    """Return what transformers' `AutoTokenizer` wants to know beside `tokenizer.json`."""
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": context_length,
    }


def tokenizer(context_length: int) -> dict[str, Any]:
    """Return CLIP's tokenizer in the words of the `tokenizers` library, for captions of a length in tokens."""
    bpe = SimpleTokenizer()
    start, end = bpe.sot_token_id, bpe.eot_token_id
    vocabulary = {token: index for token, index in bpe.encoder.items() if index not in (start, end)}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": context_length, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": context_length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": bpe.decoder[0],
        },
        "added_tokens": [_special(start, START), _special(end, END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, end],
            "cls": [START, start],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": {**vocabulary, START: start, END: end},
            "merges": [" ".join(pair) for pair in bpe.bpe_ranks],
        },
    }


def _special(index: int, token: str) -> dict[str, Any]:
    return {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": True,
    }
