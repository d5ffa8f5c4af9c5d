"""Dynamic correction (DC): how far the step reaches when two gradients disagree (eq. 7 to 9, 12).

Epsilon stands outside the root, so for any c > 0

    sqrt(c v) + eps = sqrt(c) (sqrt(v) + eps / sqrt(c)),

that is: DC *is* "learning rate / sqrt(c) and eps / sqrt(c) for this one step". Every Adam
kernel (torch, fused, 8-bit, CPU offload) then does the update unchanged. Decoupled weight
decay shrinks by learning rate * decay; it must not feel c, so decay is multiplied by sqrt(c).
"""

from dataclasses import dataclass
from math import inf, sqrt


def similarity(inner: float, domain_norm: float, anchor_norm: float) -> float:
    """s_t = |<g_D, g_hat>| / (||g_D|| ||g_hat||) over all parameters at once (eq. 7).

    A cosine: neither clipping nor a loss scale changes it. In [0, 1]; 0 where a norm is 0.
    """
    product = domain_norm * anchor_norm
    return min(1.0, abs(inner) / product) if product > 0.0 else 0.0


def correction(similarity: float, c0: float, boost_max: float = inf) -> float:
    """c_t = s_t + c0 (eq. 8), > 0 because c0 is; not below 1 / boost_max^2.

    The step is 1/sqrt(c_t) times as long, so the floor is a cap on that factor: it is
    min(1/sqrt(s_t + c0), boost_max). The cap is not the paper's (docs/decisions/0018).

    Args:
        boost_max: >= 1; infinite for the paper's equation.
    """
    return max(similarity + c0, boost_max**-2)


@dataclass(frozen=True)
class StepScale:
    """What c_t does to the settings of one Adam step: factors on lr, eps and weight decay."""

    lr: float
    eps: float
    weight_decay: float


def step_scale(c: float) -> StepScale:
    """The factors for c_t = c > 0; all 1 at c = 1."""
    root = sqrt(c)
    return StepScale(lr=1.0 / root, eps=1.0 / root, weight_decay=root)
