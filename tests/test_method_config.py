"""The keys of the methods beside DAA: what is allowed, what is refused, and in which words."""

import dataclasses
import math
from typing import Any

import pytest

from daa_ext.method_config import (
    METHOD_RULES,
    METHODS,
    PREFIXES,
    MethodSettings,
    refuse_unknown_methods,
)
from daa_ext.methods import MIXINS, mixins

NAN, INF = math.nan, math.inf
SWITCH: dict[str, list[Any]] = {"allowed": [True, False], "forbidden": [0, 1, "true", "", [True]]}
POSITIVE: dict[str, list[Any]] = {
    "allowed": [1e-9, 0.5, 1, 30],
    "forbidden": [0, 0.0, -1, "1", True, NAN, INF, [1.0]],
}
VALUES: dict[str, dict[str, list[Any]]] = {
    **dict.fromkeys(METHODS, SWITCH),
    "talr_tau": POSITIVE,
    "talr_w_min": {
        "allowed": [0, 0.0, 0.01, 1, 1.0],
        "forbidden": [-0.1, 1.01, "0", True, NAN, INF],
    },
    "flow_tau": POSITIVE,
    "flow_cache": {"allowed": ["saves/x", "/x"], "forbidden": ["", " ", 1, True, ["x"]]},
    "l2_init_lambda": POSITIVE,
    "osft_preserved": {
        "allowed": [0.5, 1e-3, 1, 64],
        "forbidden": [0, 0.0, -1, 1.0, 1.5, "0.5", True, NAN, INF],
    },
}
FULL: dict[str, Any] = {"finetuning_type": "full", "stage": "sft"}


def cases(kind: str) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in VALUES.items() for value in values[kind]]


def settings(**given: Any) -> MethodSettings:
    """Settings in which every key of `given` has its switch."""
    switches = {METHOD_RULES[key].switch: True for key in given}
    return MethodSettings(**{**switches, **given})


def test_the_tables_of_this_test_cover_every_rule_and_field() -> None:
    fields = [field.name for field in dataclasses.fields(MethodSettings)]
    assert VALUES.keys() == METHOD_RULES.keys()
    assert list(METHOD_RULES) == fields
    assert {rule.switch for rule in METHOD_RULES.values()} == METHODS.keys()


def test_every_method_has_a_mixin() -> None:
    assert MIXINS.keys() == METHODS.keys()


@pytest.mark.parametrize(("key", "value"), cases("allowed"))
def test_allowed_value_passes_unchanged(key: str, value: Any) -> None:
    found = settings(**{key: value})
    found.resolve_methods(FULL)
    assert getattr(found, key) == value


@pytest.mark.parametrize(("key", "value"), cases("forbidden"))
def test_forbidden_value_names_key_value_and_range(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}=") as caught:
        settings(**{key: value}).resolve_methods(FULL)
    assert str(caught.value).startswith(f"{key}={value!r} is not allowed: ")
    assert METHOD_RULES[key].allowed in str(caught.value)


def test_nothing_given_is_nothing_on() -> None:
    found = MethodSettings()
    found.resolve_methods({"finetuning_type": "lora", "stage": "dpo"})
    assert found.methods() == []
    assert mixins(found) == ()
    assert {name for name, value in vars(found).items() if value is not None} == set(METHODS)


@pytest.mark.parametrize("switch", METHODS)
def test_a_switch_brings_its_mixin_and_its_defaults_alone(switch: str) -> None:
    found = MethodSettings(**{switch: True})
    found.resolve_methods(FULL)
    assert found.methods() == [switch]
    assert mixins(found) == (MIXINS[switch],)
    for name, rule in METHOD_RULES.items():
        if name not in METHODS:
            expected = rule.default if rule.switch == switch else None
            assert getattr(found, name) == expected, name
    found.resolve_methods(FULL)  # as where the host copies its settings
    assert found.methods() == [switch]


