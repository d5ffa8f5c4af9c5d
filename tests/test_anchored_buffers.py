"""The anchor on an optimizer that is stepped as DeepSpeed does it: in flat buffers, by groups."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from pieces import part_of
from test_anchored import (
    ADAM,
    CPU,
    OFF,
    RULE,
    RULES,
    SHAPES,
    TOTAL,
    adam,
    anchor,
    announce,
    attach,
    flat,
    give,
    grad_of,
    gradients,
    model,
    train,
    whole_anchor,
)
from torch import Tensor
from torch.nn import Parameter

from daa_ext.anchored import AnchoredOptimizer, AnnealRule, Measured
from daa_ext.fragments import cut
from daa_ext.layout import Buffer, Replicated
from daa_ext.resident import ResidentAnchor


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_measured_before_the_host_clips_is_measured_after(scale: float, max_norm: float) -> None:
    """DeepSpeed clips and takes the loss scale out when the inner step begins, not before."""
    rule, weights, expected = replace(RULE, max_norm=max_norm), model(), model()
    train(adam(expected), expected, rule)
    optimizer = adam(weights)
    anchored = attach(optimizer, weights, rule)
    for step in range(TOTAL):
        norm = give(weights, {n: scale * g for n, g in gradients(step).items()}, 0.0) / scale
        factor = float("nan")  # not known yet
        inner = anchored.sums(CPU)[1].item() / scale
        anchored.arm(step, Measured(norm, inner), lambda: factor)  # noqa: B023
        factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
        for parameter in weights.values():
            grad_of(parameter).mul_(factor / scale)
        optimizer.step()
        anchored.finish()
    for name in SHAPES:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6)


SPLITS = {
    "one by one": [[name] for name in SHAPES],
    "pairs": [["wide", "bias"], ["tall", "scalar"], ["cube", "one"]],
    "all": [list(SHAPES)],
}


def grouped(weights: dict[str, Parameter], split: list[list[str]]) -> torch.optim.AdamW:
    """Groups of one run have settings of their own: each its own learning rate and decay."""
    groups = [
        {"params": [weights[n] for n in names], "lr": 0.05 / (i + 1), "weight_decay": 0.1 * i}
        for i, names in enumerate(split)
    ]
    return torch.optim.AdamW(groups, **ADAM)


@pytest.mark.parametrize("rule", [RULE, RULES["gga alone"], RULES["dc alone"], OFF])
@pytest.mark.parametrize("name", SPLITS)
def test_one_group_per_call_is_one_call_for_all(name: str, rule: AnnealRule) -> None:
    """ZeRO-1/2 puts each group alone into optimizer.param_groups and steps it."""
    weights, expected = model(), model()
    optimizer = grouped(weights, SPLITS[name])
    train(grouped(expected, SPLITS[name]), expected, rule)
    anchored, groups = attach(optimizer, weights, rule), optimizer.param_groups
    keys = ("lr", "eps", "weight_decay")
    for step in range(TOTAL):
        announce(anchored, step, give(weights, gradients(step), rule.max_norm))
        before = [{key: group[key] for key in keys} for group in groups]
        for i, group in enumerate(groups):
            optimizer.param_groups = [group]
            optimizer.step()
            assert {key: group[key] for key in keys} == before[i], "put back at once"
        optimizer.param_groups = groups
        anchored.finish()
        assert [{key: group[key] for key in keys} for group in groups] == before
    assert all(torch.equal(weights[n], expected[n]) for n in SHAPES)
    assert anchored.touched_elements == sum(p.numel() for p in weights.values())


def test_parts_in_one_flat_buffer_are_stepped_as_the_whole() -> None:
    """As on one rank of ZeRO: a flat buffer with gaps, whose fragments have an anchor each."""
    expected = model()
    train(adam(expected), expected)
    shapes, offsets, end = list(SHAPES.items()), [], 0
    for _, shape in shapes:
        offsets.append(end)
        end += torch.Size(shape).numel() + 3  # padding
    buffer = Parameter(torch.zeros(end))
    fragments = cut(shapes, offsets, 0, end)
    layout = Replicated(list(model().items()), [Buffer(buffer, fragments)])
    terms = anchor()
    norm = float(whole_anchor().norm())
    held = ResidentAnchor({f.name: part_of(terms[f.name], f) for f in fragments}, norm)
    optimizer = torch.optim.AdamW([buffer], **ADAM)
    anchored = AnchoredOptimizer(optimizer, layout, held, RULE)

    def spread(tensors: Mapping[str, Tensor]) -> Tensor:
        flat_buffer = torch.zeros(end)
        for f in fragments:
            flat_buffer[f.offset : f.offset + f.numel] = tensors[f.name].detach().reshape(-1)
        return flat_buffer

    buffer.data = spread(model())
    for step in range(TOTAL):
        g_d = flat(list(gradients(step).values()))
        domain_norm = float(g_d.norm())
        factor = min(1.0, 1.0 / (domain_norm + 1e-6))
        buffer.grad = factor * spread(gradients(step))
        measured = Measured(domain_norm, float(g_d.dot(whole_anchor())))
        anchored.arm(step, measured, partial(float, factor))
        optimizer.step()
        anchored.finish()
    torch.testing.assert_close(buffer.detach(), spread(expected), rtol=1e-5, atol=1e-6)
    assert anchored.touched_elements == sum(p.numel() for p in expected.values())


def test_buffer_that_is_stepped_twice_is_an_error() -> None:
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights)
    announce(anchored, 0, give(weights, gradients(0), 1.0))
    optimizer.step()
    after = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(AssertionError, match="stepped twice"):
        optimizer.step()
    assert all(torch.equal(weights[name], after[name]) for name in SHAPES)


def test_group_that_is_stepped_twice_or_forgotten_is_an_error() -> None:
    weights = model()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in weights.values()])
    anchored, groups = attach(optimizer, weights), optimizer.param_groups
    announce(anchored, 0, give(weights, gradients(0), 1.0))
    for group in groups[:-1]:
        optimizer.param_groups = [group]
        optimizer.step()
    with pytest.raises(AssertionError, match="stepped twice"):
        optimizer.step()
    with pytest.raises(AssertionError, match="only a part"):
        anchored.finish()
    with pytest.raises(AssertionError, match="did not reach every buffer"):
        announce(anchored, 1, 1.0)
