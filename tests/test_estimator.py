"""Stage 1's estimator: the bias-corrected mean of the gradients it saw, and nothing else."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from daa_ext.estimator import Estimates, MomentEstimator
from daa_ext.fragments import Fragment, whole
from daa_ext.layout import Buffer, Replicated
from daa_ext.trainer import DaaTrainerMixin

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


def estimates(estimator: MomentEstimator, params: Sequence[Parameter]) -> list[Tensor]:
    """The anchor of every parameter, whole."""
    layout = Replicated([(f"p{i}", parameter) for i, parameter in enumerate(params)])
    own = Estimates(estimator, layout.buffers())
    return [own(fragment).view(fragment.shape) for fragment in layout.fragments_of(0)]


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
    for i, found in enumerate(estimates(estimator, params)):
        assert (found.shape, found.dtype) == (SHAPES[i], torch.float32)
        expected = weighted_mean([gradients(step)[i] for step in range(steps)], beta)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_equal_gradients_are_not_shrunk(steps: int) -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.999)
    for _ in range(steps):
        feed(estimator, params, gradients(0))
    for found, wanted in zip(estimates(estimator, params), gradients(0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_step_without_gradients_changes_nothing_and_one_with_them_does() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, gradients(0))
    before = copy.deepcopy(estimator.state_dict())
    feed(estimator, params, [None] * len(params))
    after = estimator.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i in before["state"]:
        assert torch.equal(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"])
        assert after["state"][i]["step"] == before["state"][i]["step"] == 1
    feed(estimator, params, gradients(1))
    assert estimator.good_steps == 2
    assert not torch.equal(estimator.state[params[0]]["exp_avg"], before["state"][0]["exp_avg"])


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


def test_state_is_a_count_and_one_fp32_tensor_per_parameter() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, gradients(0))
    for parameter in params:
        state = estimator.state[parameter]
        assert (state.keys(), state["step"]) == ({"step", "exp_avg"}, 1)
        assert (state["exp_avg"].shape, state["exp_avg"].dtype) == (parameter.shape, torch.float32)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """1/512 beside 1/4 vanishes in a bf16 sum."""
    parameter = Parameter(torch.zeros(1, dtype=torch.bfloat16))
    estimator = MomentEstimator([parameter], 0.5)
    grads = [torch.tensor([1.0]), *[torch.tensor([2.0**-9])] * 3]
    for grad in grads:
        feed(estimator, [parameter], [grad.bfloat16()])
    expected = weighted_mean(grads, 0.5).float()
    torch.testing.assert_close(estimates(estimator, [parameter])[0], expected, rtol=1e-6, atol=0)


def test_resumed_estimate_is_bitwise_the_uninterrupted_one() -> None:
    whole_params, first_params, second_params = parameters(), parameters(), parameters()
    uninterrupted = MomentEstimator(whole_params, 0.9)
    for step in range(4):
        feed(uninterrupted, whole_params, gradients(step))
    first = MomentEstimator(first_params, 0.9)
    for step in range(2):
        feed(first, first_params, gradients(step))
    second = MomentEstimator(second_params, 0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.good_steps == 2
    for step in range(2, 4):
        feed(second, second_params, gradients(step))
    found, wanted = estimates(second, second_params), estimates(uninterrupted, whole_params)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_never_seen_parameter_has_anchor_zero() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, [*gradients(0)[:-2], None, None])
    found = estimates(estimator, params)
    assert found[4].equal(torch.zeros(2, 3, 4))
    assert found[4].dtype == torch.float32
    torch.testing.assert_close(found[0], gradients(0)[0])


@pytest.mark.parametrize("seen", [[True, False], [False, True], [True, False, True, False, False]])
def test_missed_steps_count_as_zero_gradients(seen: list[bool]) -> None:
    """A parameter that a batch does not reach (an expert without a token) has gradient 0 there."""
    params = [Parameter(torch.zeros(4)), Parameter(torch.zeros(3))]
    estimator = MomentEstimator(params, 0.5)
    always = torch.ones(4)
    for step, reached in enumerate(seen):
        feed(estimator, params, [always, noise((3,), step) if reached else None])
    given = [noise((3,), step) * reached for step, reached in enumerate(seen)]
    found = estimates(estimator, params)[1].double()
    torch.testing.assert_close(found, weighted_mean(given, 0.5), rtol=1e-5, atol=1e-6)


def test_one_step_call_per_group_is_one_step() -> None:
    """ZeRO-1/2 steps one parameter group at a time; each is a group of its own meanwhile."""
    params, apart = parameters(), parameters()
    together = MomentEstimator(params, 0.9)
    estimator = MomentEstimator([{"params": apart[:2]}, {"params": apart[2:]}], 0.9)  # type: ignore
    groups = estimator.param_groups
    for step in range(3):
        feed(together, params, gradients(step))
        for parameter, grad in zip(apart, gradients(step), strict=True):
            parameter.grad = grad.clone()
        for group in groups:
            estimator.param_groups = [group]
            estimator.step()
        estimator.param_groups = groups
    assert estimator.good_steps == together.good_steps == 3
    found, wanted = estimates(estimator, apart), estimates(together, params)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_fragments_of_one_flat_buffer_are_found_at_their_offsets() -> None:
    """As ZeRO lays them: parts of parameters, empty ones, padding between and after them."""
    partition = Parameter(torch.zeros(12))
    estimator = MomentEstimator([partition], 0.9)
    feed(estimator, [partition], [torch.arange(12.0)])
    fragments = [
        Fragment("tail", (3, 4), 7, 5), Fragment("none", (2, 2), 4, 0, 5),
        whole("vector", (2,), 6), Fragment("head", (2, 5), 0, 3, 8),
    ]  # fmt: skip
    own = Estimates(estimator, [Buffer(partition, fragments)])
    for fragment, wanted in zip(fragments, ([0, 1, 2, 3, 4], [], [6, 7], [8, 9, 10]), strict=True):
        torch.testing.assert_close(own(fragment), torch.tensor(wanted, dtype=torch.float32))


def test_estimates_are_copies_and_leave_the_moment() -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    feed(estimator, params, gradients(0))
    first = estimates(estimator, params)
    wanted = [tensor.clone() for tensor in first]
    for tensor in first:
        tensor.fill_(7.0)
    found = estimates(estimator, params)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_frozen_parameters_have_no_moment() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    model = torch.nn.ParameterDict(dict(zip("abcdef", params, strict=True)))
    named = DaaTrainerMixin.trainable(SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert [name for name, _ in named] == list("acdef")
    estimator = MomentEstimator([parameter for _, parameter in named], 0.9)
    feed(estimator, params, gradients(0))
    assert params[1] not in estimator.state
    assert len(estimator.state) == 5


@pytest.mark.parametrize("skipped", [0, 2])
def test_no_good_step_is_an_error(skipped: int) -> None:
    params = parameters()
    estimator = MomentEstimator(params, 0.9)
    for _ in range(skipped):
        feed(estimator, params, [None] * len(params))
    with pytest.raises(ValueError, match="no usable gradient"):
        estimates(estimator, params)
