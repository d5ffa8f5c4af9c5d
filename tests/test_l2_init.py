"""The L2 penalty to the starting weights: by hand, through the host, under DDP and ZeRO."""

from pathlib import Path
from typing import Any

import pytest
import torch
from host import Host, distance, report, same, weights
from reference import Gradients, Sample, batch_gradient
from test_laws import batches, float64_model, samples, start
from torch.nn import Parameter
from zero_runs import BOUND, RESUMED, SAVING, STAGES, Config, Jobs, error, sharded, tiny_host

from daa_ext import start as start_module
from daa_ext.blend import clip_factor
from daa_ext.l2_init import PulledOptimizer, pull_factor
from daa_ext.layout import Replicated
from daa_ext.start import Start, starting_weights

CPU = torch.device("cpu")
STRONG = 3e4  # kappa is about 0.5 at the tiny models' 1.2e5 weights


# by hand


def test_the_pull_is_the_gradient_of_the_mean() -> None:
    theta = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    theta0 = torch.randn(7, 3, dtype=torch.float64)
    (0.3 * (theta - theta0).square().mean()).backward()
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, pull_factor(0.3, 21) * (theta.detach() - theta0))
    assert pull_factor(5.0 * 21, 21) == 10.0, "lambda = L n is the sum"


SHAPES = {"matrix": (8, 20), "bias": (7,), "scalar": (), "one": (1, 1)}


