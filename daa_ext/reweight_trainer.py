"""Weighted losses in the host's trainer: TALR, and what it shares with FLOW."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daa_ext.passes import DaaRun
from daa_ext.ranks import Ranks
from daa_ext.reweight import median, sequence_means, talr_weights, token_losses, weighted_mean

if TYPE_CHECKING:
    from transformers import Trainer as HostTrainer
else:
    HostTrainer = object


class ReweightTrainerMixin(HostTrainer):
    """Stands before a host trainer: weights the loss in training, and no other.

    The host's own `compute_loss_func` gets the weighted loss, so its scaling by accumulation and
    ranks stays. Evaluation, in and after training, reports the plain loss.
    """

    daa_run: DaaRun
    compute_loss_func: Any  # of the host
    method: str  # prefix of its keys and of what it logs
    tau: Tensor  # the latest

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = Ranks.of_run(self.args.device)
        self._refuse_unserved()
        self.compute_loss_func = self._weighted_loss
        self.weighted_batches = 0
        self._weighed = self._nothing_weighed()

    def weights(self, losses: Tensor, labelled: Tensor) -> Tensor:
        """The weights of a batch's tokens, without a gradient; sets `tau`. Collective.

        Args:
            losses: (B, T), 0 where there is no label.
            labelled: (B, T), where there is one.
        """
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        if self.weighted_batches == 0:
            raise ValueError(
                f"use_{self.method}_loss=true, but no batch was weighted: no training step was "
                "taken, or another part of the host computes the loss (sequence parallelism). "
                "Check the data and max_steps (a finished run in output_dir is resumed unless "
                "overwrite_output_dir: true)."
            )
        return result

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.compute_loss_func = self._weighted_loss if model.training else None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = self._weighted_loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.weighted_batches:
            total, tokens = self.ranks.add_up(self._weighed).tolist()
            logs |= {
                f"{self.method}/tau": float(self.tau),
                f"{self.method}/weight_mean": total / tokens if tokens else 0.0,
            }
            self._weighed = self._nothing_weighed()
        super().log(logs, *args, **kwargs)

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        losses, labelled = token_losses(outputs["logits"], labels)
        weights = self.weights(losses, labelled).expand_as(losses)
        seen = torch.stack([weights.where(labelled, 0.0).sum(), labelled.sum()])
        self._weighed += seen.to(self._weighed)
        self.weighted_batches += 1
        tokens = torch.as_tensor(num_items_in_batch, device=losses.device)
        return weighted_mean(losses, weights, labelled, tokens)

    def _nothing_weighed(self) -> Tensor:
        """[sum of the weights, tokens] since the last log, on this rank."""
        return torch.zeros(2, dtype=torch.float64, device=self.args.device)

    def _refuse_unserved(self) -> None:
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} has no effect with "
                f"use_{self.method}_loss=true: remove one of the two."
            )
        if getattr(self.model.config, "output_router_logits", False):
            raise ValueError(
                f"moe_aux_loss_coef cannot go with use_{self.method}_loss=true: the router's loss "
                "would be left out. Remove one of the two."
            )


class TalrTrainerMixin(ReweightTrainerMixin):
    """TALR: a token's own probability is its weight."""

    method = "talr"

    def weights(self, losses: Tensor, labelled: Tensor) -> Tensor:
        settings = self.daa_run.settings
        if settings.talr_tau is None:
            self.tau = self._median(sequence_means(losses, labelled))
        else:
            self.tau = losses.new_tensor(settings.talr_tau)
        return talr_weights(losses, self.tau, settings.talr_w_min)

    def _median(self, means: Tensor) -> Tensor:
        """The median over this micro-batch of all ranks, whose last batches may be shorter."""
        part = means.new_full((self._train_batch_size,), torch.nan)
        part[: len(means)] = means
        everyones = part.new_empty(self.ranks.size * len(part))
        self.ranks.gather_into(everyones, part)
        return median(everyones)
