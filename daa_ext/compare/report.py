"""report.md, results.json, results.csv and the pictures of a comparison."""

import csv
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from daa_ext.compare import figures
from daa_ext.compare.making import write_json
from daa_ext.compare.runs import BASE
from daa_ext.compare.summary import SCORES, Summary, noise_floor, summarise
from daa_ext.compare.table import Table

COLUMNS = (
    "id", "task", "domain", "row", "seed", "rate", "learning_rate", "alpha", "status", "reason",
    "seconds",
)  # fmt: skip


def write_report(table: Table, folder: Path) -> Path:
    """Write all files of the report; the path of report.md.

    Raises:
        ValueError: nothing has been scored yet.
    """
    if not any("score" in result for result in table.results):
        raise ValueError(f"output={folder}: no run has been scored yet, so there is no table.")
    summaries = {domain: summarise(table, domain) for domain in table.experiment.domains}
    pictures = figures.draw_all(table, summaries, folder)
    runs = list(_runs(table))
    content = {
        "experiment": table.experiment.model_dump(),
        "noise_floor": noise_floor(table),
        "domains": summaries,
        "runs": runs,
    }
    write_json(folder / "results.json", content)
    _write_csv(folder / "results.csv", runs)
    path = folder / "report.md"
    path.write_text("\n".join(_pages(table, summaries, runs, pictures)) + "\n")
    return path


def _runs(table: Table) -> Iterable[dict[str, Any]]:
    """One flat mapping per run: what it was, its scores over all items, every set's metrics."""
    for result in table.results:
        row = {key: result[key] for key in COLUMNS}
        domain = result["domain"] or next(iter(table.experiment.domains))
        report = (result.get("train") or {}).get("report") or {}
        row["mean_rate"] = report.get("effective_lr_mean")
        if "score" in result:
            point = table.point(domain, result)
            row |= {name: getattr(point.halves["all"], key) for name, key in SCORES.items()}
            row |= {f"{s}.{m}": v for s, found in point.sets.items() for m, v in found.items()}
        yield row


