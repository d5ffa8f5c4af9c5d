"""Scores by lm-evaluation-harness: any task that it has, and those of daa_ext/tasks.

The harness is optional (daa_ext[eval]); nothing of it is imported before a set asks for it.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

TASKS = Path(__file__).parent.parent / "tasks"
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Evaluation(NamedTuple):
    """What a task gave: metrics (the primary one first), one item per sample, their number."""

    metrics: dict[str, float]
    items: list[dict[str, Any]]
    n: int


def check(name: str, task: str, dataset_path: str | None, metric: str | None) -> None:
    """Refuse a set that the harness cannot score, without reading any data.

    Raises:
        ValueError: the harness is not installed, it has no such task, the task has no such metric,
            or the file of dataset_path does not exist or cannot take the place of the task's data.
    """
    here = f"score set {name!r}"
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"{here}: kind=harness needs lm-evaluation-harness: pip install 'daa_ext[eval]'."
        )
    index = _manager().task_index
    if task not in index:
        near = get_close_matches(task, index, n=3)
        mend = f"near it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
        raise ValueError(f"{here}: task={task!r} is not a task of lm-evaluation-harness; {mend}.")
    settings = index[task].cfg or {}
    named = [each["metric"] for each in settings.get("metric_list") or ()]
    texts = [each for each in named if isinstance(each, str)]
    if metric is not None and texts and metric.partition(",")[0] not in texts:
        raise ValueError(
            f"{here}: metric={metric!r} is not one of task {task}: one of {', '.join(texts)}."
        )
    if dataset_path is not None:
        _check_data(f"{here}: dataset_path={dataset_path}", Path(dataset_path), settings)


def evaluate(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    metric: str | None = None,
    dataset_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Run one task or group on a loaded model.

    Args:
        metric: the primary one; None: the first that the task names.
        dataset_path: hub name, folder or file of the same columns instead of the task's data.
        limit: samples of each task; None: all.

    Raises:
        ValueError: the task or group gives no such metric.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    broken = not all(weight.isfinite().all() for weight in model.parameters())
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[_spec(task, dataset_path)],
        num_fewshot=num_fewshot,
        limit=1 if broken else limit,  # only the names of the metrics are of use then
        bootstrap_iters=0,
        task_manager=_manager(),
    )
    metrics = dict(_metrics(found["results"].get(task, {})))
    metrics = _primary_first(task, metrics, metric or _named_first(found["configs"]))
    samples = [sample for task in sorted(found["samples"]) for sample in found["samples"][task]]
    if broken or not all(map(_is_finite, samples)):
        metrics = dict.fromkeys(metrics, math.nan)
    items = list(_items(samples, next(iter(metrics))))
    return Evaluation(metrics, items, sum(n["effective"] for n in found["n-samples"].values()))


@lru_cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS))


def _check_data(words: str, path: Path, settings: Mapping[str, Any]) -> None:
    if path.suffix not in READERS:
        return  # a folder or a hub name: read by the datasets library
    if not path.is_file():
        raise ValueError(f"{words} does not exist.")
    splits = _splits(settings)
    if len(splits) != 1:
        needs = f"the task reads {', '.join(splits)}" if splits else "it is a group of tasks"
        raise ValueError(
            f"{words}: one file cannot replace the data, {needs}. Give a folder with one file for "
            "each split (test.jsonl, train.jsonl, ...), for one task."
        )


def _splits(settings: Mapping[str, Any]) -> list[str]:
    """The splits that a task reads: to be scored on, and for examples in its prompt."""
    kinds = ("test", "validation", "training", "fewshot")
    named = [settings.get(f"{kind}_split") for kind in kinds]
    return sorted({split for split in named if split})


def _spec(task: str, dataset_path: str | None) -> str | dict[str, Any]:
    """What the harness is asked to load: the name, or a group of one with the data replaced."""
    if dataset_path is None:
        return task
    data: dict[str, Any] = {"dataset_path": dataset_path, "dataset_kwargs": None}
    path = Path(dataset_path)
    if path.suffix in READERS:
        (split,) = _splits(_manager().task_index[task].cfg)
        data["dataset_path"] = READERS[path.suffix]
        data["dataset_kwargs"] = {"data_files": {split: dataset_path}}
    if path.exists():
        data["dataset_name"] = None
    return {"group": f"{task} on {dataset_path}", "task": [{"task": task, **data}]}


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Values by name; a filter is part of the name unless it is none (`exact_match,strict`)."""
    for key, value in results.items():
        name, comma, selected = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            yield (name if selected == "none" else key), float(value)


def _named_first(configs: Mapping[str, Any]) -> str:
    """The first metric that the task, or a group's first task, names."""
    settings = next(iter(configs.values()))
    return settings["metric_list"][0]["metric"]


def _primary_first(task: str, metrics: dict[str, float], metric: str) -> dict[str, float]:
    """The metrics, first the primary one; without its filter it is the first of that name."""
    for name, value in metrics.items():
        if metric in (name, name.partition(",")[0]):
            return {metric: value, **metrics}
    raise ValueError(
        f"task={task}: it gives no metric {metric!r}; found: {', '.join(metrics) or 'none'}. "
        + ("Name another." if metrics else "Name a task of the group instead.")
    )


def _is_finite(sample: Mapping[str, Any]) -> bool:
    """Whether all log-likelihoods of a sample are finite; generated text has none."""
    answers = [answer for answer in sample["filtered_resps"] if isinstance(answer, tuple | list)]
    numbers = (number for answer in answers for number in answer if isinstance(number, float))
    return all(map(math.isfinite, numbers))


def _items(samples: list[dict[str, Any]], metric: str) -> Iterator[dict[str, Any]]:
    """One item per sample for which the metric tells right from wrong, in the task's order."""
    name, _, selected = metric.partition(",")
    for sample in samples:
        value = sample.get(name)
        if name == "f1" and isinstance(value, tuple | list) and len(value) == 2:
            value = bool(value[0] == value[1])
        first = selected or samples[0]["filter"]
        if isinstance(value, bool | int | float) and sample["filter"] == first:
            yield {"correct": float(value)}
