"""The laws of the method, through stock LLaMA-Factory on a real (tiny) Llama."""

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from host import Host, anchor_of, distance, report, same, steps, weights
from reference import Sample
from transformers import AutoModelForCausalLM, TrainerCallback

from daa_ext.artifact import read_manifest

DENSE = 10**6  # a rank whose factors never pay: every parameter is stored as it is


def samples(host: Host, name: str) -> list[Sample]:
    """The samples of a data set as LLaMA-Factory tokenizes them."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    arguments = host.arguments("tokenize", dataset=name)
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    loaded = get_dataset(template, model_args, data_args, training_args, "sft", **module)
    return list(loaded["train_dataset"])


def batches(all_samples: list[Sample], size: int) -> list[list[Sample]]:
    return [all_samples[i : i + size] for i in range(0, len(all_samples), size)]


def float64_model(host: Host) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(host.model).double()


def start(host: Host) -> dict[str, torch.Tensor]:
    return weights(host.model)


class Watch(TrainerCallback):
    """Copies of the weights in the trainer before the first and after the last step."""

    def on_train_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_train_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.after = {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_law_1_no_effect_without_anchor_and_correction(host: Host, max_grad_norm: float) -> None:
    host.anchor()
    plain = host.run(host.arguments("plain", max_grad_norm=max_grad_norm, disable_shuffling=False))
    common: dict[str, Any] = {"max_grad_norm": max_grad_norm, "disable_shuffling": False}
    off = host.run(host.daa("off", "anneal", daa_k0=0.0, daa_dc=False, **common))
    assert same(weights(plain), weights(off))
    for name, change in {"dc": {"daa_k0": 0.0}, "gga": {"daa_k0": 3.0, "daa_dc": False}}.items():
        on = host.run(host.daa(name, "anneal", **change, **common))
        assert not same(weights(plain), weights(on)), f"{name} must have an effect"


def test_law_1_with_8_bit_adam(host: Host) -> None:
    """bitsandbytes reads lr, eps and decay from the group at each step, like torch's AdamW."""
    pytest.importorskip("bitsandbytes", reason="pip install 'daa_ext[8bit]'")
    host.anchor()
    plain = host.run(host.arguments("plain", optim="adamw_8bit"))
    off = host.run(host.daa("off", "anneal", daa_k0=0.0, daa_dc=False, optim="adamw_8bit"))
    on = host.run(host.daa("on", "anneal", optim="adamw_8bit"))
    exact = host.run(host.daa("exact", "anneal", optim="adamw_torch"))
    assert same(weights(plain), weights(off))
    assert distance(weights(on), weights(exact), start(host)) < 0.2  # 8-bit states
    assert distance(weights(plain), weights(exact), start(host)) > 0.5


@pytest.mark.parametrize(
    ("name", "yaml", "settings"),
    [
        ("all", {}, {}),
        ("gga", {"daa_dc": False}, {"dc": False}),
        ("dc", {"daa_gga": False}, {"gga": False}),
        ("unclipped", {"max_grad_norm": 0.0}, {"max_norm": 0.0}),
        ("decay", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ("capped", {"daa_k0": 20.0}, {"daa_k0": 20.0}),
        ("boost", {"daa_boost_max": 1.5}, {"boost_max": 1.5}),
        ("radius", {"daa_radius": 1e-2}, {"radius": 1e-2}),
        ("no boost", {"daa_boost_max": 1}, {"boost_max": 1.0}),
        (
            "accumulated",
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            {},
        ),
        ("loop", {"optim": "adamw_torch"}, {}),
    ],
)
def test_law_2_the_equations_written_out(
    host: Host, name: str, yaml: dict[str, Any], settings: dict[str, Any]
) -> None:
    host.anchor(daa_rank=DENSE)
    model = float64_model(host)
    general = batches(samples(host, "general"), 8)
    expected_anchor = reference.anchor(model, general, beta=0.999)
    # Adam divides by sqrt(v): a larger eps keeps rounding noise in zero gradients from showing.
    eps = 1e-5
    decayed = [n for n, p in model.named_parameters() if p.ndim > 1]
    history = reference.anneal(
        model,
        batches(samples(host, "domain"), 8),
        expected_anchor,
        reference.Settings(eps=eps, **settings),
        decayed,
    )
    out = host.run(host.daa("run", "anneal", adam_epsilon=eps, **yaml))
    expected = dict(model.named_parameters())
    assert distance(weights(out), expected, start(host)) < 1e-5
    for found, wanted in zip(steps(out), history, strict=True):
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-6)


def test_a_cap_on_the_boost_that_is_never_reached_has_no_effect(host: Host) -> None:
    host.anchor()
    runs = {value: host.run(host.daa(f"run{value}", "anneal", daa_boost_max=value))
            for value in (None, 1e6, 2.0, 1.0)}  # fmt: skip
    assert same(weights(runs[None]), weights(runs[1e6]))
    assert steps(runs[None]) == steps(runs[1e6])
    for value in (2.0, 1.0):
        assert not same(weights(runs[None]), weights(runs[value]))
        rates = [1e-3 * (1 - t / 6) for t in range(6)]
        for step, rate in zip(steps(runs[value]), rates, strict=True):
            assert step["correction"] == max(step["similarity"] + 0.01, 1 / value**2)
            assert step["effective_lr"] == pytest.approx(rate / step["correction"] ** 0.5)
        assert report(runs[value])["boost_max"] == value
    assert report(runs[None])["boost_max"] is None