def _write_csv(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    columns = dict.fromkeys(key for run in runs for key in run)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(runs)


def _pages(
    table: Table, summaries: dict[str, Summary], runs: list[dict[str, Any]], pictures: list[str]
) -> Iterable[str]:
    experiment = table.experiment
    yield "# Comparison\n"
    yield f"- Base model: {experiment.base_model}; seeds {experiment.seeds}" + (
        f" (grid with {experiment.tune_seed} alone)." if experiment.tune_seed is not None else "."
    )
    yield f"- Machine: {platform.processor() or platform.machine()}, {platform.system()}."
    base = table.by_id(BASE)
    versions = base["score"]["versions"] if base and "score" in base else {}
    yield f"- Versions: {', '.join(f'{name} {found}' for name, found in versions.items())}."
    states = [result["status"] for result in table.results]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    yield f"- Runs: {', '.join(f'{count} {state}' for state, count in counts.items())}.\n"
    yield "## Noise floor\n"
    yield (
        "The base model scored twice, its items in another order and other batches, and the "
        "standard error over the items of a set. Differences below these are none.\n"
    )
    yield from _markdown(
        ["set", "metric", "items", "first", "second", "standard error"],
        [
            [r["set"], r["metric"], r["n"], _f(r["first"]), _f(r["second"]),
             _f(r["standard_error"])]
            for r in noise_floor(table)
        ],
    )  # fmt: skip
    for domain, summary in summaries.items():
        yield from _domain(table, domain, summary)
    yield "\n## Every run\n"
    scored = [*SCORES, *dict.fromkeys(k for run in runs for k in run if k.endswith(".loss"))]
    yield from _markdown(
        ["run", "status", "learning rate", "DAA's mean rate", *scored],
        [
            [run["id"], f"{run['status']} {run['reason']}".strip().replace("|", "/"),
             *(_rate(run[key]) for key in ("learning_rate", "mean_rate")),
             *(_f(run.get(key)) for key in scored)]
            for run in runs
        ],
    )  # fmt: skip
    if pictures:
        yield "\n## Pictures\n"
        yield from (f"![{Path(name).stem}]({name})\n" for name in pictures)


def _domain(table: Table, domain: str, summary: Summary) -> Iterable[str]:
    base = summary["base"]
    yield f"\n## {domain}\n"
    if base is None:
        yield "The base model has not been scored yet."
        return
    rows = summary["rows"]
    reference = table.experiment.reference
    yield f"### {domain}: each method at its best learning rate\n"
    yield (
        "The rate (and alpha) is chosen by S on one half of the items, the scores are those of the "
        f"other half. p: against {reference} over the seeds (paired t, Welch).\n"
    )
    first = ["base", "", "", *(_f(base[name]) for name in SCORES), "", "", "", ""]
    yield from _markdown(
        ["method", "rate", "seeds", *SCORES, "change of S_D", "change of S_G", "p paired (S)",
         "p Welch (S)"],
        [
            first,
            *(
                [row["row"], _place(row), len(row["seeds"]),
                 *(_spread(row["scores"][name]) for name in SCORES),
                 _signed(row["change"]["S_D"]), _signed(row["change"]["S_G"]),
                 _p(row["tests"]["S"]["paired"]), _p(row["tests"]["S"]["welch"])]
                for row in rows
            ),
        ],
    )  # fmt: skip
    yield f"\n### {domain}: at the same domain score\n"
    yield (
        f"S_G and the general losses where a method's own curve reaches S_D = "
        f"{_f(summary['target'])} (the base's plus {table.experiment.match_at:g} of the gain of "
        f"{reference}), all items, grid seeds.\n"
    )
    names = list(dict.fromkeys(name for row in rows for name in row["matched"]))
    yield from _markdown(
        ["method", *names, "seeds that reach it"],
        [
            [row["row"], *(_spread(row["matched"][name]) for name in names),
             f"{row['matched']['S_G']['n']} of {row['matched_of']}"]
            for row in rows
        ],
    )  # fmt: skip
    yield f"\n### {domain}: every set, all items, at the best rate\n"
    columns = list(dict.fromkeys((s, m) for row in rows for s, found in row["sets"].items()
                                 for m in found if m != "perplexity"))  # fmt: skip
    yield from _markdown(
        ["method", *(f"{name} {metric}" for name, metric in columns)],
        [
            ["base", *(_f(base["sets"].get(s, {}).get(m)) for s, m in columns)],
            *(
                [row["row"], *(_spread(row["sets"].get(s, {}).get(m)) for s, m in columns)]
                for row in rows
            ),
        ],
    )
    yield from _against(rows, reference, domain)
    yield f"\n### {domain}: cost of one run\n"
    yield "The anchor is built once for all domains; its share is its cost over their number.\n"
    yield from _markdown(
        ["method", "wall s", "GPU hours", "peak memory GB", "anchor s", "anchor s per domain"],
        [
            [row["row"], f"{row['cost']['seconds']:.0f}", f"{row['cost']['gpu_hours']:.3g}",
             _f((row["cost"]["peak_bytes"] or 0) / 1e9), f"{row['cost']['anchor_seconds']:.0f}",
             f"{row['cost']['anchor_share_seconds']:.0f}"]
            for row in rows
        ],
    )  # fmt: skip


def _against(rows: Sequence[Summary], reference: str, domain: str) -> Iterable[str]:
    tested = [row for row in rows if row["against"]]
    if not tested:
        return
    yield f"\n### {domain}: differences from {reference}\n"
    yield (
        "Each at its best rate, all items, over the seeds that both have: mean +- standard "
        "deviation of the differences, p of the paired t test (for one comparison, not for all).\n"
    )
    names = list(
        dict.fromkeys((s, m["metric"]) for row in tested for s, m in row["against"].items())
    )
    yield from _markdown(
        ["method", "seeds", *(f"{name} {metric}" for name, metric in names)],
        [
            [row["row"], max(m["n"] for m in row["against"].values()),
             *(_difference(row["against"].get(name)) for name, _ in names)]
            for row in tested
        ],
    )  # fmt: skip


def _markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _spread(found: Summary | None) -> str:
    if not found or found["mean"] is None:
        return "-"
    return _f(found["mean"]) + (f" +- {found['sd']:.3f}" if found["sd"] is not None else "")


def _difference(found: Summary | None) -> str:
    if not found:
        return "-"
    return f"{found['mean']:+.3f} +- {found['sd']:.3f} (p {_p(found['paired'])})"


def _p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else _f(value)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _place(row: Summary) -> str:
    alpha = f", alpha {row['alpha']:g}" if row["alpha"] else ""
    return _rate(row["learning_rate"] or row["rate"]) + alpha
