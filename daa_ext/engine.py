"""One optimizer step of a DeepSpeed engine, with a word before it and one after it.

accelerate calls `engine.step()` inside its own backward, before the Trainer's callbacks hear of
the step. So the engine's own method is where a stage measures the gradient: it is called with
the whole batch's gradient reduced to its owners, and nothing clipped, unscaled or stepped yet.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from daa_ext.layout import Layout, Replicated
from daa_ext.ranks import Ranks
from daa_ext.zero import check_norm, host_factor


class Stage(Protocol):
    """What a stage of DAA does around a step."""

    def sums(self, device: torch.device) -> Tensor:
        """[||g||^2, <g, g_hat>] of this rank's gradients, fp64, on `device`."""

    def before_engine_step(self, norm: float, inner: float, factor: Callable[[], float]) -> None:
        """The engine steps next; see AnchoredOptimizer.arm."""

    def after_step(self) -> None:
        """The weights have moved."""

    def step_skipped(self, expected: bool) -> None:
        """The gradients are gone. `expected`: loss scaling does that now and then."""


class EngineSteps:
    """Stands around `engine.step` from `install` on. Sums and decisions are the same on all ranks.

    Cost: one pass over the local gradients and one all-reduce of two numbers per optimizer step.
    """

    def __init__(self, engine: Any, layout: Layout, ranks: Ranks, stage: Stage) -> None:
        self.engine = engine
        self.layout = layout
        self.ranks = ranks
        self.stage = stage
        self._norm_checked = False

    def install(self) -> None:
        self._host_step = self.engine.step
        self.engine.step = self._step

    def uninstall(self) -> None:
        del self.engine.step  # the class's own method shows again

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if not self.engine.is_gradient_accumulation_boundary():
            return self._host_step(*args, **kwargs)
        if self.ranks.device.type != "cpu":  # offloaded gradients arrive on streams of their own
            torch.cuda.synchronize(self.ranks.device)
        scale = self.layout.loss_scale()
        squared, inner = self._sums()
        scaled = squared**0.5
        is_finite = isfinite(scaled)
        if is_finite:
            clip = self.engine.gradient_clipping()
            self.stage.before_engine_step(
                scaled / scale,
                inner / scale,
                lambda: scale * host_factor(self.layout, scaled, clip),
            )
        elif isinstance(self.engine.optimizer, Optimizer):  # nothing there looks for overflow
            assert isinstance(self.layout, Replicated)
            self.layout.discard()
        result = self._host_step(*args, **kwargs)
        if is_finite and self.engine.was_step_applied():
            if self.layout.sharded and not self._norm_checked:
                check_norm(self.engine, scaled / scale)
                self._norm_checked = True
            self.stage.after_step()
        else:
            self.stage.step_skipped(expected=bool(self.engine.fp16_enabled()))
        return result

    def _sums(self) -> list[float]:
        sums = self.stage.sums(self.ranks.device)
        return (self.ranks.add_up(sums) if self.layout.sharded else sums).tolist()
