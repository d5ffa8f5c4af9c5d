"""The retention card in the host's trainer: what is measured, and when."""

from collections.abc import Mapping
from typing import Any

from daa_ext.retention import RetentionCard, Scores, count_changed, snapshot, untouched_rng
from daa_ext.trainer import DaaTrainerMixin


class CardTrainerMixin(DaaTrainerMixin):
    """Keeps a RetentionCard where the YAML names general sets to measure."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.daa_run.settings
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
            self.before = snapshot(self.own_weights())  # of the base, not of a checkpoint

    def resume(self, checkpoint: str) -> None:
        super().resume(checkpoint)
        if self.card is not None:
            self.card.rows = self.resumed["card"]

    def checkpoint_state(self) -> dict[str, Any]:
        return {"card": self.card.rows if self.card is not None else None}

    def begin_card(self) -> None:
        """Measure the base model, unless a resumed run has done so."""
        if self.card is not None and not self.card.rows:
            self._measure(list(self.measured))

    def complete_card(self) -> None:
        """Measure the final model and count the weights that moved. Collective."""
        if self.card is None:
            return
        if self.card.rows[-1]["step"] != self.state.global_step:
            self._measure(list(self.measured))
        elif self.args.load_best_model_at_end:  # the weights are another step's now
            self.card.rows.pop()
            self._measure(list(self.measured))
        counts = count_changed(self.before, self.own_weights())
        self.card.weights = {
            key: sum(others[key] for others in self.ranks.gather(counts)) for key in counts
        }

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
