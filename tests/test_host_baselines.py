"""The baselines that LLaMA-Factory itself has: that they act, and what 0.9.5 gets wrong.

A test of the second kind that fails is good news: its example can lose the note on it.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from host import Host, same, weights

EVALUATED: dict[str, Any] = {"eval_dataset": "domain_test", "eval_strategy": "epoch"}
LOSSES = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row[key] for row in history if key in row]


def run(host: Host, name: str, **changes: Any) -> Path:
    return host.run(host.arguments(name, max_steps=2, **changes))


@pytest.mark.parametrize("switch", LOSSES)
def test_the_loss_is_another_from_the_first_step_on(host: Host, switch: str) -> None:
    plain, other = run(host, "plain"), run(host, "other", **{switch: True})
    assert logged(other, "loss")[0] != pytest.approx(logged(plain, "loss")[0], rel=1e-3)
    assert not same(weights(plain), weights(other))


@pytest.mark.parametrize("switch", ["use_dft_loss", "use_eaft_loss"])
def test_their_evaluation_is_weighted_too(host: Host, switch: str) -> None:
    """So eval_loss cannot be compared with a plain run's."""
    out = run(host, "run", **{switch: True}, **EVALUATED)
    plain = host.arguments(
        "plain", model_name_or_path=str(out), do_train=False, do_eval=True, dataset=None,
        eval_dataset="domain_test",
    )  # fmt: skip
    results = json.loads((host.run(plain) / "eval_results.json").read_text())
    assert logged(out, "eval_loss")[-1] != pytest.approx(results["eval_loss"], rel=1e-3)


def test_asft_cannot_be_evaluated(host: Host) -> None:
    with pytest.raises(TypeError, match="iteration over a 0-d tensor"):
        run(host, "run", use_asft_loss=True, **EVALUATED)


def test_asft_adds_up_what_accumulation_should_average(host: Host) -> None:
    """All answers of the tiny data have about one length, so the mean of the means is the mean."""
    whole = run(host, "whole", use_asft_loss=True)
    halves = run(host, "halves", use_asft_loss=True, per_device_train_batch_size=4,
                 gradient_accumulation_steps=2)  # fmt: skip
    ratio = logged(halves, "grad_norm")[0] / logged(whole, "grad_norm")[0]
    assert ratio == pytest.approx(2.0, rel=0.1)
    plain = run(host, "plain")
    split = run(host, "split", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    ratio = logged(split, "grad_norm")[0] / logged(plain, "grad_norm")[0]
    assert ratio == pytest.approx(1.0, rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("apollo_torch") is None, reason="needs apollo-torch")
def test_apollo_acts_on_the_cpu_and_needs_its_optimizer_named(host: Host) -> None:
    apollo: dict[str, Any] = {"use_apollo": True, "apollo_rank": 8, "optim": "adamw_torch"}
    plain, out = run(host, "plain", optim="adamw_torch"), run(host, "run", **apollo)
    start = weights(host.model)
    moved = {n for n, w in weights(out).items() if not same({n: w}, {n: start[n]})}
    assert moved == start.keys()
    assert not same(weights(plain), weights(out))
    with pytest.raises(NotImplementedError, match="Unknown optim"):
        run(host, "fused", use_apollo=True)


def test_freeze_trains_the_last_layer_alone(host: Host) -> None:
    out = run(host, "run", finetuning_type="freeze", freeze_trainable_layers=1)
    start = weights(host.model)
    moved = {n for n, w in weights(out).items() if not same({n: w}, {n: start[n]})}
    assert moved == {n for n in start if n.startswith("model.layers.1.")}
