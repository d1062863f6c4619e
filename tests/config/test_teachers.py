"""Several teachers in the configuration: files and sections, keys of one of them, and what is refused."""

from pathlib import Path

import pytest

from w2s.config.checks import check_settings
from w2s.config.load import load
from w2s.config.naming import difference, digest, written
from w2s.config.teacher_losses import Target
from w2s.errors import ConfigError

TWO = "teachers=[eva02_clip_b, {name: lite, source: efficientnet_lite0, target_norm: standardize}]"


def test_a_list_takes_files_and_sections_and_the_rest_comes_from_other_sections() -> None:
    keys = ["teachers.lite.weight=0.5", "teachers.0.loss=mse", "mim.summary_weight=2", "teachers.lite.summary_weight=0"]
    clip, lite = load("mim", [TWO, *keys, "mim.loss=smooth_l1", "teacher.precision=bf16"]).teacher_losses
    assert clip.teacher.source.startswith("timm:eva02_base_patch16_clip_224@")
    assert (clip.loss, clip.weight, clip.summary_weight) == ("mse", 1.0, 2.0)
    assert (lite.loss, lite.weight, lite.summary_weight) == ("smooth_l1", 0.5, 0.0)
    assert (lite.teacher.target_norm, lite.teacher.precision) == ("standardize", "bf16")
    assert clip.target(768, 512) == Target(768, 512, "eva02_clip_b")
    assert lite.target(1280, 1280) == Target(1280, 0, "lite")


def test_without_a_list_the_only_teacher_is_the_section_teacher() -> None:
    config = load("mim", ["teacher=eva02_clip_b", "teacher.compile=true"])
    (teacher_loss,) = config.teacher_losses
    assert teacher_loss.teacher == config.teacher
    assert config.stage_teachers == (config.teacher,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers=[eva02_clip_c]"], "teacher=eva02_clip_c does not exist: did you mean teacher=eva02_clip_b?"),
        (["teachers=[{sorce: x}]"], "teachers.of: unknown key sorce: did you mean source?"),
        ([TWO, "teachers.lite.wieght=2"], "unknown key teachers.lite.wieght: did you mean teachers.lite.weight?"),
        ([TWO, "teachers.light.weight=2"], "there is no teacher light: did you mean teachers.lite.weight?"),
        (["teachers.lite.weight=2"], "there is no teacher lite: give teachers=.* before it"),
        ([TWO, "teachers.lite.weight=heavy"], "teachers.lite.weight=heavy is not a number"),
        ([TWO, "teachers.draw=two"], "teachers.draw=two is not one of all, one"),
        (
            [TWO, "teachers.lite.loss=l2"],
            "teachers.lite.loss=l2 must be one of cosine, smooth_l1, mse or module:function",
        ),
        ([TWO, "teacher=efficientnet_lite0"], "teacher=efficientnet_lite0 does nothing beside several teachers"),
        ([TWO, "teacher.source=efficientnet_lite0"], "does nothing beside several teachers"),
    ],
)
def test_what_is_written_wrongly_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("mim", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers=[eva02_clip_b, eva02_clip_b]"], "two are called eva02_clip_b"),
        ([TWO, "teachers.lite.name='a/b'"], "name=a/b must be letters"),
        ([TWO, "teachers.lite.weight=0"], "teachers.lite.weight=0 must be above 0"),
        ([TWO, "teachers.lite.summary_weight=-1"], "teachers.lite.summary_weight=-1 must be at least 0"),
        ([TWO, "teachers.lite.image_size=-1"], "teachers.lite.image_size=-1 must be at least 0"),
        ([TWO, "teachers.lite.target_norm=phi_s"], "lite has target_norm=phi_s, a rotation and a scale, which cancel"),
        (["teacher.target_norm=phi_s"], "has target_norm=phi_s"),
        (["init.teacher=lite"], "init.teacher=lite is not for stage mim: "),
        (["teachers.draw=one"], r"teachers.draw=one draws one of several teachers: give teachers=\[...\]"),
        (["teachers=[eva02_clip_b]", "teachers.draw=one"], "teachers.draw=one draws one of several teachers"),
        ([TWO, "teachers.lite.share=2"], "teachers.lite.share=2 does nothing with teachers.draw=all"),
        ([TWO, "teachers.draw=one", "teachers.lite.share=0"], "teachers.lite.share=0 must be above 0"),
        ([TWO, "teachers.draw=one", "teacher.sharded=true"], "teacher.sharded=true with teachers.draw=one: ranks"),
        ([TWO, "teachers.lite.sources=[a]", "teacher.sharded=true"], "teacher.sharded=true with teachers.lite.sources"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(load("mim", overrides))


def test_several_teach_the_masked_stage_alone() -> None:
    with pytest.raises(ConfigError, match="several teach the masked stage alone"):
        check_settings(load("clip", [TWO]))
    with pytest.raises(ConfigError, match=r"init.teacher=lite does nothing with init.vision=none"):
        check_settings(load("clip", ["init.vision=none", "init.teacher=lite"]))


def test_a_file_that_says_more_than_a_teacher_has_no_place_in_a_list(tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text("teacher: {name: more}\nmim: {masked_patches: 3}\n")
    with pytest.raises(ConfigError, match="may have the section teacher alone"):
        load("mim", [f"teachers=[{path}]"])


def test_a_run_from_before_samples_lacked_teachers_resumes() -> None:
    config = load("mim", [TWO])
    saved = written(config)
    del saved["teachers"]["draw"]
    for entry in saved["teachers"]["of"]:
        del entry["share"], entry["sources"]
    assert difference(config, saved) is None
    drawn = load("mim", [TWO, "teachers.draw=one"])
    assert difference(drawn, saved) == ("teachers.draw", None, "one")
    shared = load("mim", [TWO, "teachers.draw=one", "teachers.lite.share=2"])
    assert len({digest(each) for each in (config, drawn, shared)}) == 3


def test_a_run_from_before_there_were_lists_resumes() -> None:
    """Its digest, and so its folder, and what its checkpoint knows of the configuration are what they were."""
    config = load("mim", [])
    saved = written(config)
    del saved["teachers"], saved["init"]["teacher"]
    assert difference(config, saved) is None
    listed = load("mim", ["teachers=[efficientnet_lite0]"])
    assert difference(listed, saved) is not None
    assert digest(listed) != digest(config)
