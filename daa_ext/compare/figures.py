"""The pictures of a comparison (PNG)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from daa_ext.compare import stats
from daa_ext.compare.methods import KINDS
from daa_ext.compare.summary import Summary
from daa_ext.compare.table import Point, Table

MARKERS = "osD^vP*X<>hp"
NEAR = 0.05  # differences of losses below this are on a linear scale


def draw_all(table: Table, summaries: Mapping[str, Summary], folder: Path) -> list[str]:
    """Draw every picture that there are numbers for; their file names."""
    drawn = []
    for domain, summary in summaries.items():
        if summary["base"] is not None and summary["rows"]:
            drawn.append(_save(trade_off(table, domain), folder, f"scatter_{domain}"))
        if any(_history(table, domain, row) for row in summary["rows"]):
            drawn.append(_save(forgetting(table, domain, summary), folder, f"forgetting_{domain}"))
        for key in dict.fromkeys(row["swept"][0] for row in summary["rows"] if row["swept"]):
            name = f"sweep_{domain}_{key.replace('.', '_')}"
            drawn.append(_save(sweep(summary, key, _losses(table)), folder, name))
    if (figure := similarity(table, summaries, folder)) is not None:
        drawn.append(_save(figure, folder, "similarity"))
    if noise := [result for result in table.results if result["task"] == "noise"]:
        drawn.append(_save(gradient_noise(noise), folder, "gradient_noise"))
    return drawn


def trade_off(table: Table, domain: str) -> Figure:
    """S_D against S_G, and against the general losses: one curve per method, the Pareto front.

    The mean loss is shown less the base's, near 0 on a linear and beyond on a logarithmic scale.
    """
    losses = _losses(table)
    figure, axes = _panels(2 if losses else 1, len(table.rows) + 2)
    base = table.base(domain)
    start = (_loss(base, losses) if base is not None and losses else None) or 0.0
    for axis in axes:
        axis.set_xlabel(f"S_D ({domain})")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("S_G")
    everything = []
    for index, row in enumerate(table.rows):
        points = [p for p in table.points(domain, row.name) if p.is_scored]
        style: dict[str, Any] = {
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 5,
            "color": f"C{index % 10}",
            "linewidth": 1,
            "label": row.name,
        }
        curve = _means(points, _general)
        everything += curve
        if curve:
            axes[0].plot(*zip(*curve, strict=True), **style)
        if losses and (curve := _means(points, lambda point: _loss(point, losses, start))):
            axes[1].plot(*zip(*curve, strict=True), **style)
    front = stats.pareto_front(everything)
    if front:
        axes[0].plot(*zip(*front, strict=True), "k--", linewidth=1, alpha=0.6, label="Pareto front")
    if base is not None and base.is_scored:
        axes[0].plot([_domain(base)], [_general(base)], "k*", markersize=13, label="base")
        if losses:
            axes[1].plot([_domain(base)], [0.0], "k*", markersize=13)
    if losses:
        axes[1].axhline(0.0, color="k", linewidth=0.6, linestyle=":")
        axes[1].set_ylabel(f"mean loss of {', '.join(losses)}, less the base's")
        axes[1].set_yscale("symlog", linthresh=NEAR)
    _legend(figure, axes[0])
    return figure


def forgetting(table: Table, domain: str, summary: Summary) -> Figure:
    """Losses on the curves' sets over the steps, each method at its best rate."""
    histories = {row["row"]: _history(table, domain, row) for row in summary["rows"]}
    keys = sorted({key for rows in histories.values() for row in rows for key in _eval_keys(row)})
    figure, axes = _panels(len(keys), len(histories))
    for axis, key in zip(axes, keys, strict=True):
        for index, (name, rows) in enumerate(histories.items()):
            found = [(row["step"], row[key]) for row in rows if key in row]
            if found:
                axis.plot(
                    *zip(*found, strict=True), label=name, color=f"C{index % 10}",
                    marker=MARKERS[index % len(MARKERS)], markersize=4, linewidth=1,
                )  # fmt: skip
        axis.set_title(key.removeprefix("eval_curve_").removesuffix("_loss"))
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss, held out")
        axis.grid(alpha=0.3)
    _legend(figure, axes[0])
    return figure


def similarity(table: Table, summaries: Mapping[str, Summary], folder: Path) -> Figure | None:
    """s_t over the run, one line per domain and DAA method (DAA paper, fig. 5)."""
    anchored = [row for summary in summaries.values() for row in summary["rows"]
                if KINDS[row["kind"]].anchored]  # fmt: skip
    figure, axes = _panels(1, len(anchored))
    for domain, summary in summaries.items():
        for row in summary["rows"]:
            if not KINDS[row["kind"]].anchored:
                continue
            best = _best_points(table, domain, row)[0]
            path = folder / "runs" / best.result["id"] / "out" / "daa_steps.jsonl"
            steps = [json.loads(line) for line in path.read_text().splitlines()]
            total = max(1, len(steps))
            axes[0].plot(
                [each["step"] / total for each in steps], [each["similarity"] for each in steps],
                label=f"{domain}: {row['row']}", linewidth=1,
            )  # fmt: skip
    if not axes[0].lines:
        return None
    axes[0].set_xlabel("share of the run")
    axes[0].set_ylabel("similarity s_t (log scale)")
    axes[0].set_yscale("log")
    axes[0].grid(alpha=0.3)
    _legend(figure, axes[0])
    return figure


