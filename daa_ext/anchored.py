"""Stage 2: the anchor in every step of the optimizer that the user chose (paper, sec. 3.2 to 3.4).

`AnchoredOptimizer` is no optimizer of its own. It hangs on an existing Adam by the two hooks
that torch offers (`register_step_pre_hook`, `register_step_post_hook`), which survive every
wrapper of the hosts: before the step it blends the gradients and scales lr, eps and weight
decay; after the step it puts these settings back.

    law                                                       proved in
    daa_k0 = 0 and daa_dc = false: bitwise the plain step     tests/test_laws.py (law 1)
    dense anchor: the equations written out                   tests/test_laws.py (law 2)
    elements touched at the first step = elements anchored    tests/test_anchored.py (law 6)
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from daa_ext.blend import Blend, clipped_blend
from daa_ext.correction import StepScale, correction, similarity, step_scale
from daa_ext.layout import Layout, squared_norm
from daa_ext.resident import ResidentAnchor
from daa_ext.schedule import gamma


@dataclass(frozen=True)
class AnnealRule:
    """The settings of the method and of the host that a step needs."""

    total_steps: int  # T
    k0: float
    c0: float
    gga: bool
    dc: bool
    max_norm: float  # the host's clipping threshold, <= 0: none


@dataclass(frozen=True)
class StepRecord:
    """What one step measured and did."""

    step: int  # t
    similarity: float
    correction: float  # 1.0 with daa_dc: false
    gamma: float
    domain_grad_norm: float  # ||g_D||, before any clipping
    effective_lr: float  # eta_t / sqrt(c_t) of the first parameter group


@dataclass(frozen=True)
class Measured:
    """The scalars of one step, of the whole batch and over all ranks, before any clipping.

    domain_norm: ||g_D||; inner: <g_D, g_hat>; both finite, without loss scale.
    """

    domain_norm: float
    inner: float


class AnchoredOptimizer:
    """Brings the anchor to `optimizer`.

    Per step: `sums` measures, the caller says which step it is and what was found (`arm`), then
    the host calls `optimizer.step()`, once or once per buffer. A step that was not armed is an
    error, so a host that changes its order of calls cannot turn the method off unseen; so is a
    buffer that is stepped twice, or not at all (`finish`).

    Args:
        optimizer: any Adam with `lr`, `eps`, `weight_decay` in its parameter groups and
            decoupled decay.
        layout: which fragments lie in which tensors of `optimizer`.
        anchor: this rank's parts, one for each fragment.
        rule: settings.

    Raises:
        ValueError: the anchor is zero, or `optimizer` has no eps to correct.
    """

    def __init__(
        self, optimizer: Optimizer, layout: Layout, anchor: ResidentAnchor, rule: AnnealRule
    ) -> None:
        self.rule = rule
        self.layout = layout
        self.anchor = anchor
        self.anchored_elements = 0  # on this rank, at the first step
        self.last: StepRecord | None = None
        self._first_step: int | None = None
        self._optimizer = optimizer
        self._buffers = {id(buffer.parameter): buffer for buffer in layout.buffers()}
        self._armed: tuple[Measured, float, Callable[[], float]] | None = None
        self._waiting: set[int] = set()  # buffers that this step has yet to reach
        self._saved: list[dict[str, float]] = []
        if anchor.norm == 0.0:
            raise ValueError("The anchor is zero: it has nothing to hold on to. Build it anew.")
        if rule.dc and not all(isinstance(g.get("eps"), float) for g in optimizer.param_groups):
            raise ValueError(
                f"daa_dc=true needs an Adam, and {type(optimizer).__name__} has no eps to scale. "
                "Set optim: adamw_torch (or _fused, adamw_8bit) or daa_dc: false."
            )
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

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
        assert not self._waiting, "the last step did not reach every buffer"
        s = similarity(measured.inner, measured.domain_norm, self.anchor.norm)
        c = correction(s, self.rule.c0) if self.rule.dc else 1.0
        share = gamma(step, self.rule.total_steps, self.rule.k0) if self.rule.gga else 0.0
        rate = float(self._optimizer.param_groups[0]["lr"]) * step_scale(c).lr
        self.last = StepRecord(step, s, c, share, measured.domain_norm, rate)
        self._first_step = step if self._first_step is None else self._first_step
        self._armed = (measured, share, host_factor)
        self._waiting = set(self._buffers)

    def skip(self) -> None:
        """Announce that the host throws this step's gradients away."""
        if self.anchored_elements == 0:
            self._first_step = None
        self._armed = None
        self._waiting = set()

    def finish(self) -> None:
        """The host says that the step is done: every buffer must have been reached."""
        assert not self._waiting, "the host stepped only a part of the parameters"
        self._armed = None

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        reached = [p for p in stepped if p.grad is not None]
        if not reached and self._armed is None:
            return
        assert self._armed is not None, "optimizer.step() without arm(): DAA would not run"
        assert self.last is not None
        measured, share, host_factor = self._armed
        if not reached:
            raise ValueError(
                f"Step {self.last.step}: no anchored parameter has a gradient, so DAA would not "
                "act. Do not hand the gradients to another optimizer."
            )
        keys = {id(parameter) for parameter in stepped}
        assert keys <= self._waiting, "a buffer is stepped twice, or is not anchored"
        self._waiting -= keys
        if share > 0.0:
            blend = self._blend(measured, share, host_factor())
            for parameter in stepped:
                if parameter.grad is None:  # the batch did not reach it: g_D is 0 there
                    parameter.grad = torch.zeros_like(parameter)
                flat = parameter.grad.view(-1)
                for piece in self._buffers[id(parameter)].fragments:
                    part = flat[piece.offset : piece.offset + piece.numel]
                    self.anchor.parts[piece.name].blend_(part, blend.domain, blend.anchor)
        if self.rule.dc:
            self._scale(optimizer, step_scale(self.last.correction))
        if self.last.step == self._first_step:  # law 6
            touched = stepped if share > 0.0 else reached
            pieces = (piece for p in touched for piece in self._buffers[id(p)].fragments)
            self.anchored_elements += sum(piece.numel for piece in pieces)

    def _blend(self, measured: Measured, share: float, factor: float) -> Blend:
        return clipped_blend(
            share,
            domain_norm=measured.domain_norm,
            anchor_norm=self.anchor.norm,
            inner=measured.inner,
            host_clip=factor,
            max_norm=self.rule.max_norm,
        )

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, saved in zip(optimizer.param_groups, self._saved, strict=False):
            group.update(saved)
        self._saved = []

    def _scale(self, optimizer: Optimizer, scale: StepScale) -> None:
        for group in optimizer.param_groups:
            self._saved.append({key: group[key] for key in asdict(scale)})
            for key, factor in asdict(scale).items():
                group[key] = group[key] * factor  # not in place: lr may be a tensor
