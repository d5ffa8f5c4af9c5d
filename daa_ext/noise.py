"""How noisy a gradient is: its noise scale from one pass over the data (DAA paper, fig. 2c).

A batch of B samples has the gradient g = G + noise, E|g|^2 = |G|^2 + tr(Sigma) / B with Sigma the
covariance of one sample's gradient. The weighted mean of s such gradients has
E|sum w_i g_i|^2 = |G|^2 + (sum w_i^2) tr(Sigma) / B. Both norms are at hand after an anchor pass,
so |G|^2 and tr(Sigma) follow, without bias. B_simple = tr(Sigma) / |G|^2, in samples, is the batch
at which noise and signal are equal (McCandlish et al., arXiv 1812.06162, eq. 2.9).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GradientNoise:
    """batch_norm: root mean square of |g_i|; signal: |G|^2; trace: tr(Sigma), of one sample.

    `signal` is an estimate and may fall below 0 where noise hides it; then there is no scale.
    """

    batch_norm: float
    signal: float
    trace: float

    @property
    def scale(self) -> float | None:
        """B_simple in samples; None where the signal is not above the noise."""
        return self.trace / self.signal if self.signal > 0.0 else None


def gradient_noise(
    norms: Sequence[float], mean_norm: float, beta: float, batch: float
) -> GradientNoise | None:
    """The noise of gradients at fixed weights; None where the mean is one step's gradient alone.

    Args:
        norms: |g_i| of each step, in order.
        mean_norm: norm of the bias-corrected moment, sum_i w_i g_i.
        beta: decay of the moment, w_i = (1 - beta) beta^(s - i) / (1 - beta^s).
        batch: B, samples per step.
    """
    raw = [beta**age for age in reversed(range(len(norms)))]
    weights = [each / sum(raw) for each in raw]
    square = sum(weight * norm**2 for weight, norm in zip(weights, norms, strict=True))
    share = sum(weight**2 for weight in weights)
    if not norms or 1.0 - share < 1e-9:
        return None
    variance = (square - mean_norm**2) / (1.0 - share)
    signal = mean_norm**2 - share * variance
    return GradientNoise(square**0.5, signal, max(0.0, variance) * batch)
