"""TALR and FLOW through stock LLaMA-Factory: against float64 loops, beside DAA, in evaluation."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from host import Host, anchor_of, distance, same, weights
from reference import Gradients, Sample
from test_laws import DENSE, batches, float64_model, samples, start

BOUND, EPS = 1e-5, 1e-5  # as for law 2
Losses = list[torch.Tensor]  # of the labelled tokens, by sample
Weigh = Callable[[Sequence[Sample], Losses], Losses]


def losses_of(model: torch.nn.Module, batch: Sequence[Sample]) -> Losses:
    found = []
    for sample in batch:
        logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(sample["labels"][1:])
        all_losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        found.append(all_losses[labels != -100])
    return found


def weighted_gradient(weigh: Weigh) -> Callable[..., Gradients]:
    """`reference.batch_gradient` of a loss whose tokens weigh what `weigh` says."""

    def gradient(model: torch.nn.Module, batch: Sequence[Sample]) -> Gradients:
        model.zero_grad()
        losses = losses_of(model, batch)
        factors = weigh(batch, [row.detach() for row in losses])
        tokens = sum(len(row) for row in losses)
        total = sum((w * row).sum() for w, row in zip(factors, losses, strict=True))
        (total / tokens).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    return gradient


def talr(tau: float | None, w_min: float) -> Weigh:
    def weigh(batch: Sequence[Sample], losses: Losses) -> Losses:
        used = tau or statistics.median(float(row.mean()) for row in losses)
        return [torch.exp(-row).pow(1 / used).clamp(min=w_min) for row in losses]

    return weigh


def flow(all_samples: list[Sample], base: torch.nn.Module, tau: float | None = None) -> Weigh:
    with torch.no_grad():
        means = [float(row.mean()) for row in losses_of(base, all_samples)]
    used = tau or statistics.median(means)
    of = {str(s): torch.tensor(-f / used).exp() for s, f in zip(all_samples, means, strict=True)}
    return lambda batch, losses: [of[str(sample)] for sample in batch]


def train_reference(
    host: Host, monkeypatch: pytest.MonkeyPatch, weigh: Weigh, anchor: Gradients | None = None
) -> Gradients:
    """Weights after AdamW on the domain in float64; with an anchor, after DAA."""
    model = float64_model(host)
    monkeypatch.setattr(reference, "batch_gradient", weighted_gradient(weigh))
    off = {"gga": False, "dc": False} if anchor is None else {}
    anchor = anchor or {n: torch.ones_like(p) for n, p in model.named_parameters()}
    data = batches(samples(host, "domain"), 8)
    reference.anneal(model, data, anchor, reference.Settings(eps=EPS, **off))
    return dict(model.named_parameters())


def logged(out: Path, key: str) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


# TALR


@pytest.mark.parametrize(
    ("tau", "w_min", "yaml"),
    [
        (None, 0.01, {}),
        (2.0, 0.01, {}),
        (2.0, 0.3, {}),
        (
            2.0,
            0.01,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        ),
    ],
)
def test_talr_is_the_equation_written_out(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    tau: float | None,
    w_min: float,
    yaml: dict[str, Any],
) -> None:
    expected = train_reference(host, monkeypatch, talr(tau, w_min))
    out = host.run(
        host.arguments(
            "talr", use_talr_loss=True, talr_tau=tau, talr_w_min=w_min, adam_epsilon=EPS, **yaml
        )
    )
    assert distance(weights(out), expected, start(host)) < BOUND


def test_talr_logs_tau_and_the_mean_weight(host: Host) -> None:
    first = batches(samples(host, "domain"), 8)[0]
    losses = [row.detach() for row in losses_of(float64_model(host), first)]
    tau = statistics.median(float(row.mean()) for row in losses)
    tokens = torch.cat(talr(None, 0.01)(first, losses))
    out = host.run(host.arguments("talr", use_talr_loss=True))
    assert logged(out, "talr/tau")[0] == pytest.approx(tau, rel=1e-5)
    assert logged(out, "talr/weight_mean")[0] == pytest.approx(float(tokens.mean()), rel=1e-5)
    assert len(logged(out, "talr/tau")) == len(logged(out, "loss")) == 6


@pytest.mark.parametrize(
    ("name", "yaml"),
    [
        ("full", {"disable_shuffling": False}),
        ("accumulated", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
        ("lora", {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}),
        ("freeze", {"finetuning_type": "freeze", "freeze_trainable_layers": 1}),
        ("packed", {"packing": True, "per_device_train_batch_size": 2}),
    ],
)
def test_talr_with_w_min_1_is_the_plain_run(host: Host, name: str, yaml: dict[str, Any]) -> None:
    plain = host.run(host.arguments("plain", **yaml))
    off = host.run(host.arguments("off", use_talr_loss=True, talr_w_min=1.0, **yaml))
    on = host.run(host.arguments("on", use_talr_loss=True, **yaml))
    assert same(weights(plain), weights(off))
    assert not same(weights(plain), weights(on)), f"{name}: TALR must have an effect"


def evaluated(host: Host, name: str, model: Path) -> float:
    """eval_loss of the host's own evaluation."""
    out = host.run(
        host.arguments(
            name, model_name_or_path=str(model), do_train=False, do_eval=True, dataset=None,
            eval_dataset="domain_test", per_device_eval_batch_size=4,
        )
    )  # fmt: skip
    return json.loads((out / "all_results.json").read_text())["eval_loss"]


