"""Two gradients made one: combine first, then clip what comes of it (GGA, eq. 2; L2 penalty).

The host has clipped g_D to g' = a g_D before the optimizer sees it. Nothing needs undoing in
a pass of its own: with the scalars that the similarity needs anyway,

    ||g_B||^2 = gamma^2 ||g_hat||^2 + 2 gamma (1 - gamma) <g_D, g_hat> + (1 - gamma)^2 ||g_D||^2,

so the clip factor b of the blend is known before the first element changes, and the clipped
blend b g_B = (b gamma) g_hat + (b (1 - gamma) / a) g' takes one pass.
"""

from dataclasses import dataclass
from math import sqrt

CLIP_EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm it divides by


@dataclass(frozen=True)
class Blend:
    """Coefficients of one step's blend: new gradient = anchor * g_hat + domain * g'."""

    anchor: float
    domain: float


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor in (0, 1] that clips a gradient of norm `norm`; `max_norm` <= 0 clips nothing."""
    return min(1.0, max_norm / (norm + CLIP_EPS)) if max_norm > 0 else 1.0


def combined_norm(
    anchor: float, domain: float, *, domain_norm: float, anchor_norm: float, inner: float
) -> float:
    """||anchor * g_hat + domain * g_D|| from the norms of both and inner = <g_D, g_hat>."""
    squared = (
        (anchor * anchor_norm) ** 2 + 2.0 * anchor * domain * inner + (domain * domain_norm) ** 2
    )
    return sqrt(max(squared, 0.0))  # rounding can leave -1e-17 where the two cancel


def clipped_combination(
    anchor: float,
    domain: float,
    *,
    domain_norm: float,
    anchor_norm: float,
    inner: float,
    host_clip: float,
    max_norm: float,
) -> Blend:
    """Coefficients that turn the host's clipped gradient into the clipped combination.

    Args:
        anchor, domain: the coefficients of g_hat and of the unclipped g_D in the combination.
        domain_norm: ||g_D||, unclipped and unscaled.
        anchor_norm: ||g_hat||.
        inner: <g_D, g_hat>, of the unclipped g_D.
        host_clip: a > 0, the factor by which the host has multiplied g_D.
        max_norm: the host's clipping threshold; <= 0 where it does not clip.
    """
    norm = combined_norm(
        anchor, domain, domain_norm=domain_norm, anchor_norm=anchor_norm, inner=inner
    )
    factor = clip_factor(norm, max_norm)
    return Blend(anchor=factor * anchor, domain=factor * domain / host_clip)


def clipped_blend(gamma: float, **measured: float) -> Blend:
    """`clipped_combination` of eq. 2: gamma g_hat + (1 - gamma) g_D, gamma in (0, 1]."""
    return clipped_combination(gamma, 1.0 - gamma, **measured)