def gradient_noise(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Noise scale and norm of the gradient at the base model, per data set (fig. 2c)."""
    figure, axes = _panels(2)
    found = {r["row"]: r["train"]["report"]["gradient"] for r in results if r.get("train")}
    names = list(found)
    axes[0].bar(names, [found[name]["noise_scale"] or 0.0 for name in names])
    axes[0].set_ylabel("gradient noise scale (samples)")
    width = 0.4
    places = range(len(names))
    axes[1].bar(places, [found[n]["batch_norm"] or 0.0 for n in names], width, label="one batch")
    axes[1].bar(
        [place + width for place in places],
        [found[name]["mean_norm"] for name in names], width, label="mean of the pass",
    )  # fmt: skip
    axes[1].set_xticks([place + width / 2 for place in places], names)
    axes[1].set_ylabel("norm of the gradient")
    axes[1].legend(fontsize="small")
    return figure


def sweep(summary: Summary, key: str, losses: Sequence[str]) -> Figure:
    """Scores, and losses less the base's, over the values of one swept key (tables 5 and 12).

    Of every method that sweeps it, each value at its best rate.
    """
    figure, axes = _panels(2 if losses else 1)
    swept = [row for row in summary["rows"] if row["swept"] and row["swept"][0] == key]
    numeric = all(isinstance(row["swept"][1], (int, float)) for row in swept)
    for index, method in enumerate(dict.fromkeys(row["method"] for row in swept)):
        rows = [row for row in swept if row["method"] == method]
        values = [row["swept"][1] if numeric else str(row["swept"][1]) for row in rows]
        style: dict[str, Any] = {"marker": MARKERS[index], "capsize": 3, "linewidth": 1}
        for name in ("S_D", "S_G", "S"):
            found = [row["scores"][name] for row in rows]
            axes[0].errorbar(values, *_bars(found), label=f"{method}: {name}", **style)
        for name in losses:
            found = [row["sets"][name]["loss"] for row in rows]
            start = summary["base"]["sets"][name]["loss"]
            axes[1].errorbar(values, *_bars(found, start), label=f"{method}: {name}", **style)
    if losses:
        axes[1].axhline(0.0, color="k", linewidth=0.6, linestyle=":")
        axes[1].set_ylabel("loss less the base's")
    for axis in axes:
        axis.set_xlabel(key)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def _bars(found: Sequence[Summary], start: float = 0.0) -> tuple[list[float], list[float]]:
    """(means less `start`, standard deviations)."""
    return [each["mean"] - start for each in found], [each["sd"] or 0.0 for each in found]


def _losses(table: Table) -> list[str]:
    """The general sets that are losses."""
    return [each.name for each in table.experiment.general if each.kind == "loss"]


def _panels(count: int, legend: int = 0) -> tuple[Figure, list[Axes]]:
    """Axes side by side, high enough for a legend of so many lines beside them."""
    height = max(4.6, 0.21 * legend + 0.5)
    figure = Figure(figsize=(5.2 * count + 2.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False).flat)


def _legend(figure: Figure, axis: Axes) -> None:
    """The legend of `axis`, beside all axes."""
    labelled = axis.get_legend_handles_labels()
    figure.legend(*labelled, loc="outside right center", fontsize="small")


def _save(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / f"{name}.png", dpi=110)
    return f"{name}.png"


def _means(points: Sequence[Point], value: Any) -> list[stats.Pair]:
    """(mean S_D, mean value) over the seeds of each place of the grid, along the grid."""
    places: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        if value(point) is not None:
            places.setdefault(point.place, []).append(point)
    return [
        (stats.mean([_domain(p) for p in found]), stats.mean([value(p) for p in found]))
        for found in places.values()
    ]


def _domain(point: Point) -> float:
    score = point.halves["all"].domain
    assert score is not None
    return score


def _general(point: Point) -> float:
    score = point.halves["all"].general
    assert score is not None
    return score


def _loss(point: Point, names: Sequence[str], start: float = 0.0) -> float | None:
    """Mean loss less `start`; None where one of them gave no number."""
    found = [point.sets[name]["loss"] for name in names if "loss" in point.sets.get(name, {})]
    return stats.mean(found) - start if len(found) == len(names) else None


def _best_points(table: Table, domain: str, row: Summary) -> list[Point]:
    place = (row["rate"], row["alpha"] or 0.0)
    return [p for p in table.points(domain, row["row"]) if p.place == place and p.is_scored]


def _history(table: Table, domain: str, row: Summary) -> list[dict[str, Any]]:
    train = _best_points(table, domain, row)[0].result.get("train") or {}
    return [each for each in train.get("history", []) if _eval_keys(each)]


def _eval_keys(row: Mapping[str, Any]) -> list[str]:
    return [key for key in row if key.startswith("eval_curve_") and key.endswith("_loss")]
