"""Stage 2: the anchor in every step of the optimizer that the user chose (paper, sec. 3.2 to 3.4).

`AnchoredOptimizer` is no optimizer of its own. It hangs on an existing Adam (`steered`): before
the step it blends the gradients and scales lr, eps and weight decay; after the step it puts
these settings back. Where it has a leash it draws the weights back first.

    law                                                       proved in
    daa_k0 = 0 and daa_dc = false: bitwise the plain step     tests/test_laws.py (law 1)
    dense anchor: the equations written out                   tests/test_laws.py (law 2)
    elements touched at the first step = elements anchored    tests/test_anchored.py (law 6)
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from daa_ext.blend import clipped_blend
from daa_ext.correction import StepScale, correction, similarity, step_scale
from daa_ext.fragments import Fragment
from daa_ext.layout import Layout, squared_norm
from daa_ext.resident import ResidentAnchor
from daa_ext.schedule import gamma
from daa_ext.start import Start
from daa_ext.steered import Change, SteeredOptimizer


@dataclass(frozen=True)
class AnnealRule:
    """The settings of the method and of the host that a step needs."""

    total_steps: int  # T
    k0: float
    c0: float
    gga: bool
    dc: bool
    max_norm: float  # the host's clipping threshold, <= 0: none
    boost_max: float = inf  # a step is at most this many times the scheduler's


@dataclass(frozen=True)
class StepRecord:
    """What one step measured and did."""

    step: int  # t
    similarity: float
    correction: float  # 1.0 with daa_dc: false
    gamma: float
    domain_grad_norm: float  # ||g_D||, before any clipping
    effective_lr: float  # eta_t / sqrt(c_t) of the first parameter group
    distance: float | None = None  # ||theta - theta_0|| before the step; None without a radius


@dataclass(frozen=True)
class Measured:
    """The scalars of one step, of the whole batch and over all ranks, before any clipping.

    domain_norm: ||g_D||; inner: <g_D, g_hat>; both finite, without loss scale.
    distance: ||theta - theta_0||, where the run has a radius.
    """

    domain_norm: float
    inner: float
    distance: float | None = None


@dataclass(frozen=True)
class Leash:
    """Draws the weights back into the ball ||theta - theta_0|| <= radius before a step."""

    start: Start
    radius: float  # > 0, absolute

    def factor(self, distance: float) -> float:
        """What theta - theta_0 is multiplied by: 1 inside the ball."""
        return self.radius / distance if distance > self.radius else 1.0


class AnchoredOptimizer(SteeredOptimizer):
    """Brings the anchor to `optimizer`.

    Per step: `sums` measures, the caller says which step it is and what was found (`arm`), then
    the host steps.

    Args:
        optimizer: any Adam with `lr`, `eps`, `weight_decay` in its parameter groups and
            decoupled decay.
        layout: which fragments lie in which tensors of `optimizer`.
        anchor: this rank's parts, one for each fragment.
        rule: settings.
        leash: keeps the weights near the start; `arm` then needs the distance.

    Raises:
        ValueError: the anchor is zero, or `optimizer` has no eps to correct.
    """

    method = "DAA"

    def __init__(
        self,
        optimizer: Optimizer,
        layout: Layout,
        anchor: ResidentAnchor,
        rule: AnnealRule,
        leash: Leash | None = None,
    ) -> None:
        self.rule = rule
        self.leash = leash
        self.anchor = anchor
        self.last: StepRecord | None = None
        self._armed: tuple[Measured, float, Callable[[], float]] | None = None
        self._saved: list[dict[str, float]] = []
        if anchor.norm == 0.0:
            raise ValueError("The anchor is zero: it has nothing to hold on to. Build it anew.")
        if rule.dc and not all(isinstance(g.get("eps"), float) for g in optimizer.param_groups):
            raise ValueError(
                f"daa_dc=true needs an Adam, and {type(optimizer).__name__} has no eps to scale. "
                "Set optim: adamw_torch (or _fused, adamw_8bit) or daa_dc: false."
            )
        super().__init__(optimizer, layout)

    @torch.no_grad()
    def sums(self, device: torch.device) -> Tensor:
        """[||g||^2, <g, g_hat>] of this rank's gradients as they are now, fp64, on `device`.

        Backwards, so that under ZeRO-3 the blend finds the Vt that it needs first still there.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for fragment, gradient in reversed(list(self.layout.raw())):
            sums[0] += squared_norm([gradient], device)
            sums[1] += self.anchor.parts[fragment.name].inner(gradient).to(device)
        return sums

    def arm(self, step: int, measured: Measured, host_factor: Callable[[], float]) -> None:
        """Announce optimizer step t = `step`.

        Args:
            step: 0 <= t < T.
            measured: of this step's gradient.
            host_factor: tells, when the inner step begins, what the host has multiplied g_D by
                (clipping; what it did to the loss scale).
        """
        self._expect_step(step)
        s = similarity(measured.inner, measured.domain_norm, self.anchor.norm)
        c = correction(s, self.rule.c0, self.rule.boost_max) if self.rule.dc else 1.0
        share = gamma(step, self.rule.total_steps, self.rule.k0) if self.rule.gga else 0.0
        rate = float(self._optimizer.param_groups[0]["lr"]) * step_scale(c).lr
        self.last = StepRecord(step, s, c, share, measured.domain_norm, rate, measured.distance)
        self._armed = (measured, share, host_factor)

    def _change(self) -> Change | None:
        assert self._armed is not None
        measured, share, host_factor = self._armed
        if share == 0.0:
            return None
        blend = clipped_blend(
            share,
            domain_norm=measured.domain_norm,
            anchor_norm=self.anchor.norm,
            inner=measured.inner,
            host_clip=host_factor(),
            max_norm=self.rule.max_norm,
        )

        def change(piece: Fragment, gradient: Tensor) -> None:
            self.anchor.parts[piece.name].blend_(gradient, blend.domain, blend.anchor)

        return change

    def _prepare(self, optimizer: Optimizer) -> None:
        assert self.last is not None
        if self.leash is not None:
            self._draw_back(optimizer, self.leash)
        if self.rule.dc:
            self._scale(optimizer, step_scale(self.last.correction))

    def _draw_back(self, optimizer: Optimizer, leash: Leash) -> None:
        assert self.last is not None
        assert self.last.distance is not None
        factor = leash.factor(self.last.distance)
        if factor < 1.0:
            stepped = (p for group in optimizer.param_groups for p in group["params"])
            for piece in self.pieces_in(stepped):
                leash.start.draw_back(piece.name, factor)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, saved in zip(optimizer.param_groups, self._saved, strict=False):
            group.update(saved)
        self._saved = []

    def _scale(self, optimizer: Optimizer, scale: StepScale) -> None:
        for group in optimizer.param_groups:
            self._saved.append({key: group[key] for key in asdict(scale)})
            for key, factor in asdict(scale).items():
                group[key] = group[key] * factor  # not in place: lr may be a tensor
