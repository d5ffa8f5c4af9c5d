"""What AnchoredOptimizer refuses, and what it does when the host skips a step."""

import copy
from dataclasses import replace

import pytest
import torch
from pieces import part_of
from test_anchored import (
    CPU,
    OFF,
    RULE,
    SHAPES,
    adam,
    anchor,
    announce,
    attach,
    give,
    gradients,
    model,
    train,
)

from daa_ext.anchored import AnchoredOptimizer
from daa_ext.layout import Replicated
from daa_ext.lowrank import Dense
from daa_ext.resident import ResidentAnchor


def test_sgd_is_anchored_without_correction_and_refused_with_it() -> None:
    weights, expected, rule = model(), model(), replace(RULE, dc=False, max_norm=0.0)
    train(torch.optim.SGD(weights.values(), lr=0.1), weights, rule, steps=1)
    for name, term in anchor().items():
        wanted = expected[name] - 0.1 * (0.5 * term.dense() + 0.5 * gradients(0)[name])
        torch.testing.assert_close(weights[name], wanted)
    with pytest.raises(ValueError, match="daa_dc=true needs an Adam, and SGD"):
        attach(torch.optim.SGD(model().values(), lr=0.1), model())


def test_optimizer_whose_eps_is_no_number_is_refused() -> None:
    """Adafactor's eps is a pair of other meaning; users choose it by `optim: adafactor`."""
    weights = model()
    optimizer = torch.optim.Adafactor(weights.values())
    with pytest.raises(ValueError, match="daa_dc=true needs an Adam, and Adafactor"):
        train(optimizer, weights, steps=1)


def test_zero_anchor_is_refused() -> None:
    weights = model()
    layout = Replicated(list(weights.items()))
    parts = {f.name: part_of(Dense(torch.zeros(f.shape)), f) for f in layout.fragments_of(0)}
    with pytest.raises(ValueError, match="anchor is zero"):
        AnchoredOptimizer(adam(weights), layout, ResidentAnchor(parts, 0.0), RULE)


def test_weights_that_have_no_anchor_are_an_error() -> None:
    weights = model()
    some = {name: weights[name] for name in list(SHAPES)[:-1]}
    optimizer = adam(weights)
    anchored = attach(optimizer, some)
    announce(anchored, 0, give(weights, gradients(0), 1.0))
    with pytest.raises(AssertionError, match="not in the layout"):
        optimizer.step()
    assert all(torch.equal(weights[name], model()[name]) for name in SHAPES)
    whole = attach(adam(some), weights)
    del whole.anchor.parts["tall"]
    with pytest.raises(KeyError, match="tall"):
        whole.sums(CPU)


def test_weights_that_the_optimizer_does_not_have_are_an_error() -> None:
    weights = model()
    optimizer = adam({name: weights[name] for name in list(SHAPES)[:-1]})
    anchored = attach(optimizer, weights)
    announce(anchored, 0, give(weights, gradients(0), 1.0))
    optimizer.step()
    with pytest.raises(AssertionError, match="only a part"):
        anchored.finish()


def test_step_that_was_not_announced_is_an_error() -> None:
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights)
    give(weights, gradients(0), 1.0)
    with pytest.raises(AssertionError, match="without arm"):
        optimizer.step()
    assert all(torch.equal(weights[name], model()[name]) for name in SHAPES)
    announce(anchored, 0, give(weights, gradients(0), 1.0))
    optimizer.step()
    anchored.finish()
    give(weights, gradients(1), 1.0)
    with pytest.raises(AssertionError, match="without arm"):
        optimizer.step()


def test_skipped_step_changes_nothing_and_the_next_one_goes_on() -> None:
    weights, other = model(), model()
    optimizer, reference = adam(weights), adam(other)
    anchored, unskipped = attach(optimizer, weights), attach(reference, other)
    for step in range(3):
        announce(unskipped, step, give(other, gradients(step), 1.0))
        reference.step()
        unskipped.finish()
        announce(anchored, step, give(weights, gradients(step), 1.0))
        optimizer.step()
        anchored.finish()
        before = copy.deepcopy((list(weights.values()), optimizer.state_dict(), anchored.last))
        give(weights, {}, 0.0)
        anchored.skip()
        optimizer.step()
        anchored.finish()
        state = optimizer.state_dict()
        assert state["param_groups"] == before[1]["param_groups"]
        assert anchored.last == before[2]
        for i, name in enumerate(SHAPES):
            assert torch.equal(weights[name], before[0][i])
            assert torch.equal(weights[name], other[name])
            for key, value in before[1]["state"][i].items():
                assert torch.equal(state["state"][i][key], value)


def test_skipping_with_gradients_present_is_an_error() -> None:
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights)
    announce(anchored, 0, give(weights, gradients(0), 1.0))
    anchored.skip()
    with pytest.raises(AssertionError, match="without arm"):
        optimizer.step()
    assert all(torch.equal(weights[name], model()[name]) for name in SHAPES)


def test_armed_step_that_is_skipped_is_disarmed() -> None:
    """An announcement does not outlive its step: a host that forgets the next one is caught."""
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights, replace(OFF, gga=True))
    announce(anchored, 0, give(weights, gradients(0), 1.0))
    optimizer.zero_grad()
    anchored.skip()
    optimizer.step()
    assert all(torch.equal(weights[name], model()[name]) for name in SHAPES)
    give(weights, gradients(1), 1.0)
    with pytest.raises(AssertionError, match="without arm"):
        optimizer.step()


def test_zero_domain_gradient_steps_along_the_anchor_alone() -> None:
    weights = model()
    rule = replace(RULE, dc=False, max_norm=0.0)
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    anchored = attach(optimizer, weights, rule)
    norm = give(weights, {n: torch.zeros(s) for n, s in SHAPES.items()}, 0.0)
    announce(anchored, 0, norm)
    optimizer.step()
    assert anchored.last is not None
    assert (norm, anchored.last.similarity, anchored.last.correction) == (0.0, 0.0, 1.0)
    for name, term in anchor().items():
        torch.testing.assert_close(model()[name] - weights[name], 0.5 * term.dense())
