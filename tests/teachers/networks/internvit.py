"""InternViT's own folders: the computation of the tower, written after its description."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, PATCH, SIDE = 32, 2, 2, 8, 32


class Attention(nn.Module):
    """Attention whose queries and keys may be normed over all heads."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=not large), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH, 1e-6) if large else nn.Identity() for _ in "qk")

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, tokens, width] to the same."""
        q, k, v = self.qkv(tokens).chunk(3, 2)
        q, k, v = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (self.q_norm(q), self.k_norm(k), v))
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A layer with scaled branches."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        self.attn = Attention(large)
        self.norm1, self.norm2 = ((nn.RMSNorm if large else nn.LayerNorm)(WIDTH, 1e-6) for _ in "12")
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 64), "fc2": nn.Linear(64, WIDTH)})
        self.ls1, self.ls2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, tokens, width] to the same."""
        tokens = tokens + self.attn(self.norm1(tokens)) * self.ls1
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens)))) * self.ls2


class InternViT(nn.Module):
    """The tower under the names in the folder: of the 300M's kind, or of the 6B's."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.embeddings.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, 1 + (SIDE // PATCH) ** 2, WIDTH))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(large) for _ in range(LAYERS))})

    def forward(self, images: Tensor) -> Tensor:
        """Images to tokens [n, 1 + P, width]."""
        patches = self.embeddings.patch_embedding(images).flatten(2).mT
        tokens = torch.cat([self.embeddings.class_embedding.expand(len(images), -1, -1), patches], 1)
        tokens = tokens + self.embeddings.position_embedding
        for layer in self.encoder["layers"]:
            tokens = layer(tokens)
        return tokens


def save_internvit(large: bool) -> Callable[[Path], InternViT]:
    """What saves such a folder; the large one as a part of an InternVL."""

    def save(folder: Path) -> InternViT:
        torch.manual_seed(0)
        model = InternViT(large).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        vision = {
            "model_type": "intern_vit_6b", "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "image_size": SIDE,
            "num_attention_heads": HEADS, "intermediate_size": 64, "patch_size": PATCH, "layer_norm_eps": 1e-6,
            "hidden_act": "gelu", "qkv_bias": not large, "qk_normalization": large,
            "norm_type": "rms_norm" if large else "layer_norm",
        }  # fmt: skip
        whole = {"model_type": "internvl_chat", "vision_config": vision} if large else vision
        (folder / "config.json").write_text(json.dumps({**whole, "auto_map": {"AutoModel": "modeling_intern_vit.M"}}))
        prefix = "vision_model." if large else ""
        state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        save_file(state | ({"mlp1.0.weight": torch.zeros(4)} if large else {}), folder / "model.safetensors")
        return model

    return save
