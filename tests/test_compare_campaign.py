"""A comparison's runs: each once, in order, resumed, whatever fails. See compared.FakeProcesses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import FakeProcesses, content, experiment

from daa_ext.compare import making, process
from daa_ext.compare.campaign import Campaign, differences
from daa_ext.compare.experiment import Experiment
from daa_ext.compare.plan import Planner
from daa_ext.compare.table import Table

GRID = [
    "words/direct/lr-0.0001_seed-{}",
    "words/direct/lr-0.001_seed-{}",
    "words/daa/lr-0.0001_seed-{}",
    "words/control/of-daa_lr-0.0001_seed-{}",
]
WISE = [f"words/wise/of-direct_lr-{rate}_seed-{{}}_alpha-0.5" for rate in ("0.0001", "0.001")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProcesses:
    fake = FakeProcesses(tmp_path / "out")
    monkeypatch.setattr(process, "run", fake)

    def interpolated(base: Path, tuned: Path, alpha: float, out: Path) -> None:
        assert list(tuned.glob("*.safetensors")), "the tuned weights were removed too early"
        out.mkdir()
        (out / "model.safetensors").touch()

    monkeypatch.setattr(making, "interpolate", interpolated)
    return fake


def campaign(settings: Experiment) -> Campaign:
    root = Path(settings.output)
    root.mkdir(exist_ok=True)
    return Campaign(settings, Planner(settings, root))


def statuses(found: Campaign) -> dict[str, str]:
    return {result["id"]: result["status"] for result in found.results()}


def test_every_run_once_and_a_second_call_runs_nothing(tmp_path: Path, fake: FakeProcesses) -> None:
    settings = experiment(tmp_path)
    campaign(settings).run()
    grid = [run.format(seed) for seed in (1, 2) for run in GRID]
    assert fake.trained == ["anchors/general_16", *grid]
    assert len(fake.scored) == len(set(fake.scored)) == 2 + len(grid) + 2 * len(WISE)
    fake.trained, fake.scored = [], []
    campaign(settings).run()
    assert (fake.trained, fake.scored) == ([], [])


def test_weights_go_when_nothing_needs_them(tmp_path: Path, fake: FakeProcesses) -> None:
    campaign(experiment(tmp_path)).run()
    assert not list(tmp_path.rglob("runs/**/*.safetensors"))
    other = FakeProcesses(tmp_path / "kept")
    fake.root, fake.trained = other.root, []
    campaign(experiment(tmp_path, f"output={other.root}", "keep_weights=true")).run()
    assert len(list(other.root.rglob("runs/**/out/*.safetensors"))) == 1 + 8 + 4


def test_a_failed_run_does_not_stop_the_rest_and_is_tried_again(
    tmp_path: Path, fake: FakeProcesses
) -> None:
    settings = experiment(tmp_path)
    fake.broken = {GRID[2].format(1)}
    found = campaign(settings)
    found.run()
    failed = {run for run, status in statuses(found).items() if status == "failed"}
    assert failed == {GRID[2].format(1), GRID[3].format(1)}, "the control has lost its DAA run"
    reasons = {result["id"]: result["reason"] for result in found.results()}
    assert reasons[GRID[2].format(1)] == "training: RuntimeError: out of memory"
    assert "failed, and this run needs it" in reasons[GRID[3].format(1)]
    fake.trained, fake.broken = [], set()
    found = campaign(settings)
    found.run()
    assert fake.trained == [GRID[2].format(1), GRID[3].format(1)]
    assert set(statuses(found).values()) == {"done"}


def test_a_diverged_run_is_a_row_and_is_not_tried_again(
    tmp_path: Path, fake: FakeProcesses
) -> None:
    settings = experiment(tmp_path)
    fake.diverged = {GRID[1].format(1)}
    found = campaign(settings)
    found.run()
    assert statuses(found)[GRID[1].format(1)] == "diverged"
    table = Table(settings, found.planner.rows, found.results())
    assert table.best_rates()["words", "direct"] == 1e-4
    fake.trained = []
    campaign(settings).run()
    assert fake.trained == []


def test_the_control_runs_at_the_mean_rate_of_its_daa_run(
    tmp_path: Path, fake: FakeProcesses
) -> None:
    campaign(experiment(tmp_path)).run()
    path = tmp_path / "out" / "runs" / GRID[3].format(1) / "train.yaml"
    settings = yaml.safe_load(path.read_text())
    rate, steps = settings["learning_rate"], 4
    schedule = [rate * (1 - t / steps) for t in range(steps)]
    assert sum(schedule) / steps == pytest.approx(5e-4)  # what the stand-in's report says
    assert settings["finetuning_type"] == "full"
    assert not [key for key in settings if key.startswith("daa")]


def test_tune_seed_runs_the_others_at_the_best_rate_alone(
    tmp_path: Path, fake: FakeProcesses
) -> None:
    fake.right = lambda run: (0.9 if "lr-0.001" in run else 0.6, 0.5)
    campaign(experiment(tmp_path, "tune_seed=1")).run()
    first = [run.format(1) for run in GRID]
    assert fake.trained[1:] == [*first, *(GRID[i].format(2) for i in (1, 2, 3))]
    assert WISE[1].format(2) in fake.scored
    assert WISE[0].format(2) not in fake.scored


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.cutoff_len=32", "yaml.cutoff_len: 64 -> 32"),
        ("methods.daa.keys.daa_k0=2", "yaml.daa_k0: 1 -> 2"),
        ("score.batch_size=3", "score.batch_size: 8 -> 3"),
        ("domains.words.max_samples=8", "data.words.num_samples: 16 -> 8"),
    ],
)
def test_changed_settings_are_refused_with_the_difference(
    tmp_path: Path, fake: FakeProcesses, override: str, words: str
) -> None:
    found = campaign(experiment(tmp_path))
    found.run()
    found.refuse_changes(found.planner.grid())  # nothing has changed yet
    changed = campaign(experiment(tmp_path, override))
    with pytest.raises(ValueError, match="made with other settings") as error:
        changed.refuse_changes(changed.planner.grid())
    assert words in str(error.value)


def test_changed_data_are_refused(tmp_path: Path, fake: FakeProcesses) -> None:
    campaign(experiment(tmp_path)).run()
    with (tmp_path / "data" / "domain.jsonl").open("a") as file:
        file.write('{"instruction": "a", "input": "", "output": "positive"}\n')
    changed = campaign(experiment(tmp_path))
    with pytest.raises(ValueError, match=r"files.*domain.jsonl: \w+ -> \w+"):
        changed.refuse_changes(changed.planner.grid())


def test_more_methods_rates_and_seeds_may_be_added(tmp_path: Path, fake: FakeProcesses) -> None:
    campaign(experiment(tmp_path)).run()
    methods: dict[str, Any] = content(tmp_path)["methods"]
    methods["direct"]["learning_rate"].append(1e-2)
    methods["talr"] = {"learning_rate": [1e-4]}
    fake.trained = []
    more = campaign(experiment(tmp_path, methods=methods, seeds=[1, 2, 3]))
    more.refuse_changes(more.planner.grid())
    more.run()
    assert "words/direct/lr-0.01_seed-1" in fake.trained
    assert "words/talr/lr-0.0001_seed-3" in fake.trained
    assert GRID[0].format(1) not in fake.trained


def test_two_processes_share_the_runs(tmp_path: Path, fake: FakeProcesses) -> None:
    """A run that another process has taken is left to it; the rest is done meanwhile."""
    from filelock import FileLock

    settings = experiment(tmp_path)
    ours = campaign(settings)
    taken = tmp_path / "out" / "runs" / GRID[0].format(1)
    taken.mkdir(parents=True)
    lock = FileLock(taken / ".lock")
    lock.acquire()
    finished = ours.maker.planner.root / "runs" / GRID[3].format(2) / "result.json"

    def other_process(seconds: float) -> None:
        assert finished.exists(), "waiting begins when nothing else is left to do"
        lock.release()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("daa_ext.compare.campaign.time.sleep", other_process)
        ours.run()
    assert fake.trained.index(GRID[0].format(1)) == len(fake.trained) - 1
    assert set(statuses(ours).values()) == {"done"}


def test_results_are_whole_or_not_there(tmp_path: Path, fake: FakeProcesses) -> None:
    found = campaign(experiment(tmp_path))
    found.run()
    path = tmp_path / "out" / "runs" / "base-1" / "result.json"
    before = path.read_text()
    with pytest.raises(TypeError):
        making.write_json(path, {"not": {1, 2}})
    assert path.read_text() == before
    assert json.loads(before)["status"] == "done"


def test_differences() -> None:
    then = {"a": 1, "b": {"c": [1, 2]}, "gone": 0}
    now = {"a": 1, "b": {"c": [1, 3]}, "new": 5}
    assert list(differences(then, now)) == ["b.c[1]: 2 -> 3", "gone: 0 -> None", "new: None -> 5"]
    assert list(differences(then, then)) == []
