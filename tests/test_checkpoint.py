"""daa_state.json: what a resumed run must have in common with the one that wrote it."""

import json
from pathlib import Path
from typing import Any

import pytest

from daa_ext import checkpoint
from daa_ext.checkpoint import read_state, refuse_other_sharding, write_state

STAGE = {"stage": "anneal"}
SETTINGS: dict[str, Any] = {"daa_k0": 3.0, "anchor": "ab" * 32, "datasets": ["a", "b"]}
STATE = {**STAGE, **SETTINGS, "records": [{"step": 0, "gamma": 1.0}], "zero_stage": 2, "none": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_state(tmp_path, STATE)
    return tmp_path


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(checkpoint.logger, "warning", said.append)
    return said


# read and write


@pytest.mark.parametrize("force", [False, True])
def test_round_trip(folder: Path, warnings: list[str], force: bool) -> None:
    assert read_state(str(folder), STAGE, SETTINGS, force) == STATE
    assert [path.name for path in folder.iterdir()] == ["daa_state.json"]
    assert warnings == []


@pytest.mark.parametrize("content", [None, "", "{", "no JSON", b"\xff\xfe", "[1]", "3", "null"])
def test_no_checkpoint_of_this_method_is_an_error_that_names_the_folder(
    folder: Path, content: str | bytes | None
) -> None:
    path = folder / "daa_state.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"daa_state.json is missing or damaged") as caught:
        read_state(str(folder), STAGE, SETTINGS, force=True)
    assert f"resume_from_checkpoint={folder}" in str(caught.value)
    assert "overwrite_output_dir: true" in str(caught.value)


@pytest.mark.parametrize("force", [False, True])
def test_another_stage_is_refused_also_by_force(
    folder: Path, warnings: list[str], force: bool
) -> None:
    with pytest.raises(ValueError, match=r"stage=anchor now, but .* had stage=anneal") as caught:
        read_state(str(folder), {"stage": "anchor"}, SETTINGS, force)
    assert "daa_force_resume" not in str(caught.value), "no advice that does not help"
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("daa_k0", 4.0), ("anchor", "cd" * 32), ("datasets", ["a"]), ("new", True), ("daa_k0", None)],
)
def test_another_setting_is_refused_unless_forced(
    folder: Path, warnings: list[str], name: str, value: Any
) -> None:
    settings = {**SETTINGS, name: value}
    with pytest.raises(ValueError, match=f"{name}=.* now, but .* had {name}=") as caught:
        read_state(str(folder), STAGE, settings, force=False)
    for words in (f"{name}={value} now", f"{name}={STATE.get(name)}.", "daa_force_resume: true"):
        assert words in str(caught.value)
    assert warnings == []
    assert read_state(str(folder), STAGE, settings, force=True) == STATE
    assert len(warnings) == 1
    assert f"Going on with {name}={value}" in warnings[0]


def test_force_goes_on_with_each_difference_named(folder: Path, warnings: list[str]) -> None:
    read_state(str(folder), STAGE, {**SETTINGS, "daa_k0": 0.0, "anchor": "ef"}, force=True)
    assert [text.split("Going on with ")[1].split("=")[0] for text in warnings] == [
        "daa_k0",
        "anchor",
    ]


def test_what_is_not_asked_for_may_differ(folder: Path, warnings: list[str]) -> None:
    assert read_state(str(folder), {}, {}, force=False) == STATE
    assert read_state(str(folder), {}, {"none": None, "never written": None}, force=False) == STATE
    assert warnings == []


def test_the_state_is_plain_json(folder: Path) -> None:
    assert json.loads((folder / "daa_state.json").read_text()) == STATE
    with pytest.raises(TypeError):
        write_state(folder, {"records": {1, 2}})


# sharding


Sharding = dict[str, int | None]
NONE_1: Sharding = {"zero_stage": None, "world_size": 1}
NONE_2: Sharding = {"zero_stage": None, "world_size": 2}
ZERO_0: Sharding = {"zero_stage": 0, "world_size": 2}
ZERO_2: Sharding = {"zero_stage": 2, "world_size": 2}
ZERO_2_ON_4: Sharding = {"zero_stage": 2, "world_size": 4}
ZERO_3: Sharding = {"zero_stage": 3, "world_size": 2}


def resume(then: Sharding, now: Sharding, universal: bool) -> None:
    refuse_other_sharding("out/checkpoint-5", {"stage": "anneal", **then}, now, universal)


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize("sharding", [NONE_1, NONE_2, ZERO_0, ZERO_2, ZERO_2_ON_4, ZERO_3])
def test_the_same_sharding_resumes(sharding: Sharding, universal: bool) -> None:
    resume(sharding, dict(sharding), universal)


def test_without_deepspeed_the_ranks_may_change() -> None:
    """The host's own checkpoints are whole."""
    resume(NONE_1, NONE_2, universal=False)
    resume(NONE_2, NONE_1, universal=False)


CHANGED = [
    (ZERO_2, ZERO_2_ON_4, "ZeRO stage 2 on 2 ranks", "ZeRO stage 2 on 4 ranks"),
    (ZERO_2_ON_4, ZERO_2, "ZeRO stage 2 on 4 ranks", "ZeRO stage 2 on 2 ranks"),
    (ZERO_2, ZERO_3, "ZeRO stage 2 on 2 ranks", "ZeRO stage 3 on 2 ranks"),
    (ZERO_0, ZERO_2, "ZeRO stage 0 on 2 ranks", "ZeRO stage 2 on 2 ranks"),
    (ZERO_3, ZERO_2_ON_4, "ZeRO stage 3 on 2 ranks", "ZeRO stage 2 on 4 ranks"),
]


@pytest.mark.parametrize(("then", "now", "was", "has"), CHANGED)
def test_ranks_and_stages_change_only_through_a_universal_checkpoint(
    then: Sharding, now: Sharding, was: str, has: str
) -> None:
    with pytest.raises(ValueError, match="ds_to_universal") as caught:
        resume(then, now, universal=False)
    assert f"out/checkpoint-5 was written by {was}, this run has {has}" in str(caught.value)
    assert '"load_universal": true' in str(caught.value)
    resume(then, now, universal=True)


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize(("then", "now"), [(NONE_2, ZERO_2), (ZERO_2, NONE_2), (NONE_1, ZERO_0)])
def test_deepspeed_cannot_come_or_go(then: Sharding, now: Sharding, universal: bool) -> None:
    with pytest.raises(ValueError, match="Resume with the DeepSpeed setting") as caught:
        resume(then, now, universal)
    assert "no DeepSpeed on" in str(caught.value)
    assert "ds_to_universal" not in str(caught.value), "no advice that does not help"
