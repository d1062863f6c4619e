from dataclasses import FrozenInstanceError, is_dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from w2s.cli.data import CAPTION_KEY, IMAGE_KEY
from w2s.config.load import GROUPS, STAGES, load, refuse_expanded_braces, to_yaml
from w2s.config.sections import Config, DataConfig, PhaseConfig
from w2s.data.making.items import IMAGES, VIDEOS
from w2s.errors import ConfigError

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
"""Eleven lines that stand for 31 billion values."""


def names_of(group: str) -> list[str]:
    folder = files("w2s.configs") / group
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def message_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load("mim", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_of_a_stage(stage: str) -> None:
    config = load(stage)
    assert config.stage == stage
    assert config.model.name == "demo"
    assert config.teacher.name == "efficientnet_lite0"
    assert config.data.name == "emoji"
    assert config.hardware.name == "auto"


def test_what_is_loaded_stays_as_it_is() -> None:
    config = load(
        "mim", ["teachers=[eva02_clip_b]", "data.phases=[{samples: 64}, {}]", "mim.layers=[{student: 0, teacher: 1}]"]
    )
    sections = [config]
    while sections:
        section = sections.pop()
        assert is_dataclass(section)
        inner = [part for value in vars(section).values() for part in (value if isinstance(value, list) else [value])]
        sections += [part for part in inner if is_dataclass(part)]
        with pytest.raises(FrozenInstanceError):
            setattr(section, next(iter(vars(section))), None)


def test_the_recipe_of_the_two_training_stages() -> None:
    mim, clip = load("mim"), load("clip")
    assert (mim.optim.name, mim.optim.betas, mim.optim.eps) == ("adamw", (0.9, 0.98), 1e-6)
    assert (mim.optim.weight_decay, mim.optim.clip_grad) == (0.05, 3.0)
    assert (mim.data.crop_scale, mim.data.flip, mim.init.post_norm, mim.init.vision) == ((0.2, 1.0), True, 0.1, "none")
    assert (clip.optim.name, clip.optim.betas, clip.optim.eps) == ("lamb", (0.9, 0.95), 1e-6)
    assert (clip.optim.weight_decay, clip.optim.clip_grad) == (0.0, 5.0)
    assert (clip.data.crop_scale, clip.data.flip, clip.clip.patch_dropout) == ((0.9, 1.0), False, 0.5)
    assert (clip.init.vision, load("eval").init.checkpoint) == ("latest", "latest")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_file_loads_for_every_stage_and_carries_its_name(stage: str, group: str) -> None:
    for name in names_of(group):
        config = load(stage, [f"{group}={name}"])
        assert getattr(config, group).name == name


@pytest.mark.parametrize("name", names_of("data"))
def test_every_data_set_is_read_by_the_keys_that_find_what_is_there(name: str) -> None:
    """With a built-in data set too: its users evaluate on sets of their own, which have other kinds of images."""
    data, default = load("eval", [f"data={name}"]).data, DataConfig()
    assert (data.image_key, data.caption_key) == (default.image_key, default.caption_key)
    assert (default.image_key, default.caption_key) == (IMAGE_KEY, CAPTION_KEY), "those of `w2s data check`"
    assert {*IMAGES, *VIDEOS} <= {*IMAGE_KEY.split(";")}, "all that `w2s data make` writes"


def test_shapes_of_the_published_models() -> None:
    large, small = load("clip", ["model=eva_18b"]), load("clip", ["model=eva_8b"])
    vision = large.model.vision
    assert (vision.layers, vision.width, vision.heads, vision.mlp_width, vision.patches) == (48, 5120, 40, 25600, 256)
    assert (vision.norm_placement, small.model.vision.norm_placement) == ("post", "pre")
    assert (large.model.embed_dim, small.model.embed_dim) == (1536, 1280)
    assert (large.optim.vision_lr, large.optim.text_lr) == (4e-4, 4e-5)
    assert (large.optim.vision_layer_decay, large.optim.text_layer_decay) == (0.9, 0.75)
    assert load("mim", ["model=eva_18b"]).mim.masked_patches == 105


def test_later_layers_win(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("optim: {lr: 7.0, warmup: 3}\non_stage:\n  mim: {optim: {lr: 8.0}}\n  clip: {optim: {lr: 9.0}}\n")
    assert load("mim").optim.lr == 2e-3
    assert (load("mim", [f"model={own}"]).optim.lr, load("clip", [f"model={own}"]).optim.lr) == (8.0, 9.0)
    assert load("eval", [f"model={own}"]).optim.lr == 7.0
    assert load("mim", ["optim.lr=1", f"model={own}", "optim.lr=2"]).optim.lr == 2.0
    assert load("mim", [f"model={own}"]).optim.warmup == 3
    hardware = tmp_path / "hardware.yaml"
    hardware.write_text("optim: {lr: 5.0}\n")
    assert load("mim", [f"hardware={hardware}", f"model={own}"]).optim.lr == 5.0


def test_the_last_choice_of_a_group_wins() -> None:
    assert load("mim", ["model=eva_18b", "model=tiny"]).model.name == "tiny"


def test_text_is_taken_as_it_stands_and_numbers_are_read() -> None:
    config = load("mim", ["data.train={000..163}.tar::b", "run.name=007", "eval.shards=", "optim.lr=1e-4"])
    assert (config.data.train, config.run.name) == ("{000..163}.tar::b", "007")
    assert (config.eval.shards, config.optim.lr) == ("", 1e-4)
    config = load("mim", ["optim.betas=[0.8,0.9]", "optim.vision_lr=null", "data.flip=false"])
    assert (config.optim.betas, config.optim.vision_lr, config.data.flip) == ((0.8, 0.9), None, False)


def test_named_test_sets() -> None:
    config = load("eval", ["data.cache=/mine", "eval.sets={a: '${data.cache}/{00..09}.tar', b: /b}"])
    assert config.eval.sets == {"a": "/mine/{00..09}.tar", "b": "/b"} == config.eval.by_name
    assert load("eval", ["eval.shards=/c"]).eval.by_name == {"": "/c"}
    assert load("eval", ["eval.shards="]).eval.by_name == {}


def test_interpolations_are_resolved_after_the_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2S_CACHE", "/from/environment")
    assert load("mim").data.train == "/from/environment/emoji-2/train"
    assert load("mim", ["data.cache=/mine"]).eval.shards == "/mine/emoji-2/tune"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz: did you mean train.steps?"),
        ("optimizer.lr=3", "unknown key optimizer.lr: did you mean optim.lr?"),
        ("lr=3", "unknown key lr: did you mean optim.lr?"),
        ("modle=tiny", "unknown key modle: did you mean model?"),
        ("vision.width=4", "unknown key vision.width: did you mean model.vision.width?"),
        ("train.steps.x=3", "unknown key train.steps.x: did you mean train.steps?"),
        ("train.steps=abc", "train.steps=abc is not a whole number"),
        ("optim.vision_lr=x", "optim.vision_lr=x is not a number or null"),
        ("data.flip=maybe", "data.flip=maybe is not true or false"),
        ("optim.name=sgd", "optim.name=sgd is not one of adamw, lamb"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] is not a list of 2 numbers"),
        ("eval.sets=3", "eval.sets=3 is not a mapping such as {name: text}"),
        ("eval.sets={a/b: c}", "eval.sets: 'a/b' is not a name of a test set: use letters, digits, _ and -"),
        ("train=5", "train=5: train is a section, set one of its keys, such as train.steps"),
        ("train.steps", "override 'train.steps' is not of the form key=value, such as train.steps=100"),
        ("=3", "override '=3' is not of the form key=value, such as train.steps=100"),
        ("stage=clip", "stage=clip: the stage is chosen by the command, as in `w2s stage clip`"),
        ("train.steps=[1,2", "train.steps=[1,2 is not valid YAML: while parsing a flow sequence"),
        ("data.cache=${foo.bar}", "data.cache cannot be resolved: Interpolation key 'foo.bar' not found"),
        ("model.vision.patch_size=0", "model.vision.patch_size=0 must be at least 1"),
        ("hardware=h200", "hardware=h200 does not exist: did you mean hardware=h100? There are auto, cpu, h100,"),
        ("data.phases=&a [*a]", "data.phases=&a [*a] is not valid YAML: a list or mapping names itself"),
        (f"data.weights={'[' * 3000}", f"data.weights={'[' * 80} is not valid YAML: "),
        ("train.steps=99999999999999999999", "train.steps is a number of 67 bits, more than the 64 that there are"),
        ("checkpoint.keep_at=[1, 99999999999999999999]", "checkpoint.keep_at is a number of 67 bits"),
        ("data.phases=[{samples: 99999999999999999999}]", "data.phases.samples is a number of 67 bits"),
        (f"train.steps={'9' * 5000}", f"train.steps={'9' * 80} is not valid YAML: Exceeds the limit"),
        ("run.name=../x", "run.name=../x is not a folder name"),
        ("run.group=../../x", "run.group=../../x is not a folder name"),
        ("model.name=../../x", "model.name=../../x is not a folder name"),
        ("run.name=a\x1b[2J", "run.name=a\x1b[2J is not a folder name"),
        (f"run.name={'x' * 300}", f"run.name={'x' * 80}... is longer than 180 bytes: shorten it"),
        ("model=/nowhere/x.yaml", "model=/nowhere/x.yaml cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    assert message_of(override).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {name: [\n", "is not valid YAML: did not find expected node content in line 2"),
        ("- a\n", "holds a list: write `key: value` lines"),
        ("model: {nam: x}\n", "unknown key model.nam: did you mean model.name?"),
        ("model: {width: 3}\n", "unknown key model.width: did you mean model.text.width?"),
        ("train: {steps: many}\n", "train.steps=many is not a whole number"),
        ("train: {steps: {a: 1}}\n", "train.steps={'a': 1} is not a whole number"),
        ("data: &a\n  phases: [*a]\n", "is not valid YAML: a list or mapping names itself, or too many others"),
        (LAUGHS, "is not valid YAML: a list or mapping names itself, or too many others"),
        ("on_stage: {pretrain: {}}\n", "on_stage takes sections below mim, clip, eval, not {'pretrain': {}}"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    text = message_of(f"model={path}")
    assert str(path) in text
    assert text.endswith(message)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load("mim", [f"hardware={path}"]).train == load("mim").train


def test_an_unknown_stage() -> None:
    with pytest.raises(ConfigError, match="stage pretrain does not exist: did you mean eval"):
        load("pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_yaml_and_back(stage: str, tmp_path: Path) -> None:
    config = load(stage, ["optim.betas=[0.8,0.9]", "data.train=a::b", "optim.text_lr=null"])
    text = to_yaml(config)
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))) == config
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert load(stage, [f"hardware={path}"]) == config


def test_braces_that_the_shell_expanded_are_refused() -> None:
    refuse_expanded_braces(["optim.lr=1", "optim.lr=2", "data.train={0..1}.tar", "run.seed=1", "data.train=0.tar"])
    with pytest.raises(ConfigError, match=r"^data\.train is given twice \(0\.tar and 1\.tar\): quote braces"):
        refuse_expanded_braces(["optim.lr=1", "data.train=0.tar", "data.train=1.tar", "data.train=2.tar"])


def test_a_group_file_does_not_choose_the_stage(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("stage: clip\n")
    with pytest.raises(ConfigError, match=r"whole\.yaml is for stage clip, not for mim"):
        load("mim", [f"model={tmp_path / 'whole.yaml'}"])


def test_a_list_of_shards_in_a_file_is_several_sources(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data:\n  train: [a/, 'b/{0..3}.tar']\n  weights: [0.25, 0.75]\n"
        "  phases: [{samples: 64, train: [c/, d/], weights: [0.5, 0.5]}, {}]\n"
    )
    data = load("mim", [f"data={path}"]).data
    assert (data.train, data.weights) == ("a/::b/{0..3}.tar", [0.25, 0.75])
    assert data.phases == [PhaseConfig(samples=64, train="c/::d/", weights=[0.5, 0.5]), PhaseConfig()]


def test_phases_are_typed_sections() -> None:
    config = load("clip", ["data.phases=[{samples: 512, patch_dropout: 0.5}, {train: b, crop_scale: [0.8, 1]}]"])
    assert config.data.phases == [
        PhaseConfig(samples=512, patch_dropout=0.5),
        PhaseConfig(train="b", crop_scale=(0.8, 1.0)),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.phases=[{sample: 64}]", r"^data.phases: unknown key sample: did you mean samples\?$"),
        ("data.phases=[{samples: x}]", "is not a list of sections with keys such as samples"),
        ("data.phases=3", "is not a list of sections"),
        ("data.phases=[{samples: -1}]", "samples=-1 must be at least 0"),
        ("data.phases=[{crop_scale: [0.9, 0.5]}]", "crop_scale"),
        ("data.phases=[{patch_dropout: 1}]", r"patch_dropout=1 must be in \[0, 1\)"),
        ("data.weights=[1, 3]", r"data.weights=\[1, 3\] are not probabilities that sum to 1: use \[0.25, 0.75\]"),
        ("data.weights=[1.5, -0.5]", "use only numbers above 0"),
        ("data.weights=half", "data.weights=half is not a list, each entry a number"),
        ("data.caption_weights=[0.5, 0.5]", "are not one for each of data.caption_key=txt;text;caption: give 3"),
    ],
)
def test_sources_and_phases_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("clip", [override])
