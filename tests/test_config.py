"""The daa_* settings: what is allowed, what is refused, and that the refusal says all it must."""

import math
from pathlib import Path
from typing import Any

import pytest

from daa_ext.config import RULES, DaaSettings, refuse_unknown

NAN, INF = math.nan, math.inf

ALLOWED: dict[str, list[Any]] = {
    "daa_stage": ["anchor", "anneal", "auto"],
    "daa_anchor": ["anchors/a", "/x", "a b", "../x"],
    "daa_anchor_dataset": ["general", "one,two"],
    "daa_anchor_max_samples": [1, 10**9],
    "daa_anchor_beta": [0, 0.0, 0.5, 0.999, 1 - 1e-12],
    "daa_rank": [1, 512, 10**6],
    "daa_k0": [0, 0.0, 1e-9, 200, 1e6],
    "daa_c0": [1e-9, 0.01, 1, 5.0],
    "daa_boost_max": [1, 1.0, 2.5, 1e6],
    "daa_radius": [1e-9, 5e-4, 1, 2.0],
    "daa_gga": [True, False],
    "daa_dc": [True, False],
    "daa_force_resume": [True, False],
    "daa_retention_dataset": ["general", "one,two"],
}
FORBIDDEN: dict[str, list[Any]] = {
    "daa_stage": ["", "Anchor", "both", 1, True, ["anchor"]],
    "daa_anchor": ["", "  ", ".", "/", "a/..", 1, True, Path("x"), ["x"]],
    "daa_anchor_dataset": ["", " ", 3, ["general"], True],
    "daa_anchor_max_samples": [0, -1, 1.5, 2.0, "8", True, NAN, INF],
    "daa_anchor_beta": [1, 1.0, -1e-9, 2, "0.9", True, False, NAN, INF, -INF, [0.9]],
    "daa_rank": [0, -1, 1.5, 512.0, "512", True, False, NAN, INF, [512]],
    "daa_k0": [-1, -1e-9, 10**400, "200", True, False, NAN, INF, -INF, [200]],
    "daa_c0": [0, 0.0, -0.01, "0.01", True, False, NAN, INF, -INF, [0.01]],
    "daa_boost_max": [0, 0.99, -2.0, "2", True, NAN, INF, [2.0]],
    "daa_radius": [0, 0.0, -1e-4, "1e-4", True, NAN, INF, [1e-4]],
    "daa_gga": [0, 1, "true", "yes", 0.0, [True]],
    "daa_dc": [0, 1, "false", "", 1.0, [True]],
    "daa_force_resume": [0, 1, "true", "", 1.0, [True]],
    "daa_retention_dataset": ["", " ", 3, ["general"], True],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in table.items() for value in values]


def settings(**given: Any) -> DaaSettings:
    """Settings that name an anchor, in a stage where every key of `given` has an effect."""
    stages = {stage for key in given for stage in RULES[key].stages}
    stage = {"daa_stage": "auto"} if "auto" in stages else {}
    return DaaSettings(**{"daa_anchor": "anchors/a", **stage, **given})


def test_the_tables_of_this_test_cover_every_rule_and_field() -> None:
    assert ALLOWED.keys() == FORBIDDEN.keys() == RULES.keys()
    assert list(RULES) == list(DaaSettings.__dataclass_fields__)


@pytest.mark.parametrize(("key", "value"), cases(ALLOWED))
def test_allowed_value_passes_unchanged(key: str, value: Any) -> None:
    assert getattr(settings(**{key: value}).resolve(), key) == value


@pytest.mark.parametrize(("key", "value"), cases(FORBIDDEN))
def test_forbidden_value_names_key_value_and_range(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}=") as caught:
        settings(**{key: value}).resolve()
    message = str(caught.value)
    assert message.startswith(f"{key}={value!r} ")
    assert RULES[key].allowed in message
    assert "None" not in message


def test_defaults_are_the_table_of_the_design() -> None:
    found = DaaSettings(daa_anchor="anchors/a").resolve()
    assert vars(found) == {
        "daa_stage": "auto",
        "daa_anchor": "anchors/a",
        "daa_anchor_dataset": None,
        "daa_anchor_max_samples": None,
        "daa_anchor_beta": 0.999,
        "daa_rank": 512,
        "daa_k0": 200.0,
        "daa_c0": 0.01,
        "daa_boost_max": None,
        "daa_radius": None,
        "daa_gga": True,
        "daa_dc": True,
        "daa_force_resume": False,
        "daa_retention_dataset": None,
    }


def test_resolve_returns_the_same_object_and_can_be_repeated_per_stage() -> None:
    for stage in ("anchor", "anneal", "auto"):
        asked = DaaSettings(daa_stage=stage, daa_anchor="a")
        assert asked.resolve() is asked
        assert asked.daa_stage == stage


