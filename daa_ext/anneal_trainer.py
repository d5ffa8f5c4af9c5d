"""Stage 2 in the host's trainer: the anchor on its optimizer, the card, the report, the curves."""

import os
from collections.abc import Callable
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from daa_ext import artifact
from daa_ext.anchored import AnchoredOptimizer, AnnealRule, Leash, Measured, StepRecord
from daa_ext.card_trainer import CardTrainerMixin
from daa_ext.manifest import Manifest, anchor_bytes, verify_model
from daa_ext.report import plot_curves, write_report, write_steps
from daa_ext.resident import load
from daa_ext.schedule import is_capped, total_pull
from daa_ext.start_trainer import StartTrainerMixin
from daa_ext.zero import is_offloaded

logger = logging.get_logger(__name__)

# Adam with decoupled decay whose kernels read lr, eps and weight_decay from the group each step.
SERVED_OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
)


class AnnealTrainerMixin(CardTrainerMixin, StartTrainerMixin):
    """Fine-tunes all weights on the domain with the anchor in every gradient."""

    daa_stage = "anneal"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.daa_run.settings
        self.folder = Path(settings.daa_anchor)
        if self.args.optim not in SERVED_OPTIMIZERS:
            raise ValueError(
                f"optim={getattr(self.args.optim, 'value', self.args.optim)} cannot go with "
                f"finetuning_type=daa: eq. 9 needs AdamW. One of {', '.join(SERVED_OPTIMIZERS)}."
            )
        self.manifest = self.ranks.together(self._read_and_verify)
        mend = "Copy one anchor to all nodes, or use a shared file system."
        self.ranks.refuse_differences({"the anchor's digest": self.manifest.digest}, mend)
        fingerprint = self.base_model_fingerprint()
        verify_model(self.folder, self.manifest, self.trainable_shapes(), fingerprint)
        self.records: list[StepRecord] = []

    def keeps_start(self) -> bool:
        return self.daa_run.settings.daa_radius is not None

    def _read_and_verify(self) -> Manifest:
        artifact.check_writable(Path(self.args.output_dir), "output_dir")
        manifest = artifact.read_manifest(self.folder)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        part = self.args.local_process_index % ranks_here
        artifact.verify_files(self.folder, manifest, part, ranks_here)
        return manifest

    def resume(self, checkpoint: str) -> None:
        super().resume(checkpoint)
        self.records = [StepRecord(**record) for record in self.resumed["records"]]

    def begin(self) -> None:
        super().begin()
        total = self.state.max_steps
        if self.resumed.get("total_steps", total) != total:
            raise ValueError(
                f"The run would have {total} steps now, but the checkpoint is of a run of "
                f"{self.resumed['total_steps']}: the schedules depend on it. Resume with the "
                "same data, batch size and epochs."
            )
        settings = self.daa_run.settings
        rule = AnnealRule(
            total_steps=total,
            k0=settings.daa_k0,
            c0=settings.daa_c0,
            gga=settings.daa_gga,
            dc=settings.daa_dc,
            max_norm=self.max_norm(),
            boost_max=inf if settings.daa_boost_max is None else settings.daa_boost_max,
        )
        reader = artifact.AnchorReader(self.folder, self.manifest)
        anchor = load(reader, self.layout, self.ranks, self._gradient_device())
        leash = None
        if settings.daa_radius is not None:
            leash = Leash(self.start, settings.daa_radius * self.start_norm())
        optimizer = self.inner_optimizer()
        self.anchored = AnchoredOptimizer(optimizer, self.layout, anchor, rule, leash)
        self.steered = self.anchored
        self._warn_of_schedule(total)
        self.begin_card()

    def sums(self, device: torch.device) -> Tensor:
        return self.anchored.sums(device)

    def before_engine_step(self, norm: float, inner: float, factor: Callable[[], float]) -> None:
        distance = self.distance() if self.keeps_start() else None
        self.anchored.arm(self.state.global_step, Measured(norm, inner, distance), factor)

    def after_step(self) -> None:
        super().after_step()
        last = self.anchored.last
        if last is not None and last.step == self.state.global_step:
            self.records.append(last)

    def checkpoint_state(self) -> dict[str, Any]:
        records = [asdict(record) for record in self.records]
        return {**super().checkpoint_state(), "records": records}

    def settings_to_resume(self) -> dict[str, Any]:
        settings = self.daa_run.settings
        names = (
            "daa_k0", "daa_c0", "daa_boost_max", "daa_radius", "daa_gga", "daa_dc",
            "daa_retention_dataset",
        )  # fmt: skip
        return {
            "anchor": self.manifest.digest,
            **{name: getattr(settings, name) for name in names},
        }

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.records:
            last = self.records[-1]
            distance = {} if last.distance is None else {"daa/distance": last.distance}
            logs |= {
                **distance,
                "daa/similarity": last.similarity,
                "daa/correction": last.correction,
                "daa/gamma": last.gamma,
                "daa/effective_lr": last.effective_lr,
                "daa/domain_grad_norm": last.domain_grad_norm,
            }
        super().log(logs, *args, **kwargs)

    def end(self) -> None:
        """The card's last row, the files, the table on the terminal."""
        super().end()
        self.anchored_params = self.touched_params()
        if self.anchored_params == 0:
            raise ValueError(
                "DAA did not act: no optimizer step was taken. Check the data and max_steps, and, "
                "when resuming, that the checkpoint is not of a finished run (a finished run in "
                "output_dir is resumed unless overwrite_output_dir: true)."
            )
        self.complete_card()
        report = self._report()
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_report(folder, report)
            write_steps(folder, self.records)
            plot_curves(folder, self.records, self.state.log_history)
            if self.card is not None:
                self.card.print()

    def _report(self) -> dict[str, Any]:
        settings, rule = self.daa_run.settings, self.anchored.rule
        anchor, leash = self.anchored.anchor, self.anchored.leash
        count = len(self.records)
        return {
            "stage": "anneal",
            "daa_anchor": str(self.folder),
            "anchor_digest": self.manifest.digest,
            "total_steps": rule.total_steps,
            "k0": rule.k0 / rule.total_steps,
            "c0": rule.c0,
            "boost_max": settings.daa_boost_max,
            "radius": leash.radius if leash is not None else None,
            "distance": self.distance() if leash is not None else None,
            "steps_held": self._steps_held(),
            "gga": rule.gga,
            "dc": rule.dc,
            "total_pull": total_pull(rule.total_steps, rule.k0) if rule.gga else 0.0,
            "anchored_params": self.anchored_params,
            "anchor_bytes_total": anchor_bytes(self.manifest),
            "anchor_bytes_per_rank": self.ranks.gather(anchor.nbytes),
            "anchor_buffer_bytes_per_rank": self.ranks.gather(anchor.buffer_nbytes),
            "anchor_norm": anchor.norm,
            "anchor_seconds": self.manifest.seconds,
            "similarity_mean": sum(record.similarity for record in self.records) / count,
            "correction_mean": sum(record.correction for record in self.records) / count,
            "effective_lr_mean": sum(record.effective_lr for record in self.records) / count,
            "domain_only": not set(self.daa_run.datasets) & set(self.manifest.datasets),
            "datasets": self.daa_run.datasets,
            "retention": self.card.summary() if self.card is not None else None,
            "daa_retention_dataset": settings.daa_retention_dataset,
            **self.common_report(),
        }

    def _steps_held(self) -> int | None:
        """At how many steps the radius drew the weights back; None without one."""
        leash = self.anchored.leash
        if leash is None:
            return None
        gone = (record.distance for record in self.records if record.distance is not None)
        return sum(leash.factor(distance) < 1.0 for distance in gone)

    def _warn_of_schedule(self, total: int) -> None:
        if self.args.lr_scheduler_type != "linear" or self.args.get_warmup_steps(total) > 0:
            logger.warning(
                f"lr_scheduler_type={self.args.lr_scheduler_type.value}, warmup "
                f"{self.args.get_warmup_steps(total)} steps: the paper anneals linearly from the "
                "first step (eq. 10). Set lr_scheduler_type: linear and no warmup."
            )
        k0 = self.daa_run.settings.daa_k0
        if self.daa_run.settings.daa_gga and is_capped(total, k0):
            logger.warning(
                f"daa_k0={k0:g} was made for runs of at least {k0:g} steps; this one has {total}, "
                f"so gamma is held at 1 (no domain gradient at all) at the start. For the paper's "
                f"share over {total} steps set daa_k0 below {total}."
            )

    def _gradient_device(self) -> torch.device:
        """Where the inner optimizer's gradients lie."""
        offloaded = self.is_deepspeed_enabled and is_offloaded(self.deepspeed)
        return torch.device("cpu") if offloaded else self.args.device