@pytest.mark.parametrize("switch", ["use_talr_loss", "use_flow_loss"])
def test_evaluation_reports_the_plain_loss(host: Host, switch: str) -> None:
    evaluation: dict[str, Any] = {
        "eval_dataset": "domain_test", "per_device_eval_batch_size": 4, "eval_strategy": "steps",
        "eval_steps": 3, "do_eval": True,
    }  # fmt: skip
    out = host.run(host.arguments("run", **{switch: True}, **evaluation))
    apart = evaluated(host, "apart", out)  # padded otherwise than beside training
    assert logged(out, "eval_loss")[-1] == pytest.approx(apart, rel=1e-5)
    unseen = host.run(host.arguments("unseen", **{switch: True}))
    assert same(weights(out), weights(unseen)), "evaluation does not change the run"


def test_talr_beside_daa(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weighted loss gives g_D; the anchor is the gradient of the plain loss."""
    host.anchor(daa_rank=DENSE)
    anchor = {name: dense.double() for name, dense in anchor_of(host.folder / "anchor").items()}
    expected = train_reference(host, monkeypatch, talr(None, 0.01), anchor)
    out = host.run(host.daa("both", "anneal", use_talr_loss=True, adam_epsilon=EPS))
    assert distance(weights(out), expected, start(host)) < BOUND
    assert len(logged(out, "daa/similarity")) == len(logged(out, "talr/tau")) == 6


@pytest.mark.parametrize("method", [{"use_talr_loss": True}, {"use_flow_loss": True}])
def test_auto_builds_the_anchor_of_the_plain_loss(host: Host, method: dict[str, bool]) -> None:
    host.anchor()
    auto = {"daa_anchor": str(host.folder / "auto"), "daa_anchor_dataset": "general"}
    together = host.run(host.daa("together", "auto", **auto, **method))
    apart = host.run(host.daa("apart", "anneal", **method))
    assert same(weights(host.folder / "anchor"), weights(host.folder / "auto"))
    assert same(weights(apart), weights(together))
    assert not same(weights(apart), weights(host.run(host.daa("daa", "anneal"))))


# FLOW


@pytest.mark.parametrize(
    ("tau", "yaml"),
    [
        (None, {}),
        (2.0, {"per_device_eval_batch_size": 5}),
        (None, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    ],
)
def test_flow_is_the_equation_written_out(
    host: Host, monkeypatch: pytest.MonkeyPatch, tau: float | None, yaml: dict[str, Any]
) -> None:
    weigh = flow(samples(host, "domain"), float64_model(host), tau)
    expected = train_reference(host, monkeypatch, weigh)
    out = host.run(
        host.arguments("flow", use_flow_loss=True, flow_tau=tau, adam_epsilon=EPS, **yaml)
    )
    assert distance(weights(out), expected, start(host)) < BOUND


@pytest.mark.parametrize(
    "yaml",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    ],
    ids=lambda yaml: yaml["finetuning_type"],
)
def test_flow_with_a_huge_tau_is_the_plain_run(host: Host, yaml: dict[str, Any]) -> None:
    """Measuring the base model leaves shuffling and dropout where they were."""
    plain = host.run(host.arguments("plain", disable_shuffling=False, **yaml))
    flat = {"use_flow_loss": True, "flow_tau": 1e12, "disable_shuffling": False}
    off = host.run(host.arguments("off", **flat, **yaml))
    on = host.run(host.arguments("on", **{**flat, "flow_tau": None}, **yaml))
    assert same(weights(plain), weights(off))
    assert not same(weights(plain), weights(on)), "FLOW must have an effect"


def test_flow_with_a_huge_tau_beside_daa_is_daa(host: Host) -> None:
    host.anchor()
    plain = host.run(host.daa("plain", "anneal", disable_shuffling=False))
    flat = {"use_flow_loss": True, "flow_tau": 1e12, "disable_shuffling": False}
    assert same(weights(plain), weights(host.run(host.daa("off", "anneal", **flat))))


def test_every_sample_keeps_its_weight_through_shuffling_and_padding(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    from daa_ext.flow_trainer import SAMPLE, FlowTrainerMixin

    known = samples(host, "domain")
    seen: list[int] = []
    real = FlowTrainerMixin.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = (inputs["input_ids"], inputs["attention_mask"], inputs[SAMPLE].tolist())
        for ids, mask, sample in zip(*rows, strict=True):
            assert ids[mask.bool()].tolist() == known[sample]["input_ids"]
            seen.append(sample)
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FlowTrainerMixin, "compute_loss", spy)
    host.run(host.arguments("flow", use_flow_loss=True, disable_shuffling=False))
    assert sorted(seen) == list(range(len(known)))
    assert seen != sorted(seen)