def test_missing_anchor_says_what_to_write() -> None:
    for given in ({}, {"daa_stage": "anneal"}, {"daa_k0": 3.0}):
        with pytest.raises(ValueError, match=r"daa_anchor is not set.*for example.*daa_anchor: "):
            DaaSettings(**given).resolve()


ALL_KEYS = {"daa_force_resume": True}
BUILD_KEYS = {"daa_anchor_beta": 0.9, "daa_rank": 8}
ANNEAL_KEYS: dict[str, Any] = {
    "daa_k0": 3.0, "daa_c0": 0.1, "daa_boost_max": 2.0, "daa_radius": 1e-3, "daa_gga": False,
    "daa_dc": False, "daa_retention_dataset": "general",
}  # fmt: skip
AUTO_KEYS = {"daa_anchor_dataset": "general", "daa_anchor_max_samples": 5}
WITHOUT_EFFECT = [
    *(("anchor", key, value) for key, value in (ANNEAL_KEYS | AUTO_KEYS).items()),
    *(("anneal", key, value) for key, value in (BUILD_KEYS | AUTO_KEYS).items()),
]


@pytest.mark.parametrize(("stage", "key", "value"), WITHOUT_EFFECT)
def test_key_without_effect_in_a_stage_is_refused(stage: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}=.*no effect") as caught:
        DaaSettings(daa_stage=stage, daa_anchor="a", **{key: value}).resolve()  # type: ignore
    message = str(caught.value)
    assert f"{key}={value} " in message
    assert f"daa_stage={stage}" in message
    assert "Remove the key" in message
    for other in ("anchor", "anneal", "auto"):
        assert (other in message.partition("belongs to")[2].split(".")[0]) == (
            other in RULES[key].stages
        )


@pytest.mark.parametrize("stage", ["anchor", "anneal", "auto"])
def test_every_key_that_belongs_to_a_stage_passes_there(stage: str) -> None:
    keys = (
        ALL_KEYS
        | {
            "anchor": BUILD_KEYS,
            "anneal": ANNEAL_KEYS,
            "auto": BUILD_KEYS | ANNEAL_KEYS | AUTO_KEYS,
        }[stage]
    )
    given = {k: v for k, v in keys.items() if k not in ("daa_gga", "daa_dc")}
    found = DaaSettings(daa_stage=stage, daa_anchor="a", **given).resolve()  # type: ignore
    assert {key: getattr(found, key) for key in given} == given


@pytest.mark.parametrize(
    ("key", "switch"),
    [("daa_k0", "daa_gga"), ("daa_c0", "daa_dc"), ("daa_boost_max", "daa_dc")],
)
def test_strength_of_what_is_switched_off_is_refused(key: str, switch: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}=3.0 has no effect with {switch}=false"):
        settings(**{key: 3.0, switch: False}).resolve()
    assert getattr(settings(**{key: 3.0, switch: True}).resolve(), key) == 3.0
    assert getattr(settings(**{switch: False}).resolve(), key) == RULES[key].default


@pytest.mark.parametrize(("key", "value"), [(key, values[-1]) for key, values in ALLOWED.items()])
def test_refuse_names_the_key_and_the_other_method(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="finetuning_type=lora") as caught:
        DaaSettings(**{key: value}).refuse("lora")
    assert str(caught.value).startswith(f"{key}={value}: ")
    assert "Set finetuning_type: daa or remove the key" in str(caught.value)


def test_refuse_has_no_effect_where_nothing_is_set() -> None:
    DaaSettings().refuse("lora")
    assert DaaSettings().given() == []
    assert DaaSettings(daa_gga=False, daa_k0=0.0).given() == ["daa_k0", "daa_gga"]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("daa_ko", "daa_k0"),
        ("daa_ranks", "daa_rank"),
        ("daa_anchor_datasets", "daa_anchor_dataset"),
        ("daa-rank", "daa_rank"),
        ("daa_retention_datset", "daa_retention_dataset"),
        ("daa_aga", "daa_gga"),
        ("daa_resume", "daa_force_resume"),
    ],
)
def test_misspelt_key_gets_the_close_one(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"^{typo} is not a DAA setting: did you mean {meant}[?]"):
        refuse_unknown(["stage", "daa_k0", typo])


def test_far_off_key_gets_all_of_them() -> None:
    with pytest.raises(ValueError, match="daaxyz is not a DAA setting") as caught:
        refuse_unknown(["daaxyz"])
    assert all(key in str(caught.value) for key in RULES)


def test_known_and_foreign_keys_pass() -> None:
    refuse_unknown([*RULES, "stage", "data_seed", "", "lora_rank"])
