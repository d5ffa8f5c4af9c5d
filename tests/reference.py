"""DAA written out in float64, one sample at a time: slow, obvious, shares no code with daa_ext."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

Sample = dict[str, list[int]]  # input_ids and labels; -100 is no label
Gradients = dict[str, Tensor]


@dataclass
class Settings:
    """One run's settings, by their symbols."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float = 1.0
    daa_k0: float = 3.0
    c0: float = 0.01
    gga: bool = True
    dc: bool = True
    boost_max: float = inf
    radius: float = inf  # relative to the norm of the starting weights


def batch_gradient(model: torch.nn.Module, samples: Sequence[Sample]) -> Gradients:
    """Gradient of the mean loss per labelled token over the samples, one backward per sample."""
    model.zero_grad()
    tokens = sum(label != -100 for sample in samples for label in sample["labels"][1:])
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        labels = torch.tensor(sample["labels"][1:])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        (loss / tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def anchor(model: torch.nn.Module, batches: Iterable[Sequence[Sample]], beta: float) -> Gradients:
    """m_s / (1 - beta^s), m_i = beta m_{i-1} + (1 - beta) g_i, at fixed weights."""
    moment: Gradients = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    steps = 0
    for batch in batches:
        gradient = batch_gradient(model, batch)
        moment = {n: beta * m + (1 - beta) * gradient[n] for n, m in moment.items()}
        steps += 1
    return {n: m / (1 - beta**steps) for n, m in moment.items()}


def inner(a: Gradients, b: Gradients) -> float:
    return sum(float((a[n] * b[n]).sum()) for n in a)


def anneal(
    model: torch.nn.Module,
    batches: Sequence[Sequence[Sample]],
    anchor: Gradients,
    settings: Settings,
    decayed: Iterable[str] = (),
) -> list[dict[str, float]]:
    """Train `model` in place on one batch per step; returns s_t, c_t and gamma_t of each step,
    and the distance from the start before it.

    decayed: names of the parameters that the host applies weight decay to.
    """
    total = len(batches)
    first = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    radius = settings.radius * sqrt(inner(start, start))
    history = []
    for t, batch in enumerate(batches):
        domain = batch_gradient(model, batch)
        gamma = min(1.0, settings.daa_k0 / total * (1 - t / total)) if settings.gga else 0.0
        blend = {n: gamma * anchor[n] + (1 - gamma) * g for n, g in domain.items()}
        norms = sqrt(inner(domain, domain)) * sqrt(inner(anchor, anchor))
        s = abs(inner(domain, anchor)) / norms
        c = max(s + settings.c0, 1 / settings.boost_max**2) if settings.dc else 1.0
        if settings.max_norm > 0:
            factor = min(1.0, settings.max_norm / (sqrt(inner(blend, blend)) + 1e-6))
            blend = {n: factor * g for n, g in blend.items()}
        moved = {n: p.detach() - start[n] for n, p in model.named_parameters()}
        distance = sqrt(inner(moved, moved))
        if distance > radius:  # after the gradient was taken, before the step
            for n, p in model.named_parameters():
                p.data = start[n] + radius / distance * moved[n]
        lr = settings.learning_rate * (1 - t / total)
        for name, p in model.named_parameters():
            g = blend[name]
            first[name] = settings.beta1 * first[name] + (1 - settings.beta1) * g
            second[name] = settings.beta2 * second[name] + (1 - settings.beta2) * g * g
            m_hat = first[name] / (1 - settings.beta1 ** (t + 1))
            v_hat = second[name] / (1 - settings.beta2 ** (t + 1))
            decay = settings.weight_decay if name in decayed else 0.0
            with torch.no_grad():
                p -= lr * decay * p + lr * m_hat / (torch.sqrt(c * v_hat) + settings.eps)
        step = {"similarity": s, "correction": c, "gamma": gamma}
        history.append({**step, "distance": distance} if settings.radius < inf else step)
    return history