@pytest.mark.parametrize("chunk", [1 << 24, 5])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("missing", [(), ("bias",)])
def test_one_step_equals_the_clipped_sum(
    monkeypatch: pytest.MonkeyPatch, chunk: int, max_norm: float, missing: tuple[str, ...]
) -> None:
    """SGD with rate 1 shows the gradient it was given. A missing gradient is zero."""
    monkeypatch.setattr(start_module, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    model = {name: Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    layout = Replicated(list(model.items()))
    theta0 = starting_weights(layout)
    optimizer = torch.optim.SGD(model.values(), lr=1.0)
    pulled = PulledOptimizer(optimizer, layout, Start(layout, theta0), 0.3, max_norm)
    for p in model.values():
        p.data += torch.randn(p.shape)
    gradients = {n: torch.randn(p.shape) * (n not in missing) for n, p in model.items()}
    before = {n: p.detach().clone() for n, p in model.items()}
    moved = {n: p - theta0[n].view(p.shape) for n, p in before.items()}
    norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    factor = clip_factor(norm, max_norm)
    for n, p in model.items():
        p.grad = None if n in missing else factor * gradients[n]
    squared, inner = pulled.sums(CPU).tolist()
    assert squared**0.5 == pytest.approx(factor * norm, rel=1e-5)
    length = float(pulled.start.squared_distance(CPU)) ** 0.5
    assert length**2 == pytest.approx(sum(float(d.square().sum()) for d in moved.values()))
    pulled.arm(0, norm, inner / factor, length, lambda: factor)
    optimizer.step()
    pulled.finish()
    whole = {n: gradients[n] + 0.3 * moved[n] for n in model}
    clip = clip_factor(sum(float(g.square().sum()) for g in whole.values()) ** 0.5, max_norm)
    for n, p in model.items():
        torch.testing.assert_close(before[n] - p.detach(), clip * whole[n], rtol=1e-4, atol=1e-6)
    assert pulled.touched_elements == sum(p.numel() for p in model.values())


def test_a_step_that_was_not_armed_is_an_error() -> None:
    p = Parameter(torch.randn(3))
    layout = Replicated([("p", p)])
    optimizer = torch.optim.SGD([p], lr=1.0)
    PulledOptimizer(optimizer, layout, Start(layout, starting_weights(layout)), 0.3, 0.0)
    p.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="use_l2_init would not run"):
        optimizer.step()


# through the host


def reference(
    model: torch.nn.Module, data: list[list[Sample]], strength: float, max_norm: float
) -> None:
    """AdamW with the penalty written out, float64, in place; linear rate, eps 1e-5."""
    theta0 = {n: p.detach().clone() for n, p in model.named_parameters()}
    count = sum(p.numel() for p in theta0.values())
    first: Gradients = {n: torch.zeros_like(p) for n, p in theta0.items()}
    second: Gradients = {n: torch.zeros_like(p) for n, p in theta0.items()}
    for t, batch in enumerate(data):
        gradient = batch_gradient(model, batch)
        for n, p in model.named_parameters():
            gradient[n] += 2 * strength / count * (p.detach() - theta0[n])
        if max_norm > 0:
            norm = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
            gradient = {n: g * min(1.0, max_norm / (norm + 1e-6)) for n, g in gradient.items()}
        for n, p in model.named_parameters():
            first[n] = 0.9 * first[n] + 0.1 * gradient[n]
            second[n] = 0.95 * second[n] + 0.05 * gradient[n] ** 2
            step = first[n] / (1 - 0.9 ** (t + 1))
            step /= (second[n] / (1 - 0.95 ** (t + 1))).sqrt() + 1e-5
            with torch.no_grad():
                p -= 1e-3 * (1 - t / len(data)) * step


def pulled_yaml(host: Host, name: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"use_l2_init": True, "adam_epsilon": 1e-5, **changes}
    return host.arguments(name, **settings)


@pytest.mark.parametrize("max_norm", [0.3, 0.0])
@pytest.mark.parametrize(
    "batch", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
)
def test_the_run_is_the_penalty_written_out(
    host: Host, max_norm: float, batch: dict[str, Any]
) -> None:
    model = float64_model(host)
    reference(model, batches(samples(host, "domain"), 8), STRONG, max_norm)
    yaml = pulled_yaml(host, "run", l2_init_lambda=STRONG, max_grad_norm=max_norm, **batch)
    out = host.run(yaml)
    expected = dict(model.named_parameters())
    assert distance(weights(out), expected, start(host)) < BOUND
    length = sum(
        float((expected[n].detach() - w.double()).square().sum()) for n, w in start(host).items()
    )
    content = report(out)
    assert content["stage"] == "l2_init"
    assert content["distance"] == pytest.approx(length**0.5, rel=1e-4)
    elements = sum(w.numel() for w in start(host).values())
    assert content["trainable_params"] == elements
    assert content["start_bytes_per_rank"] == [4 * elements]
    assert content["penalty"] == pytest.approx(STRONG * length / elements, rel=1e-3)


def test_a_weak_pull_is_none_and_a_strong_one_holds(host: Host) -> None:
    plain = host.run(host.arguments("plain", adam_epsilon=1e-5))
    runs = {value: host.run(pulled_yaml(host, f"run{value}", l2_init_lambda=value))
            for value in (1e-9, 1e4, 1e6)}  # fmt: skip
    moved = {value: report(out)["distance"] for value, out in runs.items()}
    assert distance(weights(runs[1e-9]), weights(plain), start(host)) < BOUND
    assert distance(weights(runs[1e4]), weights(plain), start(host)) > 1000 * BOUND
    assert moved[1e6] < 0.5 * moved[1e-9]
    assert moved[1e6] < moved[1e4] < moved[1e-9]


@pytest.mark.parametrize("step", [1, 4])
def test_resume_is_bitwise_and_theta0_the_base(host: Host, step: int) -> None:
    changes: dict[str, Any] = {"l2_init_lambda": STRONG, "disable_shuffling": False, **SAVING}
    whole = host.run(pulled_yaml(host, "whole", **changes))
    checkpoint = str(whole / f"checkpoint-{step}")
    again = host.run(pulled_yaml(host, "again", resume_from_checkpoint=checkpoint, **changes))
    assert same(weights(whole), weights(again))
    assert report(whole)["distance"] == report(again)["distance"]


def test_resume_with_another_strength_or_after_the_end_is_refused(host: Host) -> None:
    out = host.run(pulled_yaml(host, "run", **SAVING))
    resumed: Config = {"resume_from_checkpoint": str(out / "checkpoint-1"), **SAVING}
    with pytest.raises(ValueError, match=r"l2_init_lambda=0\.5 now, but .* had .*=0\.001"):
        host.run(pulled_yaml(host, "other", l2_init_lambda=0.5, **resumed))
    resumed["resume_from_checkpoint"] = str(out / "checkpoint-6")
    with pytest.raises(ValueError, match="use_l2_init=true did not act: no optimizer step"):
        host.run(pulled_yaml(host, "late", **resumed))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"l2_init_lambda": 0.0}, r"l2_init_lambda=0\.0 is not allowed"),
        ({"finetuning_type": "lora"}, "use_l2_init=true cannot go with finetuning_type=lora"),
        ({"pure_bf16": True}, "use_l2_init=true cannot go with pure_bf16=true"),
        ({"use_badam": True}, "use_l2_init=true cannot go with use_badam=true"),
    ],
)
def test_what_cannot_be_is_refused(host: Host, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        host.run(pulled_yaml(host, "run", **changes))


def test_daa_with_the_penalty_is_refused(host: Host) -> None:
    with pytest.raises(ValueError, match="use_l2_init=true cannot go with finetuning_type=daa"):
        host.run(host.daa("run", "anneal", use_l2_init=True))


# several ranks

PULLED: Config = {
    "finetuning_type": "full", "use_l2_init": True, "l2_init_lambda": STRONG, "max_grad_norm": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    host = tiny_host(tmp_path_factory.mktemp("l2"), num_hidden_layers=2)
    jobs = Jobs(host, 2)
    jobs.add_stages(1, **PULLED)
    for name in ("z0", "z3"):
        jobs.add(f"{name}-bf16", STAGES[name], **PULLED, bf16=True, use_cpu=True)
    return jobs.run()


@pytest.fixture(scope="module")
def alone(jobs: Jobs) -> Path:
    return jobs.host.run(sharded(jobs.host, "alone", 1, None, **PULLED))


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_equal_one_process(jobs: Jobs, alone: Path, name: str) -> None:
    out = jobs.out(name)
    assert error(jobs.host, out, alone) < BOUND
    found, wanted = report(out), report(alone)
    assert found["distance"] == pytest.approx(wanted["distance"], rel=1e-4)
    held, whole = found["start_bytes_per_rank"], 4 * wanted["trainable_params"]
    assert held == [whole, whole] if name in ("ddp", "z0") else sum(held) == whole
    assert found["zero_stage"] == (None if name == "ddp" else int(name[1]))


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "rel"), [("z0", 0.25), ("z3", 0.01)])
def test_under_bf16_theta0_is_fp32_and_the_run_near_the_exact_one(
    jobs: Jobs, alone: Path, name: str, rel: float
) -> None:
    """Under ZeRO-0 DeepSpeed's plain bf16 run, too, moves a fifth less than its fp32 run."""
    found, wanted = report(jobs.out(f"{name}-bf16")), report(alone)
    copies = 2 if name == "z0" else 1
    assert sum(found["start_bytes_per_rank"]) == 4 * copies * wanted["trainable_params"]
    assert found["distance"] == pytest.approx(wanted["distance"], rel=rel)


@pytest.mark.distributed
def test_the_bound_tells_a_run_without_the_pull_apart(jobs: Jobs, alone: Path) -> None:
    plain = jobs.host.run(
        sharded(jobs.host, "plain", 1, None, finetuning_type="full", max_grad_norm=0.3)
    )
    assert error(jobs.host, plain, alone) > 1000 * BOUND


@pytest.mark.distributed
@pytest.mark.parametrize("name", RESUMED)
def test_resume_on_two_ranks_is_bitwise(jobs: Jobs, name: str) -> None:
    assert same(weights(jobs.out(name)), weights(jobs.out(f"{name}-again")))
