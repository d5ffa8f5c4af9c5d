"""daa_report.json, daa_steps.jsonl and daa_curves.png in the run's output folder."""

import json
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from daa_ext.anchored import StepRecord

HOSTS = ("daa_ext", "llamafactory", "deepspeed", "torch", "transformers", "accelerate")
REPORT, STEPS, CURVES = "daa_report.json", "daa_steps.jsonl", "daa_curves.png"


def versions() -> dict[str, str]:
    """Installed versions of this package, its hosts and Python; "missing" where not installed."""
    found = {"python": platform.python_version()}
    for name in HOSTS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def peak_memory() -> int:
    """Peak bytes of this rank: allocated on the GPU where there is one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_report(folder: Path, content: Mapping[str, Any]) -> None:
    """Write daa_report.json (see docs/configuration.md for its fields)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(content, indent=1) + "\n")


def write_steps(folder: Path, records: Sequence[StepRecord]) -> None:
    """Write one JSON line per optimizer step: the fields that it measured."""
    found = ({k: v for k, v in asdict(record).items() if v is not None} for record in records)
    lines = [json.dumps(fields) + "\n" for fields in found]
    (folder / STEPS).write_text("".join(lines))


def plot_curves(
    folder: Path, records: Sequence[StepRecord], log_history: Sequence[Mapping[str, Any]]
) -> None:
    """Draw daa_curves.png: losses, gradient norm, s_t, gamma_t, c_t, effective learning rate.

    Args:
        records: one per optimizer step.
        log_history: of the trainer's state; gives the losses at the logging steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flat
    loss_axis = next(axes)
    for key, label in _loss_keys(log_history):
        points = [(row["step"], row[key]) for row in log_history if key in row]
        loss_axis.plot(*zip(*points, strict=True), label=label, marker="." if "eval" in key else "")
    loss_axis.set_title("loss")
    if loss_axis.lines:
        loss_axis.legend(fontsize="small")
    steps = [record.step for record in records]
    for axis, (name, title) in zip(
        axes,
        (
            ("domain_grad_norm", "gradient norm of the domain batch"),
            ("similarity", "similarity s_t"),
            ("gamma", "anchor's share gamma_t"),
            ("correction", "correction c_t"),
            ("effective_lr", "effective learning rate"),
        ),
        strict=True,
    ):
        values = [getattr(record, name) for record in records]
        smoothed = name in ("similarity", "correction", "domain_grad_norm", "effective_lr")
        axis.plot(steps, values, color="tab:blue", alpha=0.35 if smoothed else 1.0)
        if smoothed:
            axis.plot(steps, _running_mean(values), color="tab:blue")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    for axis in figure.axes:
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    figure.savefig(folder / CURVES, dpi=110)


def _loss_keys(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    keys = dict.fromkeys(
        key for row in log_history for key in row if key == "loss" or key.endswith("_loss")
    )
    keys.pop("train_loss", None)
    labels = {"loss": "training", "eval_loss": "domain, held out"}
    return [
        (key, labels.get(key, key.removeprefix("eval_").removesuffix("_loss") + ", held out"))
        for key in keys
    ]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the last tenth of the run (at least 5 steps), fewer at the start."""
    window = max(5, len(values) // 10)
    tails = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(tail) / len(tail) for tail in tails]
