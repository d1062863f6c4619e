"""k-NN of a vision tower on drawn shapes, beside its baselines."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tests.data.shard_files import encode, smooth_photo, write_shard
from tests.stages.shape_images import NAMES, write_shapes
from w2s.config.load import load
from w2s.config.sections import Config, ParallelConfig, Resize
from w2s.evaluation.evaluator import Evaluator
from w2s.evaluation.images import eval_transform
from w2s.evaluation.tower_features import attention_of_cls, patch_features
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower, shard
from w2s.teachers.build import build_teacher
from w2s.towers.clip import ImageTower
from w2s.towers.initial import vision_rule
from w2s.towers.vision import MEAN, STD, VisionTower


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder / "train", shards=2, seed=0)
    write_shapes(folder / "test", shards=1, seed=1)
    shards = [f"eval.shards={folder / 'test'}", f"eval.knn_shards={folder / 'train'}", "data.builtin=none"]
    return load(
        "mim",
        [
            "model=tiny",
            "hardware=cpu",
            "teacher.source=timm:test_vit",
            "teacher.image_size=64",
            "eval.knn_k=3",
            *shards,
        ],
    )


def random_tower(config: Config) -> ShardedTower[VisionTower]:
    def chunk(index: int) -> VisionTower:
        tower = VisionTower(config.model.vision, 1, ParallelConfig(), torch.float32, index)
        init_parameters(tower, vision_rule(config.model.vision, config.init.post_norm), config.run.seed)
        return tower

    return shard(chunk, ParallelConfig(), torch.device("cpu"))


def test_features_are_those_of_the_patches_alone(alone: Ranks, config: Config) -> None:
    evaluator = Evaluator(config, alone)
    (images,) = evaluator.images(evaluator.test_set(), 32).only(np.arange(4)).read()
    assert images.shape == (4, 3, 32, 32)
    tower = random_tower(config)
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(patch_features(tower, images), tower.chunks[0].encode(pixels)[:, 1:])
    teacher = build_teacher(config.teacher, grid=4, device="cpu")
    features = teacher.features_of(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).patches
    black = -torch.tensor(teacher.mean) / torch.tensor(teacher.std)
    torch.testing.assert_close(features, teacher(black.view(1, 3, 1, 1).expand(2, 3, 64, 64)).patches)


def test_the_random_baseline_is_a_tower_with_the_weights_of_the_seed(alone: Ranks, config: Config) -> None:
    evaluator = Evaluator(config, alone)
    measured, baselines = evaluator.evaluate_tower(random_tower(config)), evaluator.baselines()
    assert measured["knn/chance_top1"] == pytest.approx(1 / len(NAMES))
    assert measured["knn/coverage"] == 1
    assert baselines.keys() == {"knn_random/top1", "knn_random/top5", "knn_teacher/top1", "knn_teacher/top5"}
    for top in ("top1", "top5"):
        assert baselines[f"knn_random/{top}"] == measured[f"knn/{top}"]
    assert measured["knn/top5"] >= measured["knn/top1"]


def test_images_that_are_also_the_neighbours_are_found(alone: Ranks, config: Config) -> None:
    evaluator = Evaluator(load_with(config, "knn_shards", config.eval.shards, knn_k=1), alone)
    assert evaluator.evaluate_tower(random_tower(config))["knn/top1"] == 1


def test_nothing_is_measured_without_neighbours_and_no_baselines_where_they_are_not_wanted(
    alone: Ranks, config: Config
) -> None:
    assert Evaluator(load_with(config, "knn_shards", ""), alone).evaluate_tower(random_tower(config)) == {}
    assert Evaluator(load_with(config, "baselines", False), alone).baselines() == {}


def test_neighbours_that_no_test_image_has_a_class_of_are_left_out_with_a_line(
    alone: Ranks, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a user names test sets of his own, and the labelled images are those of the default data set."""
    write_shard(tmp_path / "0.tar", [("a", {"jpg": encode(smooth_photo(), "JPEG"), "txt": b"a cat\na pet"})])
    evaluator = Evaluator(load_with(config, "shards", str(tmp_path)), alone)
    assert evaluator.evaluate_tower(random_tower(config)) == evaluator.baselines() == {}
    (line,) = caplog.messages
    assert line.startswith("no k-NN and linear probe: no test image has a class of eval.knn_shards=")


