"""`daa compare` through the real LLaMA-Factory and the real scoring process, on a tiny model.

make test-compare: a dozen processes of some 20 s each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import content
from tiny import make_model

from daa_ext.compare import process

pytestmark = pytest.mark.compare
DAA = Path(sys.executable).with_name("daa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: every kind of run, one that fails and one that diverges."""
    folder = tmp_path_factory.mktemp("compared")
    whole = content(folder)
    make_model(folder / "base")
    whole |= {
        "seeds": [1],
        "noise": {"max_samples": 16},
        "curves": {"steps": 1, "sets": ["repeat"]},
        "score": {"dtype": "fp32"},
        "methods": {
            "direct": {"learning_rate": [1e-3]},
            "daa": {"learning_rate": [1e-3], "keys": {"daa_k0": 1}},
            "control": {"of": "daa"},
            "wise": {"of": "direct", "alpha": [0.5]},
            "lora": {"learning_rate": [1e-3]},
            "replay_10": {"learning_rate": [1e-3]},
            "talr": {"learning_rate": [1e-3]},
            "diverges": {"kind": "direct", "learning_rate": [1e25], "keys": {"max_grad_norm": 0.0}},
            "fails": {"kind": "lora", "learning_rate": [1e-3], "keys": {"lora_target": "nothing"}},
        },
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    done = compare(folder)
    assert done.code == 0, (folder / "log").read_text()[-4000:]
    return folder


def compare(folder: Path, *words: str) -> process.Outcome:
    command = [str(DAA), "compare", str(folder / "experiment.yaml"), *words]
    return process.run(command, folder / "log", {"OMP_NUM_THREADS": "1"})


def results(folder: Path) -> dict[str, Any]:
    whole = json.loads((folder / "out" / "results.json").read_text())
    return {run["row"] or run["id"]: run for run in whole["runs"]}


def test_every_run_has_its_row(folder: Path) -> None:
    found = results(folder)
    states = {name: run["status"] for name, run in found.items()}
    assert states.pop("fails") == "failed"
    assert states.pop("diverges") == "diverged"
    assert set(states.values()) == {"done"}
    assert "nothing" in found["fails"]["reason"]
    for name in ("direct", "daa", "control", "wise", "lora", "replay_10", "talr"):
        assert 0.0 <= found[name]["S_D"] <= 1.0
        assert found[name]["repeat.loss"] != found["base-1"]["repeat.loss"], "it has been tuned"
    assert found["base-1"]["repeat.loss"] == pytest.approx(found["base-2"]["repeat.loss"], 1e-5)


def test_the_same_domain_rows_with_and_without_replay(folder: Path) -> None:
    """The subset of a seed is the same for every method; replay adds to it."""

    def steps(name: str) -> int:
        runs = folder / "out" / "runs" / "words" / name
        state = next(runs.rglob("trainer_state.json"))
        return json.loads(state.read_text())["max_steps"]

    assert (steps("direct"), steps("replay_10")) == (2, 3)  # 16 rows, 16 + 2 rows, batch 8


def test_the_control_has_daas_rate(folder: Path) -> None:
    runs = folder / "out" / "runs" / "words"
    report = json.loads(next((runs / "daa").rglob("daa_report.json")).read_text())
    control = results(folder)["control"]
    steps = report["total_steps"]
    mean = control["learning_rate"] * (steps + 1) / (2 * steps)
    assert mean == pytest.approx(report["effective_lr_mean"], rel=1e-5)


def test_the_noise_of_general_and_domain_gradients(folder: Path) -> None:
    reports = (folder / "out" / "runs" / "noise").rglob("daa_report.json")
    found = [json.loads(path.read_text())["gradient"] for path in reports]
    assert len(found) == 2
    assert all(each["batch_norm"] > 0.0 and each["mean_norm"] > 0.0 for each in found)


def test_pictures_and_report(folder: Path) -> None:
    text = (folder / "out" / "report.md").read_text()
    names = {path.name for path in (folder / "out").glob("*.png")}
    assert names >= {"scatter_words.png", "forgetting_words.png", "similarity.png",
                     "gradient_noise.png"}  # fmt: skip
    assert all(f"({name})" in text for name in names)


def test_a_second_call_runs_what_failed_and_nothing_else(folder: Path) -> None:
    runs = folder / "out" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("result.json")}
    assert compare(folder).code == 0
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert {path.parent.parent.name for path in changed} == {"fails"}


def test_changed_settings_are_refused(folder: Path) -> None:
    before = (folder / "out" / "report.md").read_text()
    assert compare(folder, "train.cutoff_len=32").code == 1
    assert "yaml.cutoff_len: 64 -> 32" in (folder / "log").read_text()
    assert (folder / "out" / "report.md").read_text() == before
