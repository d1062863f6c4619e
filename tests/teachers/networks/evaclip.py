"""EVA-CLIP's own folders of transformers: the computation of their vision tower, written after its description."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "max_position_embeddings": 8, "hidden_act": "gelu", "projection_dim": 12, "eos_token_id": 2,
}  # fmt: skip
WIDTH, HEADS, LAYERS, PATCH, SIDE, EMBED = 32, 2, 2, 8, 32, 12


class Layer(nn.Module):
    """A layer whose norms come before its branches or after them."""

    def __init__(self, placement: str) -> None:
        super().__init__()
        self.after = placement == "post"
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(WIDTH, WIDTH, bias=name == "out") for name in ("q", "k", "v", "out")}
        )
        self.layer_norm1, self.layer_norm2 = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 5 * WIDTH), "fc2": nn.Linear(5 * WIDTH, WIDTH)})

    def forward(self, tokens: Tensor) -> Tensor:
        """One layer, [n, tokens, width] to the same."""
        for branch, norm in ((self.attention, self.layer_norm1), (self.hidden, self.layer_norm2)):
            tokens = tokens + (norm(branch(tokens)) if self.after else branch(norm(tokens)))
        return tokens

    def attention(self, tokens: Tensor) -> Tensor:
        q, k, v = (self.self_attn[f"{name}_proj"](tokens).unflatten(2, (HEADS, -1)).transpose(1, 2) for name in "qkv")
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return self.self_attn["out_proj"]((weights @ v).transpose(1, 2).flatten(2))

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.mlp["fc2"](F.gelu(self.mlp["fc1"](tokens)))


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position_embedding = nn.Embedding(1 + (SIDE // PATCH) ** 2, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).mT
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], 1)
        return tokens + self.position_embedding.weight


class EvaClip(nn.Module):
    """The towers and projections under the names in the folder; the text tower is transformers' own of a CLIP."""

    def __init__(self, placement: str) -> None:
        super().__init__()
        encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(placement) for _ in range(LAYERS))})
        self.vision_model = nn.ModuleDict(
            {"embeddings": Embeddings(), "encoder": encoder, "post_layernorm": nn.RMSNorm(WIDTH, 1e-6)}
        )
        self.visual_projection = nn.Linear(WIDTH, EMBED, bias=False)
        self.text = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        """Every token of images as if it were the class token's: [n, 1 + P, embed]."""
        tokens = self.vision_model["embeddings"](images)
        for layer in self.vision_model["encoder"]["layers"]:
            tokens = layer(tokens)
        return self.visual_projection(self.vision_model["post_layernorm"](tokens))


def save_evaclip(placement: str) -> Callable[[Path], EvaClip]:
    """What saves such a folder, its weights in two files, as the released ones are in several."""

    def save(folder: Path) -> EvaClip:
        torch.manual_seed(0)
        model = EvaClip(placement).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        state = {name.removeprefix("text."): value for name, value in model.state_dict().items()}
        names = sorted(state)
        halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, held in halves.items():
            save_file({name: state[name].contiguous() for name in held}, folder / file, {"format": "pt"})
        index = {"weight_map": {name: file for file, held in halves.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        vision = {
            "hidden_size": WIDTH, "image_size": SIDE, "patch_size": PATCH, "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS, "post_layernorm": placement == "post", "use_rms_norm": True,
        }  # fmt: skip
        settings = {
            "architectures": ["EvaCLIPModel"],
            "auto_map": {"AutoModel": "modeling_evaclip.EvaCLIPModel"},
            "model_type": "clip",
            "vision_config": vision,
        }
        (folder / "config.json").write_text(json.dumps(settings))
        return model

    return save
