"""L2 penalty to the starting weights (L2-SP, arXiv:1802.01483, with one strength for all weights).

    loss + lambda / n sum_i (theta_i - theta0_i)^2,   n: number of weights that train
    its gradient, before clipping: g + kappa (theta - theta0),   kappa = 2 lambda / n

The pull enters through the gradient, and the sum of both is clipped, as the host would clip the
gradient of the sum of both losses; that needs three scalars and no further pass (`blend`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from daa_ext.blend import clipped_combination
from daa_ext.fragments import Fragment
from daa_ext.layout import Layout, squared_norm
from daa_ext.start import Start
from daa_ext.steered import Change, SteeredOptimizer


def pull_factor(strength: float, trained: int) -> float:
    """kappa = 2 lambda / n.

    The penalty is a mean: with lambda = 1e-3 and n = 1e8 kappa is 2e-11. lambda = L n gives the
    sum, L sum_i (theta_i - theta0_i)^2, with kappa = 2 L.
    """
    return 2.0 * strength / trained


class PulledOptimizer(SteeredOptimizer):
    """Adds the pull kappa (theta - theta0) to the gradients that `optimizer` steps with.

    Args:
        optimizer: any torch optimizer that reads `.grad` in `step`.
        layout: which fragments lie in which tensors of `optimizer`.
        start: theta0, beside the weights of `layout`.
        kappa: > 0.
        max_norm: the host's clipping threshold; <= 0 where it does not clip.
    """

    method = "use_l2_init"

    def __init__(
        self,
        optimizer: Optimizer,
        layout: Layout,
        start: Start,
        kappa: float,
        max_norm: float,
    ) -> None:
        super().__init__(optimizer, layout)
        self.start = start
        self.kappa = kappa
        self.max_norm = max_norm
        self._armed: tuple[float, float, float, Callable[[], float]] | None = None

    @torch.no_grad()
    def sums(self, device: torch.device) -> Tensor:
        """[||g||^2, <g, theta - theta0>] of this rank's gradients as they are now, fp64."""
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for fragment, gradient in self.layout.raw():
            sums[0] += squared_norm([gradient], device)
            for piece, moved in self.start.moved(fragment.name, gradient):
                sums[1] += torch.dot(piece.to(moved.device, torch.float32), moved).to(device)
        return sums

    def arm(
        self,
        step: int,
        grad_norm: float,
        inner: float,
        distance: float,
        factor: Callable[[], float],
    ) -> None:
        """Announce optimizer step `step`.

        Args:
            grad_norm: ||g|| of the whole batch over all ranks, before clipping, without loss scale.
            inner: <g, theta - theta0>, likewise.
            distance: ||theta - theta0|| over all ranks.
            factor: tells, when the inner step begins, what the host has multiplied g by.
        """
        self._expect_step(step)
        self._armed = (grad_norm, inner, distance, factor)

    def _change(self) -> Change:
        assert self._armed is not None
        grad_norm, inner, distance, factor = self._armed
        share = clipped_combination(
            self.kappa,
            1.0,
            domain_norm=grad_norm,
            anchor_norm=distance,
            inner=inner,
            host_clip=factor(),
            max_norm=self.max_norm,
        )

        def change(fragment: Fragment, gradient: Tensor) -> None:
            for piece, moved in self.start.moved(fragment.name, gradient):
                piece.mul_(share.domain).add_(moved, alpha=share.anchor)

        return change
