"""Stage 2 in the host's trainer: the anchor on its optimizer, the card, the report, the curves."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging

from daa_ext import artifact
from daa_ext.anchored import AnchoredOptimizer, AnnealRule, StepRecord, pair
from daa_ext.fingerprint import model_fingerprint
from daa_ext.manifest import verify_model
from daa_ext.report import plot_curves, write_report, write_steps
from daa_ext.retention import RetentionCard, Scores, count_changed, snapshot, untouched_rng
from daa_ext.schedule import is_capped, total_pull
from daa_ext.trainer import DaaTrainerMixin, read_checkpoint_state

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


class AnnealTrainerMixin(DaaTrainerMixin):
    """Fine-tunes all weights on the domain with the anchor in every gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.daa_run.settings
        self.folder = Path(settings.daa_anchor)
        if self.args.optim not in SERVED_OPTIMIZERS:
            raise ValueError(
                f"optim={getattr(self.args.optim, 'value', self.args.optim)} cannot go with "
                f"finetuning_type=daa: eq. 9 needs AdamW. One of {', '.join(SERVED_OPTIMIZERS)}."
            )
        artifact.check_writable(Path(self.args.output_dir), "output_dir")
        self.manifest = artifact.read_manifest(self.folder)
        artifact.verify_files(self.folder, self.manifest)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.trainable()}
        base = model_fingerprint(self.trainable())
        verify_model(self.folder, self.manifest, shapes, base)
        self.records: list[StepRecord] = []
        self.resumed_total_steps: int | None = None
        self.card: RetentionCard | None = None
        if settings.daa_retention_dataset is not None:
            if self.args.predict_with_generate:
                raise ValueError(
                    "daa_retention_dataset needs losses, predict_with_generate=true drops them: "
                    "predict in a run of its own (do_train: false)."
                )
            self.card = RetentionCard()
            self.measured = {
                **_named("domain", self.eval_dataset),
                **_named("general", self._general_sets(settings.daa_retention_dataset)),
            }
            self.before = snapshot(self.trainable())  # of the base, not of a checkpoint

    def resume(self, checkpoint: str) -> None:
        state = read_checkpoint_state(checkpoint, self._settings_of_the_method())
        self.records = [StepRecord(**record) for record in state["records"]]
        self.daa_guard.skipped = state["skipped"]
        self.resumed_total_steps = state["total_steps"]
        if self.card is not None:
            self.card.rows = state["card"]

    def begin(self) -> None:
        total = self.state.max_steps
        if self.resumed_total_steps not in (None, total):
            raise ValueError(
                f"The run would have {total} steps now, but the checkpoint is of a run of "
                f"{self.resumed_total_steps}: the schedules depend on it. Resume with the "
                "same data, batch size and epochs."
            )
        settings = self.daa_run.settings
        rule = AnnealRule(
            total_steps=total,
            k0=settings.daa_k0,
            c0=settings.daa_c0,
            gga=settings.daa_gga,
            dc=settings.daa_dc,
            max_norm=self.args.max_grad_norm or 0.0,
        )
        terms = artifact.read_terms(self.folder, self.manifest, self.args.device)
        pieces = pair(self.trainable(), terms)
        self.anchored = AnchoredOptimizer(self.inner_optimizer(), pieces, rule)
        self._warn_of_schedule(total)
        if self.card is not None and not self.card.rows:
            self._measure(list(self.measured))

    def before_step(self, grad_norm: float) -> None:
        self.anchored.arm(self.state.global_step, grad_norm)

    def step_skipped(self) -> None:
        self.anchored.skip()

    def after_step(self) -> None:
        last = self.anchored.last
        if last is not None and last.step == self.state.global_step:
            self.records.append(last)

    def checkpoint_state(self) -> dict[str, Any]:
        return {
            "records": [asdict(record) for record in self.records],
            "skipped": self.daa_guard.skipped,
            "card": self.card.rows if self.card is not None else None,
            **self._settings_of_the_method(),
        }

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.records:
            last = self.records[-1]
            logs |= {
                "daa/similarity": last.similarity,
                "daa/correction": last.correction,
                "daa/gamma": last.gamma,
                "daa/effective_lr": last.effective_lr,
                "daa/domain_grad_norm": last.domain_grad_norm,
            }
        super().log(logs, *args, **kwargs)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        ours = self.card is not None and eval_dataset is None and metric_key_prefix == "eval"
        if ours and self.is_in_train:  # afterwards the card is complete
            known = {name: _scores(metrics, _host_prefix(name)) for name in self.measured}
            self._measure([name for name, found in known.items() if not found], known)
        return metrics

    def _measure(self, names: list[str], known: Mapping[str, Scores] | None = None) -> None:
        """Measure the sets `names`, add what the host has measured already, keep both."""
        assert self.card is not None
        scores = dict(known or {})
        with untouched_rng():
            for name in names:
                loader = self.get_eval_dataloader(self.measured[name])
                output = self.evaluation_loop(
                    loader,
                    description=f"Retention: {name}",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    metric_key_prefix=_host_prefix(name),
                )
                scores[name] = _scores(output.metrics or {}, _host_prefix(name))
                self.log({f"{_host_prefix(name)}_{key}": v for key, v in scores[name].items()})
        self.card.record(self.state.global_step, scores)

    def end(self) -> None:
        """The card's last row, the files, the table on the terminal."""
        if self.anchored.anchored_elements == 0:
            raise ValueError(
                "DAA did not act: no optimizer step was taken. Check the data and max_steps, and, "
                "when resuming, that the checkpoint is not of a finished run (a finished run in "
                "output_dir is resumed unless overwrite_output_dir: true)."
            )
        if self.card is not None:
            if self.card.rows[-1]["step"] != self.state.global_step:
                self._measure(list(self.measured))
            elif self.args.load_best_model_at_end:  # the weights are another step's now
                self.card.rows.pop()
                self._measure(list(self.measured))
            self.card.weights = count_changed(self.before, self.trainable())
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
        count = len(self.records)
        return {
            "stage": "anneal",
            "daa_anchor": str(self.folder),
            "anchor_digest": self.manifest.digest,
            "total_steps": rule.total_steps,
            "k0": rule.k0 / rule.total_steps,
            "c0": rule.c0,
            "gga": rule.gga,
            "dc": rule.dc,
            "total_pull": total_pull(rule.total_steps, rule.k0) if rule.gga else 0.0,
            "anchored_params": self.anchored.anchored_elements,
            "anchor_bytes_total": self.anchored.nbytes,  # DDP: every rank holds all of it
            "anchor_bytes_per_rank": gather_object([self.anchored.nbytes]),
            "anchor_norm": self.anchored.anchor_norm,
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

    def _settings_of_the_method(self) -> dict[str, Any]:
        settings = self.daa_run.settings
        names = ("daa_k0", "daa_c0", "daa_gga", "daa_dc", "daa_retention_dataset")
        return {
            "stage": "anneal",
            "anchor": self.manifest.digest,
            **{name: getattr(settings, name) for name in names},
        }

    def _general_sets(self, names: str) -> Any:
        sets = self.daa_run.load_eval(names, self.processing_class)
        return sets if len(sets) > 1 else next(iter(sets.values()))


def _named(kind: str, sets: Any) -> dict[str, Any]:
    """{kind: set}, or {kind_name: set} where there are several; {} for None."""
    if isinstance(sets, dict):
        return {f"{kind}_{name}": data for name, data in sets.items()}
    return {} if sets is None else {kind: sets}


def _host_prefix(name: str) -> str:
    """The prefix under which the host's own evaluation reports a domain set."""
    return "eval" + name.removeprefix("domain") if name.startswith("domain") else f"eval_{name}"


def _scores(metrics: Mapping[str, float], prefix: str) -> Scores:
    found = {key: metrics.get(f"{prefix}_{key}") for key in ("loss", "accuracy")}
    return {key: value for key, value in found.items() if value is not None}
