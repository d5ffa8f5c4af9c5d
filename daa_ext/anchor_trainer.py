"""Stage 1 in the host's trainer: a moment for an optimizer, an anchor for a model."""

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from daa_ext.artifact import check_writable, is_anchor, write_anchor
from daa_ext.estimator import Estimates, MomentEstimator
from daa_ext.factorize import Entries, factorize, files
from daa_ext.layout import squared_norm
from daa_ext.manifest import Manifest, anchor_bytes
from daa_ext.noise import gradient_noise
from daa_ext.report import versions, write_report
from daa_ext.trainer import DaaTrainerMixin

logger = logging.get_logger(__name__)


class AnchorTrainerMixin(DaaTrainerMixin):
    """Reads the general data with learning rate 0 and writes the folder `daa_anchor`."""

    daa_stage = "anchor"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.daa_run.settings
        self.folder = Path(settings.daa_anchor)
        self.seen = {"samples": 0, "tokens": 0}  # by this rank, since the run or its resume began
        self.seen_before = dict(self.seen)  # by all ranks, until the checkpoint
        self.norms: list[float] = []  # of each step's gradient
        if self.args.load_best_model_at_end or self.args.push_to_hub:
            raise ValueError(
                "daa_stage=anchor writes no model: load_best_model_at_end and push_to_hub have "
                "no effect. Remove them."
            )
        self.ranks.together(self._check_folders)
        if self.args.num_train_epochs > 1 and self.args.max_steps < 0:
            logger.warning(
                f"num_train_epochs={self.args.num_train_epochs}: the weights do not move, so "
                "another epoch sees the same gradients again. num_train_epochs: 1 is enough."
            )
        self.base_fingerprint = self.base_model_fingerprint()

    def _check_folders(self) -> None:
        if is_anchor(self.folder) and not getattr(self.args, "overwrite_output_dir", False):
            raise ValueError(
                f"daa_anchor={self.folder} holds an anchor already. Use it (daa_stage: anneal), "
                "name another folder, or set overwrite_output_dir: true to replace it."
            )
        if self.folder.exists() and not is_anchor(self.folder) and any(self.folder.iterdir()):
            raise ValueError(
                f"daa_anchor={self.folder} is a folder with other files: name another."
            )
        if self.is_world_process_zero():
            check_writable(self.folder, "daa_anchor")
            check_writable(Path(self.args.output_dir), "output_dir")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            parameters = [parameter for _, parameter in self.trainable()]
            self.optimizer = MomentEstimator(parameters, self.daa_run.settings.daa_anchor_beta)
        return self.optimizer

    def clip_threshold(self, asked: float) -> float:
        return float("inf")  # the anchor is the mean of the gradients as they are

    def resume(self, checkpoint: str) -> None:
        super().resume(checkpoint)
        self.seen_before = self.resumed["seen"]
        self.norms = self.resumed["norms"]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen["samples"] += len(inputs["labels"])
        self.seen["tokens"] += int((inputs["labels"] != -100).sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def sums(self, device: torch.device) -> Tensor:
        norm = squared_norm((gradient for _, gradient in self.layout.raw()), device)
        return torch.stack([norm, torch.zeros_like(norm)])

    def begin(self) -> None:
        super().begin()
        self.estimating_since = time.perf_counter()
        if self.state.global_step > 0 and self._estimator().good_steps == 0:
            raise ValueError(
                f"resume_from_checkpoint={self.args.resume_from_checkpoint} holds no moment: its "
                "steps are lost (save_only_model: true leaves it out). Start anew with "
                "overwrite_output_dir: true."
            )

    def checkpoint_state(self) -> dict[str, Any]:
        return {"seen": self._total_seen(), "norms": self.norms}

    def before_step(self, norm: float) -> None:
        self.norms.append(norm)

    def before_engine_step(self, norm: float, inner: float, factor: Callable[[], float]) -> None:
        self.norms.append(norm)

    def fixed_to_resume(self) -> dict[str, Any]:
        return {
            "daa_anchor_beta": self.daa_run.settings.daa_anchor_beta,
            "datasets": self.daa_run.datasets,
            "base_fingerprint": self.base_fingerprint,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the anchor; what the host saves of a model at a checkpoint is left out."""
        if _internal_call:
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
            return
        seconds = {"estimate": time.perf_counter() - self.estimating_since}
        seen = self._total_seen()
        estimates = Estimates(self._estimator(), self.layout.buffers())
        manifest = self._write(estimates, seconds, seen)
        report = {**self.common_report(), "gradient": self._gradient(estimates, seen["samples"])}
        if self.is_world_process_zero():
            self._report(manifest, report)
        self.ranks.barrier()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The weights are the base model's, before and after: a checkpoint holds none."""

    def _gradient(self, estimates: Estimates, samples: int) -> dict[str, float | None]:
        """Norms and noise of the gradient, before compression. Collective."""
        own = (estimates(fragment) for fragment in self.layout.fragments_of(self.ranks.rank))
        squared = squared_norm(own, self.ranks.device)
        total = self.ranks.add_up(squared) if self.layout.sharded else squared
        mean_norm = float(total) ** 0.5
        beta = self.daa_run.settings.daa_anchor_beta
        noise = gradient_noise(self.norms, mean_norm, beta, samples / max(1, len(self.norms)))
        return {
            "batch_norm": noise.batch_norm if noise else None,
            "mean_norm": mean_norm,
            "noise_trace": noise.trace if noise else None,
            "noise_scale": noise.scale if noise else None,
        }

    def _write(
        self, estimates: Estimates, seconds: dict[str, float], seen: Mapping[str, int]
    ) -> Manifest:
        """Factorize and write the anchor; its manifest. Collective."""
        started = time.perf_counter()
        settings = self.daa_run.settings
        everyone = range(self.ranks.size if self.layout.sharded else 1)
        held = [self.layout.fragments_of(rank) for rank in everyone]
        terms, entries = factorize(held, estimates, self.ranks, settings.daa_rank, self.args.seed)
        seconds["factorize"] = time.perf_counter() - started
        manifest = self._manifest(entries, estimates.steps, seconds, seen)
        written = files(terms, manifest, self.ranks)
        if self.is_world_process_zero():
            write_anchor(self.folder, written, manifest)
        else:
            for _ in written:
                pass  # its tensors went to rank 0
        return manifest

    def _manifest(
        self, entries: Entries, steps: int, seconds: dict[str, float], seen: Mapping[str, int]
    ) -> Manifest:
        settings = self.daa_run.settings
        norm = sum(entry["norm"] ** 2 for entry in entries.values()) ** 0.5
        if norm == 0.0:
            raise ValueError(
                f"The mean gradient of {self.daa_run.datasets} is zero: nothing to anchor to. "
                "Check that its samples have answers (labels)."
            )
        return Manifest(
            base_model=self.daa_run.base_model,
            base_fingerprint=self.base_fingerprint,
            datasets=self.daa_run.datasets,
            # Read once, where it will be written.
            data_fingerprint=data_fingerprint(self.train_dataset)
            if self.is_world_process_zero()
            else "",
            template=self.daa_run.template,
            cutoff_len=self.daa_run.cutoff_len,
            host_stage=self.daa_run.host_stage,
            steps=steps,
            skipped_steps=len(self.daa_guard.skipped),
            samples=seen["samples"],
            tokens=seen["tokens"],
            beta=settings.daa_anchor_beta,
            rank=settings.daa_rank,
            seed=self.args.seed,
            norm=norm,
            seconds=seconds,
            versions=versions(),
            tensors=entries,
        )

    def _report(self, manifest: Manifest, common: dict[str, Any]) -> None:
        write_report(
            Path(self.args.output_dir),
            {
                "stage": "anchor",
                "daa_anchor": str(self.folder),
                "total_steps": self.state.max_steps,
                "k0": None,  # this and the next four: only the annealing has them
                "c0": None,
                "similarity_mean": None,
                "correction_mean": None,
                "domain_only": None,
                "anchored_params": common["trainable_params"],
                "anchor_bytes_total": anchor_bytes(manifest),
                "anchor_bytes_per_rank": [],  # none is resident once it is written
                "anchor_norm": manifest.norm,
                "samples": manifest.samples,
                "tokens": manifest.tokens,
                "seconds": manifest.seconds,
                **common,
            },
        )
        logger.warning(
            f"Anchor written to {self.folder}: {manifest.steps} steps, {manifest.samples} "
            f"samples, norm {manifest.norm:.4g}, {anchor_bytes(manifest) / 2**20:.1f} MiB."
        )

    def _estimator(self) -> MomentEstimator:
        estimator = self.inner_optimizer()
        assert isinstance(estimator, MomentEstimator)
        return estimator

    def _total_seen(self) -> dict[str, int]:
        total = self.ranks.add_up(torch.tensor(list(self.seen.values()))).tolist()
        return {key: self.seen_before[key] + n for key, n in zip(self.seen, total, strict=True)}


def data_fingerprint(dataset: Any) -> str:
    """SHA-256 of the tokens and labels that a run reads, in the data set's order.

    A streamed data set cannot be read twice: its fingerprint is "streamed".
    """
    if not hasattr(dataset, "__len__"):
        return "streamed"
    digest = hashlib.sha256()
    for row in dataset:
        for key in ("input_ids", "labels"):
            digest.update(np.asarray(row.get(key, ()), dtype=np.int64).tobytes() + key.encode())
    return digest.hexdigest()