def test_a_radius_holds_and_one_that_is_never_reached_has_no_effect(host: Host) -> None:
    host.anchor()
    runs = {value: host.run(host.daa(f"run{value}", "anneal", daa_radius=value))
            for value in (None, 1e3, 1e-2)}  # fmt: skip
    assert same(weights(runs[None]), weights(runs[1e3]))
    assert report(runs[None])["radius"] is None
    assert report(runs[1e3])["steps_held"] == 0
    held = report(runs[1e-2])
    norm = sum(float(w.double().square().sum()) for w in start(host).values()) ** 0.5
    assert held["radius"] == pytest.approx(1e-2 * norm)
    assert 0 < held["steps_held"] < held["total_steps"]
    # Weights are drawn back before a step, so one Adam step of at most 1.2 rates per weight is free
    elements = sum(w.numel() for w in start(host).values())
    rates = [0.0, *(step["effective_lr"] for step in steps(runs[1e-2]))]
    gone = [*(step["distance"] for step in steps(runs[1e-2])), held["distance"]]
    for rate, distance_t in zip(rates, gone, strict=True):
        assert distance_t <= held["radius"] + 1.2 * rate * elements**0.5
    assert held["distance"] < 0.5 * report(runs[1e3])["distance"]
    found = weights(runs[1e-2])
    moved = sum(float((found[n] - w).double().square().sum()) for n, w in start(host).items())
    assert held["distance"] == pytest.approx(moved**0.5, rel=1e-4)


def test_law_2_low_rank_anchor_is_the_truncated_one(host: Host) -> None:
    """Rank 4: the run equals the reference with the anchor multiplied out from its factors."""
    folder = host.anchor(daa_rank=4)
    manifest = read_manifest(folder)
    kinds = {entry["kind"] for entry in manifest.tensors.values()}
    assert kinds == {"factors", "dense"}
    model = float64_model(host)
    truncated = {name: dense.double() for name, dense in anchor_of(folder).items()}
    data = batches(samples(host, "domain"), 8)
    reference.anneal(model, data, truncated, reference.Settings(eps=1e-5))
    out = host.run(host.daa("run", "anneal", adam_epsilon=1e-5))
    assert distance(weights(out), dict(model.named_parameters()), start(host)) < 1e-5


@pytest.mark.parametrize(
    ("size", "accumulation", "beta"), [(8, 1, 0.999), (2, 4, 0.999), (8, 1, 0.0)]
)
def test_law_5_the_anchor_is_the_mean_gradient_and_no_weight_moves(
    host: Host, size: int, accumulation: int, beta: float
) -> None:
    watch = Watch()
    run = host.daa(
        "anchor_run", "anchor", daa_rank=DENSE, daa_anchor_beta=beta, learning_rate=1.0,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    out = host.run(run, watch)
    folder = host.folder / "anchor"
    assert same(start(host), watch.before)
    assert same(watch.before, watch.after)
    model = float64_model(host)
    expected = reference.anchor(model, batches(samples(host, "general"), 8), beta)
    manifest = read_manifest(folder)
    zero = {n: torch.zeros_like(g) for n, g in expected.items()}
    assert distance(anchor_of(folder), expected, zero) < 1e-5
    assert (manifest.steps, manifest.samples) == (3, 24)
    assert manifest.norm == pytest.approx(reference.inner(expected, expected) ** 0.5, rel=1e-5)
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("*.bin"))


def test_law_6_every_element_is_anchored(host: Host) -> None:
    host.anchor()
    content = report(host.run(host.daa("run", "anneal")))
    elements = sum(w.numel() for w in start(host).values())
    assert content["anchored_params"] == content["trainable_params"] == elements
    assert content["domain_only"] is True
    assert content["anchor_bytes_per_rank"] == [content["anchor_bytes_total"]]
    assert 0.0 < content["similarity_mean"] < 1.0


@pytest.mark.parametrize("step", [1, 3, 5])
def test_law_7_resume_of_the_annealing_is_bitwise(host: Host, step: int, tmp_path: Path) -> None:
    host.anchor()
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "disable_shuffling": False}
    whole = host.run(host.daa("whole", "anneal", **saving))
    again = host.daa(
        "again", "anneal", resume_from_checkpoint=str(whole / f"checkpoint-{step}"), **saving
    )
    resumed = host.run(again)
    assert same(weights(whole), weights(resumed))
    assert steps(whole) == steps(resumed)


@pytest.mark.parametrize("step", [1, 2])
def test_law_7_resume_of_the_anchor_is_bitwise(host: Host, step: int) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "disable_shuffling": False}
    whole = host.anchor(**saving)
    checkpoint = host.folder / "anchor_run" / f"checkpoint-{step}"
    host.run(
        host.daa(
            "again",
            "anchor",
            daa_anchor=str(host.folder / "anchor2"),
            resume_from_checkpoint=str(checkpoint),
            **saving,
        )
    )
    again = host.folder / "anchor2"
    assert same(weights(whole), weights(again))
    first, second = read_manifest(whole), read_manifest(again)
    assert (first.samples, first.tokens, first.steps) == (second.samples, second.tokens, 3)


def test_auto_is_anchor_then_anneal(host: Host) -> None:
    shuffled: dict[str, Any] = {"disable_shuffling": False}
    host.anchor(**shuffled)
    apart = host.run(host.daa("apart", "anneal", **shuffled))
    auto = host.daa(
        "auto", "auto", daa_anchor=str(host.folder / "auto_anchor"), daa_anchor_dataset="general",
        **shuffled,
    )  # fmt: skip
    together = host.run(auto)
    assert same(weights(host.folder / "anchor"), weights(host.folder / "auto_anchor"))
    assert same(weights(apart), weights(together))
