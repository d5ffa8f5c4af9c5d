"""Stage 1: the fp32 first moment of the general gradient, learning rate 0 (paper, sec. 3.1)."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer


class MomentEstimator(Optimizer):
    """An "optimizer" that moves no weight: m <- beta m + (1 - beta) g, per optimizer step.

    It stands where the host expects an optimizer, so batches, accumulation, averaging over
    ranks, mixed precision and checkpoints of the moment are the host's. A step without
    gradients (the host's way to skip one) leaves the moment and the step count alone.

    Memory: 4 bytes per parameter; no second moment, no copy of the weights.
    """

    def __init__(self, parameters: Iterable[Tensor], beta: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "beta": beta, "good_steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the estimator takes gradients, not closures"
        group = self.param_groups[0]
        if all(parameter.grad is None for parameter in group["params"]):
            return
        group["good_steps"] += 1
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["moment"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["moment"].mul_(group["beta"])
            if parameter.grad is not None:  # else this batch did not reach it: its gradient is 0
                state["moment"].add_(parameter.grad, alpha=1.0 - group["beta"])

    @property
    def good_steps(self) -> int:
        """s: steps that have entered the moment."""
        return int(self.param_groups[0]["good_steps"])

    def estimate(self, parameter: Tensor) -> Tensor:
        """The bias-corrected anchor m_s / (1 - beta^s) of one parameter, fp32, same shape.

        A parameter that never had a gradient has anchor 0. The moment is handed over, not
        copied: it is freed from the optimizer's state, so each parameter can be asked once.
        """
        moment = self.state.pop(parameter, {}).get("moment")
        if moment is None:
            return torch.zeros_like(parameter, dtype=torch.float32)
        beta = self.param_groups[0]["beta"]
        return moment.div_(1.0 - beta**self.good_steps)


def estimates(
    estimator: MomentEstimator, named: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, anchor) of the parameters that train, one at a time; empties the estimator.

    Raises:
        ValueError: no step had a finite gradient.
    """
    if estimator.good_steps == 0:
        raise ValueError(
            "The anchor pass saw no usable gradient: every batch was skipped or empty. "
            "Check the general data set and the model for NaN or infinite values."
        )
    for name, parameter in named:
        if parameter.requires_grad:
            yield name, estimator.estimate(parameter)