@pytest.mark.parametrize("key", [key for key in METHOD_RULES if key not in METHODS])
@pytest.mark.parametrize("off", [{}, {"off": False}])
def test_a_key_without_its_switch_is_refused(key: str, off: dict[str, bool]) -> None:
    switch = METHOD_RULES[key].switch
    value = VALUES[key]["allowed"][0]
    given = {key: value, **({switch: False} if off else {})}
    with pytest.raises(ValueError, match=rf"^{key}={value} has no effect without {switch}: set "):
        MethodSettings(**given).resolve_methods(FULL)


@pytest.mark.parametrize("switch", METHODS)
@pytest.mark.parametrize("kind", ["full", "lora", "freeze", "daa", "oft"])
def test_finetuning_types(switch: str, kind: str) -> None:
    found = MethodSettings(**{switch: True})
    chosen = {"finetuning_type": kind, "stage": "sft", "daa_stage": "auto"}
    if kind in METHODS[switch].finetuning_types:
        found.resolve_methods(chosen)
        return
    with pytest.raises(ValueError, match=f"^{switch}=true cannot go with finetuning_type={kind}"):
        found.resolve_methods(chosen)


@pytest.mark.parametrize("switch", ["use_talr_loss", "use_flow_loss"])
@pytest.mark.parametrize("stage", ["pt", "dpo", "rm", "kto", "ppo"])
def test_losses_are_for_sft(switch: str, stage: str) -> None:
    with pytest.raises(ValueError, match=f"^{switch}=true cannot go with stage={stage}: .* sft"):
        MethodSettings(**{switch: True}).resolve_methods({**FULL, "stage": stage})


@pytest.mark.parametrize("switch", ["use_talr_loss", "use_flow_loss"])
def test_losses_have_no_part_in_an_anchor(switch: str) -> None:
    chosen = {"finetuning_type": "daa", "stage": "sft", "daa_stage": "anchor"}
    with pytest.raises(ValueError, match=f"^{switch}=true has no effect with daa_stage=anchor"):
        MethodSettings(**{switch: True}).resolve_methods(chosen)


@pytest.mark.parametrize(
    ("switch", "other"), [(s, key) for s, method in METHODS.items() for key in method.never]
)
def test_what_cannot_go_together(switch: str, other: str) -> None:
    if other == switch:
        return
    ours = {switch: True, **({other: True} if other in METHODS else {})}
    pair = f"({switch}=true cannot go with {other}=true|{other}=true cannot go with {switch}=true)"
    with pytest.raises(ValueError, match=f"^{pair}: "):
        MethodSettings(**ours).resolve_methods({**FULL, other: True})


def test_the_keys_of_the_host_that_are_refused_exist() -> None:
    from llamafactory.hparams import FinetuningArguments

    known = {field.name for field in dataclasses.fields(FinetuningArguments)}
    assert {key for method in METHODS.values() for key in method.never} <= known


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("use_talr", "use_talr_loss"),
        ("talr_wmin", "talr_w_min"),
        ("talr-tau", "talr_tau"),
        ("use_flow", "use_flow_loss"),
        ("flow_cach", "flow_cache"),
        ("l2_lambda", "l2_init_lambda"),
        ("use_l2", "use_l2_init"),
        ("osft_preserve", "osft_preserved"),
    ],
)
def test_misspelt_key_gets_the_close_one(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"^{typo} is not a setting: did you mean {meant}[?]"):
        refuse_unknown_methods(["stage", "talr_tau", typo])


def test_known_and_foreign_keys_pass() -> None:
    refuse_unknown_methods([*METHOD_RULES, "stage", "daa_k0", "", "lora_rank"])


def test_no_key_of_the_host_is_taken_for_ours() -> None:
    from llamafactory.hparams import parser

    groups = (*parser._TRAIN_ARGS, *parser._INFER_ARGS, *parser._EVAL_ARGS)
    keys = [field.name for group in groups for field in dataclasses.fields(group)]
    assert "use_talr_loss" in keys
    refuse_unknown_methods(keys)
    assert not [k for k in keys if k.startswith(PREFIXES) and k not in METHOD_RULES]
