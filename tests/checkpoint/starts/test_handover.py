"""From the masked stage to CLIP: what is taken over, what is left, what does not fit."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.megatron.spawn import SHAPE, make_student
from w2s.checkpoint.own.checkpoint_folders import Meta, Saving
from w2s.checkpoint.starts.handover import Handover, hand_over, load_all
from w2s.config.sections import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig, VisionConfig
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint import state
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.parallel.optimizer import Optimizer
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower, shard
from w2s.towers.clip import ImageTower
from w2s.towers.initial import vision_rule


@pytest.fixture
def checkpoint(alone: Ranks, tmp_path: Path) -> Path:
    """A masked student's checkpoint after one step."""
    student = make_student()
    optimizer = Optimizer({"vision": student}, OptimConfig(), torch.float32)
    optimizer.zero_grad()
    optimizer.step(1.0)
    model = {"model": asdict(ModelConfig(name="small", vision=SHAPE))}
    known = Meta(stage="mim", step=1, samples=8, config=model, data={}, parent=None, mlflow_run_id=None, versions={})
    return Saving(
        tmp_path,
        known,
        lambda folder: state.save(folder, {"vision": student}, optimizer, {}),
        CheckpointConfig(),
        ranks=alone,
    ).finish()


def image_tower(shape: VisionConfig) -> ShardedTower[ImageTower]:
    def chunk(index: int) -> ImageTower:
        tower = ImageTower(shape, 16, ParallelConfig(), torch.float32, index)
        init_parameters(tower, vision_rule(shape, post_norm=1.0), seed=77)
        return tower

    return shard(chunk, ParallelConfig(), torch.device("cpu"))


def test_layers_are_taken_over_and_the_head_starts_afresh(checkpoint: Path) -> None:
    sharded, (untouched,) = image_tower(SHAPE), image_tower(SHAPE).chunks
    handover = hand_over(sharded, "vision", checkpoint)
    (tower,) = sharded.chunks
    assert handover.dropped == ["vision.lm_head.bias", "vision.lm_head.weight", "vision.mask_token"]
    assert handover.new == ["vision.head.weight"]
    assert torch.equal(tower.head.weight, untouched.head.weight)
    student = dict(make_student().chunks[0].named_parameters())
    # No weight decay and no gradient: the step before the checkpoint has left the norms and positions alone.
    assert torch.equal(tower.pos_embed, student["pos_embed"])
    assert torch.equal(tower.blocks.layers[1].mlp_bda.norm.weight, student["blocks.layers.1.mlp_bda.norm.weight"])
    assert len(handover.loaded) == len(list(tower.named_parameters())) - 1
    assert [row[:2] for row in handover.rows()] == [["loaded", "23"], ["dropped", "3"], ["new", "1"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 64}, r"is \[.*\] there and \[.*\] here"),
        ({"layers": 3}, r"it has no vision\.blocks\.layers\.2"),
        ({"layers": 1}, r"this model has no vision\.blocks\.layers\.1"),
        ({"norm": "layernorm"}, r"it has no .*bias"),
    ],
)
def test_another_model_is_refused(checkpoint: Path, change: dict[str, object], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        hand_over(image_tower(replace(SHAPE, **change)), "vision", checkpoint)
    assert "use model=small or another checkpoint" in str(error.value) and "\n" not in str(error.value)


def test_a_whole_model_needs_every_tensor(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no vision\.head\.weight"):
        load_all({"vision": image_tower(SHAPE)}, checkpoint)


def test_the_parent_names_the_text_towers_checkpoint_where_it_is_another_one() -> None:
    vision, text = Handover([Path("a")], ["v"], [], []), Handover([Path("b")], ["t"], [], [])
    assert (vision + text).parent == "a and b"
    assert (vision + Handover([Path("a")], ["t"], [], [])).parent == "a"
    assert text.parent == "b"
