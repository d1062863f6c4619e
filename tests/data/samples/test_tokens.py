import os
import subprocess
import sys

import torch

from w2s.data.samples.tokens import tokenize

CAPTIONS = [
    "a photo of a cat",
    "  Übergroße   KATZE &amp; dog\u2019s “toy” ",
    "x",
    "a very long caption " * 30,
    "数字 12345 🦘",
]


def test_tokens_equal_open_clips() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    reference = SimpleTokenizer()
    for length in (16, 77):
        tokens = tokenize(CAPTIONS, length)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, reference(CAPTIONS, context_length=length))


def test_a_cut_caption_keeps_its_end_token() -> None:
    tokens = tokenize(CAPTIONS, 16)
    assert tokens.shape == (5, 16)
    assert tokens[3, 0] == 49406
    assert tokens[3, -1] == 49407
    assert tokens.argmax(dim=1).tolist()[2:4] == [2, 15]


def test_open_clip_itself_is_not_imported() -> None:
    code = "import sys; from w2s.data.samples.tokens import tokenize; tokenize(['a'], 8); print('timm' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert output.stdout.strip() == "False"
