"""Fine-tuning losses that weight the tokens of the plain loss, to forget less.

    plain   loss = sum_i l_i / N,   l_i = -log p_i,   N the labelled tokens
    TALR    loss = sum_i w_i l_i / N,   w_i = max(stopgrad(p_i)^(1/tau), w_min)
            (arXiv 2509.20758; tau the median over the batch of the sequences' mean l_i)
    FLOW    loss = sum_s w_s sum_{i in s} l_i / N,   w_s = exp(-f_s / tau)
            (arXiv 2502.02797; f_s the mean l_i of sample s under the base model, tau its median)

The weights are not normalised: they sum neither to 1 nor to N. Shapes: B sequences, T positions,
V words. A label of -100 is none.
"""

import torch
from torch import Tensor
from torch.nn import functional

NO_LABEL = -100


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(l_i in fp32, whether there is one): the loss of the label that follows each position.

    Returns:
        losses (B, T), 0 where there is no label, and a mask (B, T).
    """
    following_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=NO_LABEL).to(logits_BTV.device)
    losses = functional.cross_entropy(
        logits_BTV.float().flatten(0, 1),
        following_BT.flatten(),
        ignore_index=NO_LABEL,
        reduction="none",
    )
    return losses.view_as(following_BT), following_BT != NO_LABEL


def sequence_means(losses_BT: Tensor, labelled_BT: Tensor) -> Tensor:
    """Mean token loss of each sequence (B); NaN for a sequence without labels."""
    return losses_BT.detach().sum(dim=1) / labelled_BT.sum(dim=1)


def median(values: Tensor) -> Tensor:
    """Median of the values that are not NaN, the mean of the middle two; NaN if there is none.

    No step waits for the device: the number of values stays a tensor.
    """
    ordered = values.sort().values  # NaN last
    count = values.isnan().logical_not().sum()
    middle = torch.stack([(count - 1).clamp(min=0) // 2, count // 2])
    return ordered[middle].mean()


def talr_weights(losses: Tensor, tau: Tensor, w_min: float) -> Tensor:
    """max(p^(1/tau), w_min) for p = exp(-loss), without a gradient.

    Args:
        tau: >= 0, a scalar. At 0 the weights are their limits: 1 for a loss of 0, else w_min.
    """
    return _boltzmann(losses.detach(), tau).clamp(min=w_min)


def flow_weights(base_losses: Tensor, tau: Tensor) -> Tensor:
    """exp(-f / tau); tau >= 0, at 0 the limits 1 for a loss of 0, else 0."""
    return _boltzmann(base_losses, tau)


def weighted_mean(losses: Tensor, weights: Tensor, labelled: Tensor, tokens: Tensor) -> Tensor:
    """sum_i w_i l_i / tokens over the labelled tokens.

    Args:
        tokens: labelled tokens of the whole optimizer step, not of this batch alone.
    """
    return (losses * weights.where(labelled, 0.0)).sum() / tokens


def _boltzmann(losses: Tensor, tau: Tensor) -> Tensor:
    return torch.exp(-losses / tau.clamp(min=torch.finfo(tau.dtype).tiny))
