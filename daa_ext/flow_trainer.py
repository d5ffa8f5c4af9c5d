"""FLOW in the host's trainer: the base model's loss of every sample, and the weight it gives."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from daa_ext.anchor_trainer import data_fingerprint
from daa_ext.artifact import check_writable
from daa_ext.flow_cache import FILE, differences, read_losses, write_losses
from daa_ext.retention import untouched_rng
from daa_ext.reweight import flow_weights, median, sequence_means, token_losses
from daa_ext.reweight_trainer import ReweightTrainerMixin
from daa_ext.weights import weights_fingerprint

logger = logging.get_logger(__name__)

SAMPLE = "flow_sample"  # column of the training set: a sample's place in it, carried into batches


class FlowTrainerMixin(ReweightTrainerMixin):
    """FLOW: samples that the base model finds easy weigh more."""

    method = "flow"
    train_dataset: Any  # of the host
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = Path(self.daa_run.settings.flow_cache or self.args.output_dir)
        self.ranks.together(self._check_cache)
        count = {"samples of the training set": len(self.train_dataset)}
        self.ranks.refuse_differences(count, "Give every node the same data.")
        self.origin = {
            "weights": weights_fingerprint(list(self.model.named_parameters()), self.ranks),
            "data": data_fingerprint(self.train_dataset) if self._reads_cache() else "",
            "precision": self._precision(),
        }
        self.train_dataset = self.train_dataset.add_column(
            SAMPLE, list(range(len(self.train_dataset)))
        )
        self.data_collator = _CarriesSample(self.data_collator)
        self.add_callback(_Begin(self))

    def begin_flow(self) -> None:
        """The model is where it computes, a checkpoint is loaded, no step has been taken."""
        losses = self._cached_losses()
        if losses is None:
            self._refuse_resume()
            losses = self._base_losses()
            self._check_losses(losses)
            if self._reads_cache():
                write_losses(self.cache, losses, self.origin)
        tau = self.daa_run.settings.flow_tau
        self.tau = median(losses) if tau is None else torch.tensor(float(tau))
        weights = flow_weights(losses, self.tau).nan_to_num(0.0)  # NaN: no label to weight
        self.sample_weights = weights.to(self.args.device)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._samples = inputs.pop(SAMPLE, None)  # evaluation sets have none
        return super().compute_loss(model, inputs, *args, **kwargs)

    def weights(self, losses: Tensor, labelled: Tensor) -> Tensor:
        assert self._samples is not None
        return self.sample_weights[self._samples].unsqueeze(1).to(losses.device)

    def _check_cache(self) -> None:
        if self._reads_cache():
            check_writable(self.cache, "flow_cache")
            read_losses(self.cache)  # damage is told before anything is computed

    def _reads_cache(self) -> bool:
        return self.ranks.rank == 0

    def _cached_losses(self) -> Tensor | None:
        """The losses in the file if they are of this model, data and precision. Collective."""
        own = self.ranks.together(self._read_own if self._reads_cache() else lambda: None)
        if not any(self.ranks.gather(own is not None)):
            return None
        return self.ranks.add_up(torch.zeros(len(self.train_dataset)) if own is None else own)

    def _read_own(self) -> Tensor | None:
        found = read_losses(self.cache)
        if found is None:
            return None
        losses, origin = found
        if other := differences(self.origin, origin):
            logger.warning(
                f"flow_cache={self.cache}: {FILE} was computed for other {' and '.join(other)} "
                "than this run's: it is not used."
            )
            return None
        assert len(losses) == len(self.train_dataset)
        logger.warning(f"Reusing the base model's losses of {len(losses)} samples: {self.cache}.")
        return losses

    def _refuse_resume(self) -> None:
        if self.state.global_step > 0:
            raise ValueError(
                f"flow_cache={self.cache}: no {FILE} of this base model, data and precision, and "
                "the weights are a checkpoint's now: the base losses cannot be computed. Put back "
                "the file that the run wrote, or start anew with overwrite_output_dir: true."
            )

    def _base_losses(self) -> Tensor:
        """Mean token loss of each sample (fp32, CPU) under the weights as they are; NaN where
        there is no label, infinite where it is not a number. Collective: each rank does as many
        forward passes as the others."""
        total = len(self.train_dataset)
        share = -(-total // self.ranks.size)
        own = [i % total for i in range(self.ranks.rank * share, (self.ranks.rank + 1) * share)]
        loader = DataLoader(
            Subset(self.train_dataset, own),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        silent = self.args.disable_tqdm or not self.is_world_process_zero()
        with untouched_rng(), torch.no_grad():
            self.model_wrapped.eval()
            bar = tqdm(loader, desc="FLOW: losses of the base model", disable=silent)
            part = torch.cat([self._losses_of(batch) for batch in bar])
        everyones = part.new_empty(self.ranks.size * share)
        self.ranks.gather_into(everyones, part)
        return everyones[:total].cpu()

    def _losses_of(self, batch: Any) -> Tensor:
        inputs = self._prepare_inputs(batch)
        del inputs[SAMPLE]
        labels = inputs.pop("labels")
        with self.compute_loss_context_manager():
            logits = self.model_wrapped(**inputs)["logits"]
        losses, labelled = token_losses(logits, labels)
        means = sequence_means(losses, labelled).nan_to_num(nan=torch.inf)
        return means.where(labelled.any(dim=1), torch.nan).to(self.args.device)

    def _check_losses(self, losses: Tensor) -> None:
        broken = losses.isinf().nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"use_flow_loss=true: the base model's loss is NaN or infinite on {len(broken)} "
                f"of {len(losses)} samples, such as number {broken[0]}. Look for NaN in the base "
                "model, remove broken samples, or set bf16: true instead of fp16."
            )
        if losses.isnan().all():
            raise ValueError(
                "use_flow_loss=true: no sample of the training set has labels. Check its answers."
            )

    def _precision(self) -> str:
        """What beside the weights decides how the base model computes."""
        config = self.model.config.to_dict()
        described = {
            "config": {k: v for k, v in config.items() if k not in _NOT_COMPUTED},
            "attention": self.model.config._attn_implementation,
            "dtypes": sorted({str(parameter.dtype) for parameter in self.model.parameters()}),
            "autocast": [self.args.bf16, self.args.fp16],
        }
        words = json.dumps(described, sort_keys=True, default=str)
        return hashlib.sha256(words.encode()).hexdigest()


_NOT_COMPUTED = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype")


@dataclass
class _CarriesSample:
    """A collator that hands the column SAMPLE on, which the host's knows nothing of."""

    collate: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        samples = [feature.pop(SAMPLE) for feature in features if SAMPLE in feature]
        batch = self.collate(features)
        if samples:
            batch[SAMPLE] = torch.tensor(samples)
        return batch


class _Begin(TrainerCallback):
    """Tells the trainer that everything is in place."""

    def __init__(self, trainer: FlowTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_flow()
