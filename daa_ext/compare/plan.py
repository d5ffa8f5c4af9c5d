"""From an experiment to its runs: every YAML, every scoring job, before anything starts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from daa_ext.compare.data import DataFolder, write_thinned
from daa_ext.compare.experiment import Experiment
from daa_ext.compare.methods import KINDS
from daa_ext.compare.runs import BASE, BASE_AGAIN, Row, Run, rows_of, slug

DEFAULTS = {
    "stage": "sft", "do_train": True, "lr_scheduler_type": "linear", "adam_beta2": 0.95,
    "logging_steps": 5, "save_strategy": "no", "report_to": "none", "plot_loss": False,
    "overwrite_output_dir": True,
}  # fmt: skip


class Planner:
    """The runs of an experiment under `root`.

    Raises:
        ValueError: data that is missing, or two rows that would write to one folder.
    """

    def __init__(self, experiment: Experiment, root: Path) -> None:
        self.experiment = experiment
        self.root = root
        self.data = DataFolder(experiment.dataset_dir)
        self.rows = [row for name in experiment.methods for row in rows_of(experiment, name)]
        taken: dict[str, str] = {}
        for row in self.rows:
            if (other := taken.setdefault(slug(row.name), row.name)) != row.name:
                raise ValueError(
                    f"methods {other} and {row.name} would both write to the folder "
                    f"{slug(row.name)}: rename one."
                )
        self._shares: dict[tuple[str, float], str] = {}
        for name, domain in experiment.domains.items():
            count = self.data.rows(domain.dataset, domain.max_samples, f"domains.{name}")
            self.data.add(name, domain.dataset, count if domain.max_samples else None)
            for share in sorted({row.method.general_share or 0.0 for row in self.rows} - {0.0}):
                replayed = max(1, round(share * count))
                self._shares[name, share] = f"{name}_general_{replayed}"
                general = experiment.anchor.dataset
                self.data.add(self._shares[name, share], general, replayed)
        for name, dataset, _ in self._noise_sources():
            assert experiment.noise is not None
            count = self.data.rows(dataset, experiment.noise.max_samples, f"noise of {name}")
            self.data.add(f"noise_{name}", dataset, count)
        for samples in self._anchor_sizes():
            anchor = experiment.anchor
            count = self.data.rows(anchor.dataset, samples, "anchor")
            self.data.add(_anchor_name(samples), anchor.dataset, count if samples else None)

    def _noise_sources(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """(name, the user's data set, YAML keys) of all that the noise scale is measured on."""
        if self.experiment.noise is None:
            return
        yield "general", self.experiment.anchor.dataset, self.experiment.anchor.train
        for name, domain in self.experiment.domains.items():
            yield name, domain.dataset, domain.train

    def write_data(self) -> None:
        """Write dataset_info.json and the thinned sets of the curves."""
        for name, path, count in self._curve_sets():
            target = self.root / "data" / f"{name}.jsonl"
            write_thinned(path, count, target)
            self.data.add_file(name, target)
        self.data.write(self.root / "data")

    def datasets(self) -> list[str]:
        """The user's data sets that are trained on."""
        domains = (domain.dataset for domain in self.experiment.domains.values())
        return [self.experiment.anchor.dataset, *domains]

    def first(self) -> Iterator[Run]:
        """The base model twice, the anchors, the noise passes."""
        for order, name in enumerate((BASE, BASE_AGAIN)):
            yield Run(name, "base", seed=order, sets=tuple(self.experiment.all_sets()))
        for samples in self._anchor_sizes():
            name = _anchor_name(samples)
            yield self._anchor_pass(f"anchors/{name}", "anchor", name, self.experiment.anchor.train)
        for name, _, keys in self._noise_sources():
            run = self._anchor_pass(f"noise/{name}", "noise", f"noise_{name}", keys)
            yield replace(run, row=name)

    def grid(self) -> Iterator[Run]:
        """Every point of every method at its grid's seeds, sources before what is made of them."""
        for seed in self.experiment.seeds:
            for domain in self.experiment.domains:
                for row in self.rows:
                    if seed in self.experiment.grid_seeds(row.method):
                        yield from self.points(row, domain, seed)

    def points(
        self, row: Row, domain: str, seed: int, only: tuple[float, ...] | None = None
    ) -> Iterator[Run]:
        """The runs of one row, domain and seed; `only` at these learning rates."""
        if row.method.domains is not None and domain not in row.method.domains:
            return
        if row.method.of is None:
            for rate in row.method.learning_rate:
                if only is None or rate in only:
                    yield self._training(row, domain, seed, rate)
            return
        for source in self.rows:
            if source.method is not self.experiment.methods[row.method.of]:
                continue
            if seed not in self.experiment.seeds_of(source.method):
                continue
            for origin in self.points(source, domain, seed, only):
                if row.method.kind == "control":
                    yield self._control(row, origin)
                else:
                    yield from self._wise(row, origin)

    def with_rate(self, run: Run, rate: float) -> Run:
        """A control, now that the rate of its DAA run is known."""
        return replace(run, yaml={**run.yaml, "learning_rate": rate})

    def out(self, run: Run) -> Path:
        return self.root / "runs" / run.id

    def _anchor_sizes(self) -> list[int | None]:
        if not any(KINDS[row.method.kind].anchored for row in self.rows):
            return []
        own = self.experiment.anchor.max_samples
        return list(dict.fromkeys([own, *(row.anchor_samples or own for row in self.rows)]))

    def _common(self, run_id: str, seed: int, *extra: Mapping[str, Any]) -> dict[str, Any]:
        merged: dict[str, Any] = {
            "model_name_or_path": self.experiment.base_model,
            "template": self.experiment.template,
            "dataset_dir": str(self.root / "data"),
            **DEFAULTS,
            **self.experiment.train,
        }
        for keys in extra:
            merged |= keys
        return {**merged, "output_dir": str(self.root / "runs" / run_id / "out"), "seed": seed}

    def _anchor_pass(self, run_id: str, task: str, name: str, keys: Mapping[str, Any]) -> Run:
        pass_keys = {
            "finetuning_type": "daa",
            "daa_stage": "anchor",
            "daa_anchor": str(self.root / "anchors" / name if task == "anchor" else
                              self.root / "runs" / run_id / "anchor"),
            "dataset": name,
            "num_train_epochs": 1.0,
        }  # fmt: skip
        if task == "noise":
            pass_keys["daa_rank"] = 1  # its anchor is never used
        yaml = self._common(run_id, self.experiment.seeds[0], keys, pass_keys)
        return Run(run_id, task, seed=self.experiment.seeds[0], yaml=yaml)

    def _training(self, row: Row, domain: str, seed: int, rate: float) -> Run:
        run_id = f"{domain}/{slug(row.name)}/lr-{rate:g}_seed-{seed}"
        datasets = [domain]
        keys: dict[str, Any] = {**KINDS[row.method.kind].keys, **row.keys, "learning_rate": rate}
        if row.method.general_share is not None:
            datasets.append(self._shares[domain, row.method.general_share])
            keys["mix_strategy"] = "concat"
        anchor = None
        if KINDS[row.method.kind].anchored:
            name = _anchor_name(row.anchor_samples or self.experiment.anchor.max_samples)
            anchor = f"anchors/{name}"
            keys["daa_anchor"] = str(self.root / anchor)
        if self.experiment.curves is not None and KINDS[row.method.kind].evaluates:
            keys |= {
                "eval_dataset": ",".join(name for name, _, _ in self._curve_sets()),
                "eval_on_each_dataset": True,
                "eval_strategy": "steps",
                "eval_steps": self.experiment.curves.steps,
                "eval_on_start": True,
            }
        yaml = self._common(
            run_id, seed, self.experiment.domains[domain].train, keys,
            {"dataset": ",".join(datasets)},
        )  # fmt: skip
        sets = tuple(self.experiment.sets(domain))
        return Run(
            run_id, "train", domain, row.name, seed, rate, yaml=yaml, sets=sets, anchor=anchor
        )

    def _control(self, row: Row, origin: Run) -> Run:
        assert origin.rate is not None
        run_id = f"{origin.domain}/{slug(row.name)}/of-{slug(str(origin.row))}"
        run_id += f"_lr-{origin.rate:g}_seed-{origin.seed}"
        drop = {key for key in origin.yaml if key.startswith("daa_")}
        drop |= {"learning_rate", "use_talr_loss", "talr_tau", "talr_w_min"}
        kept = {key: value for key, value in origin.yaml.items() if key not in drop}
        keys = {**KINDS["control"].keys, **row.keys}
        yaml = {**kept, **keys, "output_dir": str(self.root / "runs" / run_id / "out")}
        return replace(origin, id=run_id, row=row.name, origin=origin, yaml=yaml, anchor=None)

    def _wise(self, row: Row, origin: Run) -> Iterator[Run]:
        for alpha in row.method.alpha:
            run_id = f"{origin.domain}/{slug(row.name)}/of-{slug(str(origin.row))}"
            run_id += f"_lr-{origin.rate:g}_seed-{origin.seed}_alpha-{alpha:g}"
            yield replace(
                origin, id=run_id, task="wise", row=row.name, alpha=alpha, origin=origin, yaml={}
            )

    def _curve_sets(self) -> Iterator[tuple[str, Path, int | None]]:
        if self.experiment.curves is None:
            return
        known = {each.name: each for each in self.experiment.all_sets()}
        for name in self.experiment.curves.sets:
            yield (
                f"curve_{slug(name)}",
                self.data.source / str(known[name].path),
                known[name].max_samples,
            )


def _anchor_name(samples: int | None) -> str:
    return f"general_{samples or 'all'}"
