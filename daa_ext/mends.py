"""What deepspeed 0.19.8 leaves wrong behind, put right from outside, each in one place."""

import sys

from torch import Tensor
from torch.optim import Optimizer


def separate_step_counts(optimizer: Optimizer) -> None:
    """Give every tensor that `optimizer` steps a step count of its own.

    Loading a universal checkpoint, ZeRO-3 of deepspeed 0.19.8 hands one and the same count to all
    sub-groups, which then count each other's steps.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def forget_modules() -> None:
    """Empty the list in which ZeRO-3 of deepspeed 0.19.8 keeps the last forward's modules alive."""
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    getattr(offload, "FWD_MODULE_STACK", []).clear()
