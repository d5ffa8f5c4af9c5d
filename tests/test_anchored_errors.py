"""What AnchoredOptimizer refuses, and what it does when the host skips a step."""

import copy
from dataclasses import replace

import pytest
import torch
from test_anchored import OFF, RULE, SHAPES, adam, anchor, attach, give, gradients, model, train

from daa_ext.anchored import AnchoredOptimizer, Piece, pair
from daa_ext.lowrank import Dense


def test_sgd_is_anchored_without_correction_and_refused_with_it() -> None:
    weights, expected, rule = model(), model(), replace(RULE, dc=False, max_norm=0.0)
    train(torch.optim.SGD(weights.values(), lr=0.1), weights, rule, steps=1)
    for name, term in anchor().items():
        g_hat = term.dense_slice(0, expected[name].numel()).view(SHAPES[name])
        wanted = expected[name] - 0.1 * (0.5 * g_hat + 0.5 * gradients(0)[name])
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
    pieces = [Piece(n, p, Dense(torch.zeros_like(p))) for n, p in weights.items()]
    with pytest.raises(ValueError, match="anchor is zero"):
        AnchoredOptimizer(adam(weights), pieces, RULE)


def test_anchor_of_other_parameters_is_not_paired() -> None:
    named = list(model().items())
    assert [piece.name for piece in pair(named, anchor())] == list(SHAPES)
    with pytest.raises(AssertionError):
        pair(named[:-1], anchor())


def test_step_that_was_not_announced_is_an_error() -> None:
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights)
    give(weights, gradients(0), 1.0)
    with pytest.raises(AssertionError, match="without arm"):
        optimizer.step()
    assert all(torch.equal(weights[name], model()[name]) for name in SHAPES)
    anchored.arm(0, give(weights, gradients(0), 1.0))
    optimizer.step()
    give(weights, gradients(1), 1.0)
    with pytest.raises(AssertionError, match="without arm"):
        optimizer.step()


def test_skipped_step_changes_nothing_and_the_next_one_goes_on() -> None:
    weights, other = model(), model()
    optimizer, reference = adam(weights), adam(other)
    anchored, unskipped = attach(optimizer, weights), attach(reference, other)
    for step in range(3):
        unskipped.arm(step, give(other, gradients(step), 1.0))
        reference.step()
        anchored.arm(step, give(weights, gradients(step), 1.0))
        optimizer.step()
        before = copy.deepcopy((list(weights.values()), optimizer.state_dict(), anchored.last))
        give(weights, {}, 0.0)
        anchored.skip()
        optimizer.step()
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
    anchored = attach(adam(weights), weights)
    give(weights, gradients(0), 1.0)
    with pytest.raises(AssertionError):
        anchored.skip()


def test_armed_step_that_is_skipped_is_disarmed() -> None:
    """An announcement does not outlive its step: a host that forgets the next one is caught."""
    weights = model()
    optimizer = adam(weights)
    anchored = attach(optimizer, weights, replace(OFF, gga=True))
    anchored.arm(0, give(weights, gradients(0), 1.0))
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
    anchored.arm(0, norm)
    optimizer.step()
    assert anchored.last is not None
    assert (norm, anchored.last.similarity, anchored.last.correction) == (0.0, 0.0, 1.0)
    for name, term in anchor().items():
        moved = (model()[name] - weights[name]).view(-1)
        torch.testing.assert_close(moved, 0.5 * term.dense_slice(0, moved.numel()))
