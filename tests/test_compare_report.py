"""The report of a comparison: its numbers against hand-worked ones, its files, its pictures."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from compared import FakeProcesses, content, experiment
from matplotlib.image import imread
from typer.testing import CliRunner

from daa_ext.compare import making, process, stats
from daa_ext.compare.campaign import Campaign
from daa_ext.compare.experiment import Experiment
from daa_ext.compare.plan import Planner
from daa_ext.compare.report import write_report
from daa_ext.compare.summary import noise_floor, summarise
from daa_ext.compare.table import Table

CURVES = {"steps": 1, "sets": ["repeat"]}
NOISE = {"max_samples": 8}


def shares(run_id: str) -> tuple[float, float]:
    """(domain, general) of each run: what the numbers below are worked out from."""
    seed = 0.1 if "seed-2" in run_id else 0.0
    if run_id.startswith("base"):
        return 0.2, 0.8
    if "direct" in run_id and "alpha" in run_id:
        return 0.5, 0.8
    if "lr-0.001" in run_id:
        return 0.9, 0.3 + seed
    return 0.6, 0.6 + seed


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProcesses:
    fake = FakeProcesses(tmp_path / "out", right=shares)
    monkeypatch.setattr(process, "run", fake)
    monkeypatch.setattr(making, "interpolate", lambda *_: None)
    return fake


def table(settings: Experiment) -> Table:
    root = Path(settings.output)
    root.mkdir(exist_ok=True)
    campaign = Campaign(settings, Planner(settings, root))
    campaign.run()
    return Table(settings, campaign.planner.rows, campaign.results())


def rows(found: Table) -> dict[str, Any]:
    return {row["row"]: row for row in summarise(found, "words")["rows"]}


def test_best_rate_scores_and_changes(tmp_path: Path, fake: FakeProcesses) -> None:
    direct = rows(table(experiment(tmp_path)))["direct"]
    # S at 1e-4: (0.6, 0.6) and (0.6, 0.7); at 1e-3: (0.9, 0.3) and (0.9, 0.4)
    assert direct["rate"] == 1e-4
    expected = [stats.harmonic(0.6, 0.6), stats.harmonic(0.6, 0.7)]
    assert direct["scores"]["S"]["mean"] == pytest.approx(stats.mean(expected))
    assert direct["scores"]["S"]["sd"] == pytest.approx(stats.deviation(expected))
    assert direct["change"]["S_D"] == pytest.approx(0.4)
    assert direct["change"]["S_G"] == pytest.approx(-0.15)
    assert direct["seeds"] == [1, 2]


def test_scores_at_the_matched_domain_score(tmp_path: Path, fake: FakeProcesses) -> None:
    found = table(experiment(tmp_path, match_at=0.5))
    summary = summarise(found, "words")
    assert summary["target"] == pytest.approx(0.2 + 0.5 * 0.7)
    matched = {row["row"]: row["matched"]["S_G"] for row in summary["rows"]}
    losses = [row["matched"]["repeat"]["mean"] for row in summary["rows"]]
    assert losses == [pytest.approx(2.0)] * len(losses)
    # base (0.2, 0.8) to (0.6, 0.6) and (0.6, 0.7), at 0.55
    assert matched["direct"]["mean"] == pytest.approx(stats.mean([0.625, 0.7125]))
    # wise, of 1e-4: (0.5, 0.8) to (0.6, 0.6 / 0.7); of 1e-3: (0.5, 0.8) to (0.9, 0.3 / 0.4)
    steep = [0.8 - 0.05 * 0.2 / 0.1, 0.8 - 0.05 * 0.1 / 0.1]
    flat = [0.8 - 0.05 * 0.5 / 0.4, 0.8 - 0.05 * 0.4 / 0.4]
    best = [max(pair) for pair in zip(steep, flat, strict=True)]
    assert matched["wise"]["mean"] == pytest.approx(stats.mean(best))


def test_the_rate_is_chosen_on_the_other_half(tmp_path: Path, fake: FakeProcesses) -> None:
    """Items at even places choose, items at odd places report: shuffled luck cannot do both."""

    def score_set(each: dict[str, Any], share: float | None) -> dict[str, Any]:
        found = FakeProcesses._set(fake, each, share)
        if each["kind"] == "labels":  # right on even places only, the more the higher the share
            right = [i % 2 == 0 and i < share * 20 for i in range(20)]
            found["items"] = [{"truth": "a", "found": "a" if ok else "b"} for ok in right]
        return found

    fake._set = score_set  # type: ignore[method-assign]
    direct = rows(table(experiment(tmp_path)))["direct"]
    assert direct["scores"]["S_D"]["mean"] == 0.0
    assert direct["rate"] == 1e-4


def test_sets_for_one_use_alone(tmp_path: Path, fake: FakeProcesses) -> None:
    whole = content(tmp_path)
    general = [
        {**whole["general"][0], "name": "chosen", "use": "select"},
        {**whole["general"][0], "name": "told", "use": "report"},
    ]
    found = table(experiment(tmp_path, general=general))
    base = found.base("words")
    assert base is not None
    assert {half: scores.general for half, scores in base.halves.items()} == {
        "select": 0.8, "report": 0.8, "all": 0.8
    }  # fmt: skip


def test_noise_floor_and_tests(tmp_path: Path, fake: FakeProcesses) -> None:
    found = table(experiment(tmp_path))
    floor = {row["set"]: row for row in noise_floor(found)}
    assert floor["endings"]["first"] == floor["endings"]["second"] == pytest.approx(0.8)
    assert floor["endings"]["standard_error"] == pytest.approx((0.8 * 0.2 / 20) ** 0.5)
    assert rows(found)["direct"]["tests"]["S"] == {"paired": None, "welch": None}
    assert rows(found)["daa"]["tests"]["S"]["welch"] == pytest.approx(1.0)


def test_differences_from_the_reference(tmp_path: Path, fake: FakeProcesses) -> None:
    """By hand: of direct at 1e-4 endings are right in 0.6 and 0.7, of WiSE-FT in 0.8 and 0.8."""
    found = rows(table(experiment(tmp_path)))
    assert found["direct"]["against"] == {}
    assert found["daa"]["against"]["words"]["mean"] == 0.0
    assert found["daa"]["against"]["words"]["paired"] is None, "no spread to test with"
    wise = found["wise"]["against"]
    assert wise["endings"]["metric"] == "accuracy"
    assert wise["endings"]["mean"] == pytest.approx(0.15)
    assert wise["endings"]["sd"] == pytest.approx(0.05 * 2**0.5)
    assert wise["repeat"] == {"mean": 0.0, "sd": 0.0, "n": 2, "metric": "loss", "paired": None}
    text = write_report(table(experiment(tmp_path)), tmp_path / "out").read_text()
    assert "| wise | 2 | -0.100 +- 0.000 (p -) | +0.150 +- 0.071 (p 0.205) |" in text


def test_costs(tmp_path: Path, fake: FakeProcesses) -> None:
    costs = {name: row["cost"] for name, row in rows(table(experiment(tmp_path))).items()}
    assert costs["direct"]["seconds"] == 10.0
    assert costs["direct"]["anchor_seconds"] == 0.0
    assert costs["daa"]["anchor_seconds"] == costs["daa"]["anchor_share_seconds"] == 10.0
    assert costs["control"]["anchor_seconds"] == 0.0
    assert costs["wise"]["seconds"] == pytest.approx(10.0, abs=5.0)


def test_files_and_pictures(tmp_path: Path, fake: FakeProcesses) -> None:
    methods = content(tmp_path)["methods"]
    methods["daa_k"] = {"kind": "daa", "learning_rate": 1e-4, "sweep": {"daa_k0": [1, 2]}}
    methods["other"] = {"kind": "daa", "learning_rate": 1e-4, "sweep": {"daa_k0": [0.5]}}
    methods["bad"] = {"kind": "lora", "learning_rate": 1e-4}
    fake.broken = {"words/bad/lr-0.0001_seed-1", "words/bad/lr-0.0001_seed-2"}
    settings = experiment(tmp_path, methods=methods, curves=CURVES, noise=NOISE)
    found = table(settings)
    path = write_report(found, tmp_path / "out")
    text = path.read_text()
    assert "failed training: RuntimeError: out of memory" in text
    assert "| daa_k daa_k0=2 |" in text
    assert "| base |" in text
    names = {picture.name for picture in (tmp_path / "out").glob("*.png")}
    assert names == {
        "scatter_words.png", "forgetting_words.png", "sweep_words_daa_k0.png", "similarity.png",
        "gradient_noise.png",
    }  # fmt: skip
    for name in names:
        assert f"({name})" in text
        assert imread(tmp_path / "out" / name).std() > 0.02, "not a blank page"
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {run["id"] for run in whole["runs"]} == {result["id"] for result in found.results}
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    direct = next(line for line in lines if line["id"] == "words/direct/lr-0.001_seed-2")
    assert float(direct["S_G"]) == pytest.approx(0.4)
    assert len(lines) == len(whole["runs"])


def test_a_row_without_a_number_has_no_scores_and_spoils_no_other(
    tmp_path: Path, fake: FakeProcesses
) -> None:
    fake.diverged = {f"words/daa/lr-0.0001_seed-{seed}" for seed in (1, 2)}
    found = table(experiment(tmp_path))
    assert "daa" not in rows(found)
    assert "control" not in rows(found), "it is shown where its DAA method is best"
    text = write_report(found, tmp_path / "out").read_text()
    assert "diverged a loss or a score is not a number" in text
    assert "| direct |" in text


def test_nothing_scored_is_no_report(tmp_path: Path) -> None:
    settings = experiment(tmp_path)
    empty = Table(settings, Planner(settings, tmp_path).rows, [])
    with pytest.raises(ValueError, match="no run has been scored yet"):
        write_report(empty, tmp_path)


def test_the_command(tmp_path: Path, fake: FakeProcesses) -> None:
    from daa_ext.cli import app

    experiment(tmp_path)
    arguments = ["compare", str(tmp_path / "experiment.yaml")]
    listed = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert listed.exit_code == 0
    assert "to do  words/direct/lr-0.001_seed-2" in listed.output
    assert fake.trained == []
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.md").is_file()
    again = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "done   words/direct/lr-0.001_seed-2" in again.output
    refused = CliRunner().invoke(app, [*arguments, "train.cutoff_len=32"])
    assert refused.exit_code == 1
    assert "yaml.cutoff_len: 64 -> 32" in refused.output
    assert (tmp_path / "out" / "report.md").is_file()
