"""The anchor on torch's own Adams against the equations by hand in float64."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pieces import part_of
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from daa_ext.anchored import AnchoredOptimizer, AnnealRule, Measured
from daa_ext.layout import Replicated
from daa_ext.lowrank import AnchorTerm, compress
from daa_ext.resident import ResidentAnchor

SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (8, 20),
    "tall": (30, 6),
    "bias": (7,),
    "scalar": (),
    "cube": (2, 3, 4),
    "one": (1, 1),
}
TOTAL = 4
RULE = AnnealRule(total_steps=TOTAL, k0=2.0, c0=0.01, gga=True, dc=True, max_norm=1.0)
OFF = replace(RULE, gga=False, dc=False)
ADAM: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.3}
CPU = torch.device("cpu")
Model = dict[str, Parameter]


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(dtype: torch.dtype = torch.float32) -> Model:
    return {n: Parameter(noise(s, 50 + i).to(dtype)) for i, (n, s) in enumerate(SHAPES.items())}


def anchor() -> dict[str, AnchorTerm]:
    """Factors for the two matrices that are large enough, dense terms for the rest."""
    return {n: compress(0.3 * noise(s, 80 + i), 2)[0] for i, (n, s) in enumerate(SHAPES.items())}


def gradients(step: int) -> dict[str, Tensor]:
    return {n: noise(s, 100 * step + 200 + i) for i, (n, s) in enumerate(SHAPES.items())}


def attach(optimizer: Optimizer, weights: Model, rule: AnnealRule = RULE) -> AnchoredOptimizer:
    layout, terms = Replicated(list(weights.items())), anchor()
    parts = {f.name: part_of(terms[f.name], f) for f in layout.fragments_of(0)}
    norm = sum(term.norm() ** 2 for term in terms.values()) ** 0.5
    return AnchoredOptimizer(optimizer, layout, ResidentAnchor(parts, norm), rule)


def announce(anchored: AnchoredOptimizer, step: int, norm: float) -> None:
    """Arm a step whose gradients, of norm `norm`, the host has clipped already."""
    squared, inner = anchored.sums(CPU).tolist()
    factor = squared**0.5 / norm if norm > 0.0 and squared > 0.0 else 1.0
    anchored.arm(step, Measured(norm, inner / factor), lambda: factor)


def give(weights: Model, grads: dict[str, Tensor], max_norm: float) -> float:
    """Set the gradients and clip them as the host does; returns the norm before clipping."""
    for name, parameter in weights.items():
        parameter.grad = grads[name].clone().to(parameter.dtype) if name in grads else None
    limit = max_norm if max_norm > 0 else float("inf")
    return float(torch.nn.utils.clip_grad_norm_(list(weights.values()), limit))


def train(
    optimizer: Optimizer, weights: Model, rule: AnnealRule | None = RULE, steps: int = TOTAL
) -> None:
    """`steps` steps; plain without a rule."""
    anchored = attach(optimizer, weights, rule) if rule else None
    for step in range(steps):
        norm = give(weights, gradients(step), RULE.max_norm if rule is None else rule.max_norm)
        if anchored:
            announce(anchored, step, norm)
        optimizer.step()
        if anchored:
            anchored.finish()


def adam(weights: Model, **changes: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights.values(), **ADAM | changes)


def trained(rule: AnnealRule | None, **changes: Any) -> Model:
    weights = model()
    train(adam(weights, **changes), weights, rule)
    return weights


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def whole_anchor() -> Tensor:
    return flat([term.dense() for term in anchor().values()])


def by_hand(rule: AnnealRule) -> tuple[Tensor, list[tuple[float, float, float]]]:
    """The weights after T steps of eq. 2 to 9 and (s, c, gamma) of each, in float64."""
    g_hat = whole_anchor()
    theta = flat(list(model().values()))
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    history = []
    for t in range(TOTAL):
        g_d = flat(list(gradients(t).values()))
        share = min(1.0, rule.k0 / TOTAL * (1 - t / TOTAL)) if rule.gga else 0.0
        s = float(g_d.dot(g_hat).abs() / (g_d.norm() * g_hat.norm()))
        c = s + rule.c0 if rule.dc else 1.0
        g_b = share * g_hat + (1 - share) * g_d
        if rule.max_norm > 0:
            g_b *= min(1.0, rule.max_norm / (float(g_b.norm()) + 1e-6))
        m, v = 0.9 * m + 0.1 * g_b, 0.95 * v + 0.05 * g_b**2
        m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.95 ** (t + 1))
        theta = theta - 0.05 * 0.3 * theta - 0.05 * m_hat / ((c * v_hat).sqrt() + 1e-3)
        history.append((s, c, share))
    return theta, history


RULES = {
    "paper": RULE,
    "gga alone": replace(RULE, dc=False),
    "dc alone": replace(RULE, gga=False),
    "k0 zero": replace(RULE, k0=0.0),
    "k0 small": replace(RULE, k0=0.1),
    "capped": replace(RULE, k0=50.0),
    "gamma one": replace(RULE, k0=float(TOTAL), dc=False),
    "unclipped": replace(RULE, max_norm=0.0),
    "clipped hard": replace(RULE, max_norm=1e-2),
    "never reached": replace(RULE, max_norm=1e6),
    "large c0": replace(RULE, c0=9.0),
}


@pytest.mark.parametrize("name", RULES)
def test_full_step_is_the_equations_by_hand(name: str) -> None:
    rule, weights, expected = RULES[name], model(), by_hand(RULES[name])
    optimizer, start = adam(weights), flat(list(model().values()))
    anchored = attach(optimizer, weights, rule)
    for step in range(TOTAL):
        norm = give(weights, gradients(step), rule.max_norm)
        announce(anchored, step, norm)
        optimizer.step()
        anchored.finish()
        last = anchored.last
        assert last is not None
        assert (last.step, last.domain_grad_norm) == (step, norm)
        measured = (last.similarity, last.correction, last.gamma)
        assert measured == pytest.approx(expected[1][step], rel=1e-4)
        assert last.effective_lr == pytest.approx(0.05 / last.correction**0.5)
    error = (flat(list(weights.values())) - expected[0]).norm() / (expected[0] - start).norm()
    assert error < 1e-5


@pytest.mark.parametrize("rule", [OFF, replace(OFF, gga=True, k0=0.0)])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_no_effect_when_switched_off(rule: AnnealRule, max_norm: float) -> None:
    rule = replace(rule, max_norm=max_norm)
    weights, plain = model(), model()
    optimizer, reference = adam(weights), adam(plain)
    anchored = attach(optimizer, weights, rule)
    for step in range(TOTAL):
        announce(anchored, step, give(weights, gradients(step), max_norm))
        give(plain, gradients(step), max_norm)
        optimizer.step()
        anchored.finish()
        reference.step()
        for name in SHAPES:
            assert torch.equal(weights[name], plain[name])
            assert torch.equal(grad_of(weights[name]), grad_of(plain[name]))


def grad_of(parameter: Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("name", ["paper", "gga alone", "dc alone"])
def test_effect_on_every_parameter_when_switched_on(name: str) -> None:
    plain, found = trained(None), trained(RULES[name])
    for key in SHAPES:
        assert ((plain[key] - found[key]).abs() > 1e-6).all(), key


def test_settings_are_put_back_and_the_scheduler_never_sees_them_scaled() -> None:
    weights = model()
    groups = [
        {"params": [weights["wide"], weights["tall"]], "weight_decay": 0.2},
        {"params": [weights[n] for n in ("bias", "scalar", "cube", "one")], "lr": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAM)
    scheduler = LambdaLR(optimizer, lambda t: 1 - t / TOTAL)
    anchored = attach(optimizer, weights)
    for step in range(TOTAL):
        before = [{k: g[k] for k in ("lr", "eps", "weight_decay")} for g in optimizer.param_groups]
        announce(anchored, step, give(weights, gradients(step), 1.0))
        optimizer.step()
        anchored.finish()
        assert [{k: g[k] for k in before[0]} for g in optimizer.param_groups] == before
        assert anchored.last is not None
        wanted = 0.05 * (1 - step / TOTAL) / anchored.last.correction**0.5
        assert anchored.last.effective_lr == pytest.approx(wanted)
        saved = copy.deepcopy(optimizer.state_dict())["param_groups"]
        assert [group["lr"] for group in saved] == [group["lr"] for group in before]
        scheduler.step()
        factor = 1 - (step + 1) / TOTAL
        assert scheduler.get_last_lr() == pytest.approx([0.05 * factor, 0.01 * factor])


def test_tensor_settings_are_put_back() -> None:
    weights = model()
    optimizer = adam(weights, lr=torch.tensor(0.05))
    train(optimizer, weights, steps=2)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_other_adam_kernels_do_the_same_step(kind: str) -> None:
    found, wanted = trained(RULE, **{kind: True}), trained(RULE)
    for name in SHAPES:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_of_the_gradients_as_they_are(dtype: torch.dtype) -> None:
    """Scaled, in bf16, or missing; measuring changes none of them."""
    weights = model(dtype)
    anchored = attach(adam(weights), weights)
    give(weights, {n: 1024 * g for n, g in gradients(0).items() if n != "tall"}, 0.0)
    given = {n: grad_of(p).clone() for n, p in weights.items() if n != "tall"}
    wide = flat([given.get(n, torch.zeros(SHAPES[n])) for n in SHAPES])
    wanted = torch.stack([wide.dot(wide), wide.dot(whole_anchor())])
    torch.testing.assert_close(anchored.sums(CPU), wanted, rtol=1e-5, atol=0)
    assert weights["tall"].grad is None
    assert all(torch.equal(grad_of(weights[n]), grad) for n, grad in given.items())


# law 6


def test_law_6_every_anchored_element_is_touched() -> None:
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights)
    assert anchored.touched_elements == 0
    for step in range(2):
        announce(anchored, step, give(weights, gradients(step), 1.0))
        optimizer.step()
        anchored.finish()
        assert anchored.touched_elements == sum(p.numel() for p in weights.values())
    u_and_s_in_one = sum(term.nbytes - 4 * (term.rank or 0) for term in anchor().values())
    assert anchored.anchor.nbytes == u_and_s_in_one
    assert anchored.anchor.norm == pytest.approx(float(whole_anchor().norm()), rel=1e-5)


@pytest.mark.parametrize("missing", ["tall", "scalar"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_parameter_that_the_batch_does_not_reach_is_anchored(missing: str, step: int) -> None:
    """No gradient means g_D = 0 there, so by eq. 2 it gets gamma g_hat: as with zeros given."""
    found, expected = model(), model()
    for weights, absent in ((found, True), (expected, False)):
        optimizer = adam(weights)
        anchored = attach(optimizer, weights)
        for t in range(step + 1):
            grads = dict(gradients(t))
            if t == step:
                grads[missing] = torch.zeros_like(grads[missing])
                norm = give(weights, grads, 1.0)
                if absent:
                    weights[missing].grad = None
            else:
                norm = give(weights, grads, 1.0)
            announce(anchored, t, norm)
            optimizer.step()
            anchored.finish()
        assert anchored.touched_elements == sum(p.numel() for p in weights.values())
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
    assert not torch.equal(found[missing], model()[missing])


@pytest.mark.parametrize("step", [0, 1])
def test_law_6_a_step_without_any_gradient_is_an_error(step: int) -> None:
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights)
    for t in range(step):
        announce(anchored, t, give(weights, gradients(t), 1.0))
        optimizer.step()
        anchored.finish()
    optimizer.zero_grad()
    announce(anchored, step, 1.0)
    with pytest.raises(ValueError, match=f"Step {step}: no parameter has a gradient"):
        optimizer.step()
