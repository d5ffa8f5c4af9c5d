"""Stage 1: the fp32 first moment of the general gradient, learning rate 0 (paper, sec. 3.1)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from daa_ext.fragments import Fragment
from daa_ext.layout import Buffer


class MomentEstimator(Optimizer):
    """An "optimizer" that moves no weight: m <- beta m + (1 - beta) g, per optimizer step.

    It stands where the host expects an optimizer, so batches, accumulation, averaging over
    ranks, mixed precision and checkpoints of the moment are the host's. A step without
    gradients (the host's way to skip one) leaves the moment and the step count alone. The host
    may step the parameters in several calls per optimizer step (ZeRO: one per group), so each
    parameter counts its own steps.

    Memory: 4 bytes per parameter (per element of the partition); no second moment, no copy of
    the weights.
    """

    def __init__(self, parameters: Iterable[Tensor], beta: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "beta": beta})
        self.beta = beta

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the estimator takes gradients, not closures"
        parameters = [p for group in self.param_groups for p in group["params"]]
        if all(parameter.grad is None for parameter in parameters):
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] += 1
            state["exp_avg"].mul_(self.beta)
            if parameter.grad is not None:  # else this batch did not reach it: its gradient is 0
                state["exp_avg"].add_(parameter.grad, alpha=1.0 - self.beta)

    @property
    def good_steps(self) -> int:
        """s: steps that have entered the moment."""
        return max((int(state["step"]) for state in self.state.values()), default=0)


class Estimates:
    """The anchor, element by element, of what this rank holds: m_s / (1 - beta^s), fp32.

    Raises:
        ValueError: no step had a finite gradient.
    """

    def __init__(self, estimator: MomentEstimator, buffers: Iterable[Buffer]) -> None:
        self.steps = estimator.good_steps
        if self.steps == 0:
            raise ValueError(
                "The anchor pass saw no usable gradient: every batch was skipped or empty. "
                "Check the general data set and the model for NaN or infinite values."
            )
        self._unbias = 1.0 - estimator.beta**self.steps
        self._moments: dict[str, tuple[Tensor, int]] = {}  # name -> (flat moment, offset)
        for buffer in buffers:
            moment = estimator.state[buffer.parameter]["exp_avg"].view(-1)
            for fragment in buffer.fragments:
                self._moments[fragment.name] = (moment, fragment.offset)

    def __call__(self, fragment: Fragment) -> Tensor:
        """The elements of one of this rank's fragments, flat: a new tensor."""
        moment, offset = self._moments[fragment.name]
        return moment[offset : offset + fragment.numel] / self._unbias
