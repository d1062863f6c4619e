"""A file that is larger than what the import may hold."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.peers import model_of, released
from w2s.checkpoint.export.weight_files import write_pt, write_safetensors
from w2s.checkpoint.weights.tensor_files import InMemory

GIB = 2**30
WIDTH, MLP, LAYERS = 4096, 32768, 8

IMPORT = """
import sys, threading, time
from pathlib import Path
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.config.sections import ModelConfig, VisionConfig

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
width, mlp, layers = map(int, sys.argv[3:])
vision = VisionConfig(image_size=28, patch_size=14, layers=layers, width=width, heads=32, mlp_width=mlp)
import_checkpoint(Path(sys.argv[1]), ModelConfig(name="wide", embed_dim=64, vision=vision), Path(sys.argv[2]) / "in")
for format in ("eva", "timm"):
    export_checkpoint(Path(sys.argv[2]) / "in", format, Path(sys.argv[2]) / format)
print(peak)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """A vision tower of 5.4 GB in bfloat16."""
    layer = {
        "norm1.weight": (WIDTH,), "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.proj.weight": (WIDTH, WIDTH),
        "attn.proj.bias": (WIDTH,), "norm2.weight": (WIDTH,), "mlp.fc1.weight": (MLP, WIDTH), "mlp.fc1.bias": (MLP,),
        "mlp.fc2.weight": (WIDTH, MLP), "mlp.fc2.bias": (WIDTH,),
    }  # fmt: skip
    outside = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 5, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "head.weight": (64, WIDTH),
    }  # fmt: skip
    inside = {f"blocks.{layer_index}.{name}": shape for layer_index in range(LAYERS) for name, shape in layer.items()}
    return {f"visual.{name}": shape for name, shape in (outside | inside).items()}


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_large_file_is_imported_and_exported_tensor_by_tensor(tmp_path: Path, ending: str) -> None:
    meta = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes().items()}
    largest = max(tensor.numel() * 2 for tensor in meta.values())
    path = tmp_path / f"large{ending}"
    fill = {name: torch.full((1,), index).bfloat16() for index, name in enumerate(meta)}
    tensors = InMemory({name: fill[name].expand(meta[name].shape) for name in meta})
    if ending == ".pt":
        write_pt(path, tensors)
    else:
        write_safetensors(path, tensors, {})
    assert path.stat().st_size > 4 * GIB
    arguments = [sys.executable, "-c", IMPORT, str(path), str(tmp_path), str(WIDTH), str(MLP), str(LAYERS)]
    peak = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert peak <= largest + GIB, f"{peak / GIB:.2f} GiB of anonymous memory"
    exported = torch.load(tmp_path / "eva" / "wide.pt", mmap=True, weights_only=True)
    assert all(bool((exported[name][-1].flatten()[-1:] == fill[name]).all()) for name in meta)


def test_what_is_written_is_what_the_libraries_write(tmp_path: Path) -> None:
    tensors = {name: value.half() if "norm" in name else value for name, value in released(model_of("e")).items()}
    write_safetensors(tmp_path / "a.safetensors", InMemory(tensors), {"model": "x"})
    write_pt(tmp_path / "a.pt", InMemory(tensors))
    for found in (load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "a.pt", weights_only=True)):
        assert found.keys() == tensors.keys()
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items()
        )