def test_a_linear_probe_is_measured_beside_k_nn_if_wanted(
    alone: Ranks, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2s.evaluation.scores.linear_probe.STEPS", 10)
    tower = random_tower(config)
    plain, probed = (
        Evaluator(load_with(config, "linear_probe", on), alone).evaluate_tower(tower) for on in (False, True)
    )
    assert {name for name in probed if name not in plain} == {
        f"linear_probe/{name}" for name in ("coverage", "top1", "top5", "mean_per_class", "inverse_strength")
    }
    assert plain == {name: value for name, value in probed.items() if name in plain}


def test_a_set_is_listed_once(alone: Ranks, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(config, alone)
    assert evaluator.test_set() is evaluator.test_set()
    monkeypatch.setattr("w2s.evaluation.evaluator.load_eval_set", None)
    (images,) = evaluator.images(evaluator.test_set(), 16).read()
    assert images.shape == (len(NAMES), 3, 16, 16)
    assert evaluator.test_set().class_names == NAMES


def test_test_images_and_neighbours_are_squashed_alike(alone: Ranks, config: Config, tmp_path: Path) -> None:
    photo = smooth_photo(40, 80)
    write_shard(tmp_path / "wide.tar", [("a", {"png": encode(photo), "txt": b"waves"})])
    pixels = torch.from_numpy(photo).permute(2, 0, 1)
    for how in get_args(Resize):
        evaluator = Evaluator(load_with(config, "resize", how, shards=str(tmp_path), knn_shards=str(tmp_path)), alone)
        for data in (evaluator.test_set(), evaluator.gallery_set()):
            assert torch.equal(evaluator.images(data, 32).read()[0][0], eval_transform(pixels, 32, how))


def load_with(config: Config, key: str, value: Any, **others: Any) -> Config:
    return replace(config, eval=replace(config.eval, **{key: value, **others}))


def test_a_pool_looks_at_patches_as_its_probe_does(alone: Ranks, config: Config) -> None:
    shape = replace(
        config.model.vision,
        kind="siglip",
        norm="layernorm",
        norm_placement="pre",
        qkv_bias=True,
        activation="gelu_tanh",
    )
    tower = ImageTower(shape, shape.width, ParallelConfig(), torch.float32)
    init_parameters(tower, vision_rule(shape, post_norm=1.0), seed=0)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    looks = attention_of_cls(ShardedTower([tower], [tower]), images)
    pixels = 2 * (images / 255) - 1
    pool, tokens = tower.head, tower.patch_tokens(pixels)
    keys = tokens @ pool.kv.weight[: shape.width].T + pool.kv.bias[: shape.width]
    query = pool.q(pool.latent)[0, 0]
    expected = torch.zeros(3, shape.patches)
    for head in range(shape.heads):
        part = slice(head * shape.width // shape.heads, (head + 1) * shape.width // shape.heads)
        scores = (keys[..., part] @ query[part]) / (shape.width // shape.heads) ** 0.5
        expected += scores.exp() / scores.exp().sum(1, keepdim=True) / shape.heads
    torch.testing.assert_close(looks, expected, rtol=1e-5, atol=1e-7)


def test_cls_looks_at_patches_as_the_last_layers_weights_say(alone: Ranks, config: Config) -> None:
    """Recomputed from the hidden tokens with the layer's own norm and projection, softmax written out."""
    tower = random_tower(config)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    part = tower.chunks[0]
    found: list[torch.Tensor] = []
    last = part.blocks.layers[-1]
    handle = last.self_attention.linear_qkv.register_forward_hook(lambda *each: found.append(each[2][0]))
    looks = attention_of_cls(tower, images)
    handle.remove()
    vision = config.model.vision
    heads, tokens = vision.heads, 1 + vision.patches
    query, key, _ = found[0].view(3, tokens, heads, 3, vision.width // heads).unbind(3)
    weights = [
        (query[:, 0, head, None] * key[:, :, head]).sum(-1).div((vision.width // heads) ** 0.5).exp()
        for head in range(heads)
    ]
    expected = sum(each[:, 1:] / each.sum(1, keepdim=True) for each in weights) / heads
    torch.testing.assert_close(looks, expected, rtol=1e-5, atol=1e-7)
    assert looks.shape == (3, vision.patches) and bool((looks.sum(1) < 1).all())
