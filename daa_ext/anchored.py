"""Stage 2: the anchor in every step of the optimizer that the user chose (paper, sec. 3.2 to 3.4).

`AnchoredOptimizer` is no optimizer of its own. It hangs on an existing Adam by the two hooks
that torch offers (`register_step_pre_hook`, `register_step_post_hook`), which survive every
wrapper of the hosts: before the step it measures s_t, blends the gradients and scales
lr, eps and weight decay; after the step it puts these settings back.

    law                                                       proved in
    daa_k0 = 0 and daa_dc = false: bitwise the plain step     tests/test_laws.py (law 1)
    dense anchor: the equations written out                   tests/test_laws.py (law 2)
    elements touched at the first step = elements anchored    tests/test_anchored.py (law 6)
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from daa_ext.blend import clipped_blend
from daa_ext.correction import StepScale, correction, similarity, step_scale
from daa_ext.lowrank import AnchorTerm
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


@dataclass
class Piece:
    """One trainable parameter and its anchor."""

    name: str
    parameter: Tensor
    term: AnchorTerm


def pair(named: Sequence[tuple[str, Tensor]], terms: Mapping[str, AnchorTerm]) -> list[Piece]:
    """The pieces of a model whose parameters' names and shapes match the anchor's."""
    assert {name for name, _ in named} == terms.keys()
    return [Piece(name, parameter, terms[name]) for name, parameter in named]


class AnchoredOptimizer:
    """Brings the anchor to `optimizer`.

    Per step: the caller says which step it is and what the host did to the gradient (`arm`),
    then the host calls `optimizer.step()`. A step that was not armed is an error, so a host
    that changes its order of calls cannot turn the method off unseen.

    Args:
        optimizer: any Adam with `lr`, `eps`, `weight_decay` in its parameter groups and
            decoupled decay.
        pieces: every parameter that trains, once.
        rule: settings.

    Raises:
        ValueError: the anchor is zero, or `optimizer` has no eps to correct.
    """

    def __init__(self, optimizer: Optimizer, pieces: list[Piece], rule: AnnealRule) -> None:
        self.rule = rule
        self.pieces = pieces
        self.anchor_norm = sum(piece.term.norm() ** 2 for piece in pieces) ** 0.5
        self.anchored_elements = 0
        self.last: StepRecord | None = None
        self._armed: tuple[int, float] | None = None
        self._saved: list[dict[str, float]] = []
        if self.anchor_norm == 0.0:
            raise ValueError("The anchor is zero: it has nothing to hold on to. Build it anew.")
        if rule.dc and not all(isinstance(g.get("eps"), float) for g in optimizer.param_groups):
            raise ValueError(
                f"daa_dc=true needs an Adam, and {type(optimizer).__name__} has no eps to scale. "
                "Set optim: adamw_torch (or _fused, adamw_8bit) or daa_dc: false."
            )
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def nbytes(self) -> int:
        """Bytes of anchor resident on this rank."""
        return sum(piece.term.nbytes for piece in self.pieces)

    def arm(self, step: int, domain_norm: float) -> None:
        """Announce optimizer step t = `step` whose whole-batch gradient has norm `domain_norm`.

        Args:
            step: 0 <= t < T.
            domain_norm: ||g_D||, finite, before the host's clipping.
        """
        self._armed = (step, domain_norm)

    def skip(self) -> None:
        """Announce a step without gradients: the optimizer has nothing to do and nor have we."""
        self._armed = None
        assert all(piece.parameter.grad is None for piece in self.pieces)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        reached = [piece for piece in self.pieces if piece.parameter.grad is not None]
        if not reached and self._armed is None:
            return
        assert self._armed is not None, "optimizer.step() without arm(): DAA would not run"
        step, domain_norm = self._armed
        self._armed = None
        if not reached:
            raise ValueError(
                f"Step {step}: no anchored parameter has a gradient, so DAA would not act. Do not "
                "hand the gradients to another optimizer."
            )

        seen_norm, seen_inner = _norm_and_inner(reached)
        host_clip = seen_norm / domain_norm if domain_norm > 0.0 else 1.0
        inner = seen_inner / host_clip if host_clip > 0.0 else 0.0
        s = similarity(inner, domain_norm, self.anchor_norm)
        share = gamma(step, self.rule.total_steps, self.rule.k0) if self.rule.gga else 0.0
        if share > 0.0:
            blend = clipped_blend(
                share,
                domain_norm=domain_norm,
                anchor_norm=self.anchor_norm,
                inner=inner,
                host_clip=host_clip if host_clip > 0.0 else 1.0,
                max_norm=self.rule.max_norm,
            )
            for piece in self.pieces:
                if piece.parameter.grad is None:  # the batch did not reach it: g_D is 0 there
                    piece.parameter.grad = torch.zeros_like(piece.parameter)
                piece.term.blend_(piece.parameter.grad.view(-1), 0, blend.domain, blend.anchor)
        c = correction(s, self.rule.c0) if self.rule.dc else 1.0
        if self.rule.dc:
            self._scale(optimizer, step_scale(c))
        if self.anchored_elements == 0:  # law 6: at the first step
            touched = self.pieces if share > 0.0 else reached
            self.anchored_elements = sum(piece.parameter.numel() for piece in touched)
        learning_rate = float(optimizer.param_groups[0]["lr"])
        self.last = StepRecord(step, s, c, share, domain_norm, learning_rate)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, saved in zip(optimizer.param_groups, self._saved, strict=False):
            group.update(saved)
        self._saved = []

    def _scale(self, optimizer: Optimizer, scale: StepScale) -> None:
        for group in optimizer.param_groups:
            self._saved.append({key: group[key] for key in asdict(scale)})
            for key, factor in asdict(scale).items():
                group[key] = group[key] * factor  # not in place: lr may be a tensor


def _norm_and_inner(pieces: list[Piece]) -> tuple[float, float]:
    """||g|| and <g, g_hat> of the gradients as they are now; fp32 products, fp64 sums."""
    sums = torch.zeros(2, dtype=torch.float64, device=pieces[0].parameter.device)
    for piece in pieces:
        assert piece.parameter.grad is not None
        flat = piece.parameter.grad.view(-1).float()
        sums[0] += torch.dot(flat, flat)
        sums[1] += piece.term.inner(flat)
    squared, inner = sums.tolist()  # the one synchronisation with the device per step
    return squared**0.5, inner
