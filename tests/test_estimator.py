"""Stage 1's estimator: the bias-corrected mean of the gradients it saw, and nothing else."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from daa_ext.estimator import MomentEstimator, estimates

SHAPES: list[tuple[int, ...]] = [(5, 3), (7,), (1, 1), (), (2, 3, 4), (0, 4)]


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[Parameter]:
    return [Parameter(noise(shape, 100 + i)) for i, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[Tensor]:
    return [noise(shape, 10 * step + i) for i, shape in enumerate(SHAPES)]


def feed(
    estimator: MomentEstimator, params: Sequence[Parameter], grads: Sequence[Tensor | None]
) -> None:
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    estimator.step()
    estimator.zero_grad()


def weighted_mean(grads: Sequence[Tensor], beta: float) -> Tensor:
    """sum_i beta^(s-i) g_i / sum_i beta^(s-i), in float64."""
    weights = [beta ** (len(grads) - 1 - i) for i in range(len(grads))]
    total = sum(w * g.double() for w, g in zip(weights, grads, strict=True))
    assert isinstance(total, Tensor)
    return total / sum(weights)


@pytest.mark.parametrize("beta", [0.999, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_estimate_is_the_weighted_mean(beta: float, steps: int) -> None:
    params = parameters()
    estimator = MomentEstimator(params, beta)
    for step in range(steps):
        feed(estimator, params, gradients(step))
    assert estimator.good_steps == steps
    for i, parameter in enumerate(params):
        found = estimator.estimate(parameter)
        assert (found.shape, found.dtype) == (parameter.shape, torch.float32)
        expected = weighted_mean([gradients(step)[i] for step in range(steps)], beta)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_equal_gradients_are_not_shrunk(steps: int) -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.999)
    for _ in range(steps):
        feed(estimator, params, gradients(0))
    for parameter, wanted in zip(params, gradients(0), strict=True):
        torch.testing.assert_close(estimator.estimate(parameter), wanted, rtol=1e-5, atol=0)


def test_step_without_gradients_changes_nothing_and_one_with_them_does() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, gradients(0))
    before = copy.deepcopy(estimator.state_dict())
    feed(estimator, params, [None] * len(params))
    after = estimator.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i in before["state"]:
        assert torch.equal(after["state"][i]["moment"], before["state"][i]["moment"])
    feed(estimator, params, gradients(1))
    assert estimator.good_steps == 2
    assert not torch.equal(estimator.state[params[0]]["moment"], before["state"][0]["moment"])


def test_no_weight_moves_and_no_gradient_is_touched() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    for parameter, grad in zip(params, gradients(0), strict=True):
        parameter.grad = grad.clone()
    for _ in range(3):
        estimator.step()
    for parameter, weight, grad in zip(params, parameters(), gradients(0), strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


def test_state_is_one_fp32_tensor_per_parameter() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, gradients(0))
    for parameter in params:
        assert [v.shape for v in estimator.state[parameter].values()] == [parameter.shape]
        assert estimator.state[parameter]["moment"].dtype == torch.float32


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """1/512 beside 1/4 vanishes in a bf16 sum."""
    parameter = Parameter(torch.zeros(1, dtype=torch.bfloat16))
    estimator = MomentEstimator([parameter], 0.5)
    grads = [torch.tensor([1.0]), *[torch.tensor([2.0**-9])] * 3]
    for grad in grads:
        feed(estimator, [parameter], [grad.bfloat16()])
    expected = weighted_mean(grads, 0.5).float()
    torch.testing.assert_close(estimator.estimate(parameter), expected, rtol=1e-6, atol=0)


def test_resumed_estimate_is_bitwise_the_uninterrupted_one() -> None:
    whole_params, first_params, second_params = parameters(), parameters(), parameters()
    whole = MomentEstimator(whole_params, 0.9)
    for step in range(4):
        feed(whole, whole_params, gradients(step))
    first = MomentEstimator(first_params, 0.9)
    for step in range(2):
        feed(first, first_params, gradients(step))
    second = MomentEstimator(second_params, 0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.good_steps == 2
    for step in range(2, 4):
        feed(second, second_params, gradients(step))
    for a, b in zip(whole_params, second_params, strict=True):
        assert torch.equal(whole.estimate(a), second.estimate(b))


def test_never_seen_parameter_has_anchor_zero() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, [*gradients(0)[:-2], None, None])
    found = dict(estimates(estimator, zip("abcdef", params, strict=True)))
    assert found["e"].equal(torch.zeros(2, 3, 4))
    assert found["e"].dtype == torch.float32
    torch.testing.assert_close(found["a"], gradients(0)[0])


@pytest.mark.parametrize("seen", [[True, False], [False, True], [True, False, True, False, False]])
def test_missed_steps_count_as_zero_gradients(seen: list[bool]) -> None:
    """A parameter that a batch does not reach (an expert without a token) has gradient 0 there."""
    params = [Parameter(torch.zeros(4)), Parameter(torch.zeros(3))]
    estimator = MomentEstimator(params, 0.5)
    always = torch.ones(4)
    for step, reached in enumerate(seen):
        feed(estimator, params, [always, noise((3,), step) if reached else None])
    given = [noise((3,), step) * reached for step, reached in enumerate(seen)]
    torch.testing.assert_close(
        estimator.estimate(params[1]).double(), weighted_mean(given, 0.5), rtol=1e-5, atol=1e-6
    )


def test_estimates_skips_frozen_parameters_and_empties_the_estimator() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, gradients(0))
    params[1].requires_grad_(False)
    named = list(zip("abcdef", params, strict=True))
    assert [name for name, _ in estimates(estimator, named)] == list("acdef")
    assert list(estimator.state) == [params[1]]


@pytest.mark.parametrize("skipped", [0, 2])
def test_no_good_step_is_an_error(skipped: int) -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    for _ in range(skipped):
        feed(estimator, params, [None] * len(params))
    with pytest.raises(ValueError, match="no usable gradient"):
        next(estimates(estimator, [("a", params[0])]))
