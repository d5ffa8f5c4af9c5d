"""Experiment files: what is wrong is named, with its value and its mend, before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import content, experiment

from daa_ext.compare.command import prepare
from daa_ext.compare.host import refuse_unknown_keys
from daa_ext.compare.methods import KINDS, PRESETS
from daa_ext.compare.plan import Planner
from daa_ext.compare.reading import read_experiment
from daa_ext.compare.runs import slug

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "evidence"


def test_a_good_file_is_read_whole(tmp_path: Path) -> None:
    settings = experiment(tmp_path)
    assert settings.methods["direct"].learning_rate == [1e-4, 1e-3]
    assert settings.methods["wise"].kind == "wise"
    assert settings.methods["control"].of == "daa"
    assert settings.seeds == [1, 2]


def test_the_papers_seeds_are_the_default(tmp_path: Path) -> None:
    whole = content(tmp_path)
    del whole["seeds"]
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(whole))
    assert read_experiment(path).seeds == [42, 43, 44, 45, 46]


def test_the_command_line_wins(tmp_path: Path) -> None:
    settings = experiment(tmp_path, "seeds=[7]", "methods.daa.keys.daa_k0=9", "train.bf16=true")
    assert (settings.seeds, settings.methods["daa"].keys) == ([7], {"daa_k0": 9})
    assert settings.train["bf16"] is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("outptu=x", "outptu='x' is not a key of an experiment"),
        ("seeds=[]", "seeds=.*at least 1 item"),
        ("methods.magic.learning_rate=[1]", "methods.magic: no kind is given.*Known: direct"),
        ("methods.direct.kind=magic", "methods.direct.kind=magic: one of direct, lora"),
        ("methods.direct.learning_rate=[-1]", "learning_rate.0=-1: Input should be greater than 0"),
        ("methods.direct.learning_rate=[]", "learning_rate=.. is missing: give a list"),
        ("methods.control.learning_rate=[1]", "is taken from `of`; remove it"),
        ("methods.control.of=direct", "the control is made for a DAA method"),
        ("methods.control.of=nobody", "methods.control.of=nobody: .*another method"),
        ("methods.wise.of=control", "name a method that trains by itself"),
        ("methods.wise.alpha=[1.5]", "alpha.0=1.5"),
        ("methods.direct.alpha=[0.5]", "methods.direct.alpha=.* for kind wise alone"),
        ("methods.direct.of=daa", "methods.direct.of=daa has no effect"),
        ("methods.direct.seeds=[9]", r"methods.direct.seeds=\[9\] are not among seeds"),
        ("methods.direct.domains=[law]", "methods.direct.domains=law: one of words"),
        ("methods.wise.sweep.a=[1]", "methods.wise.sweep has no effect"),
        ("methods.direct.sweep.weight_decay=[0,1]", "methods.wise.of=direct: .* has a sweep"),
        ("reference=nobody", "reference=nobody: .*one of direct, daa"),
        ("tune_seed=9", "tune_seed=9 is not among seeds"),
        ("train.learning_rate=1", "train.learning_rate=1: daa compare sets learning_rate itself"),
        ("train.max_samples=5", "train.max_samples=5: daa compare sets max_samples itself"),
        ("curves.steps=5", "curves.sets is missing"),
        ("curves={steps: 5, sets: [endings]}", "curves.sets=endings: a score set of kind loss"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        experiment(tmp_path, override)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general": [{"name": "a", "kind": "loss", "path": "x"}]}, "general has losses alone"),
        ({"general": [{"name": "words", "kind": "choice"}]}, "the name words is given twice"),
        ({"general": [{"name": "a", "kind": "guess"}]}, "general.0.kind='guess'"),
    ],
)
def test_score_sets_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        experiment(tmp_path, **changes)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_experiment(tmp_path / "nothing.yaml")
    path = tmp_path / "x.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_experiment(path)
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="holds no mapping"):
        read_experiment(path)
    with pytest.raises(ValueError, match="word is not key=value"):
        experiment(tmp_path, "word")


def test_keys_that_the_host_does_not_know_are_found_at_the_start() -> None:
    refuse_unknown_keys({"train": {"cutoff_len": 1, "use_talr_loss": True, "daa_k0": 1.0}})
    with pytest.raises(ValueError, match=r"train.cutof_len=1: .*Did you mean cutoff_len"):
        refuse_unknown_keys({"train": {"cutof_len": 1}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchor": {"dataset": "nothing"}}, "dataset=nothing is not in .*one of domain"),
        ({"dataset_dir": "nowhere"}, "nowhere"),
        ({"methods": {"direct": {"learning_rate": 1e-4, "keys": {"lr": 1}}}},
         "methods.direct.keys.lr"),
        ({"general": [{"name": "a", "kind": "choice", "path": "none.jsonl"}]}, "none.jsonl"),
        ({"general": [{"name": "a", "kind": "choice", "path": "choice.jsonl", "metric": "f1"}]},
         "metric"),
        ({"methods": {"direct": {"learning_rate": 1e-4},
                      "a b": {"kind": "lora", "learning_rate": 1},
                      "a_b": {"kind": "dora", "learning_rate": 1}}},
         "methods a b and a_b would both write to the folder a_b"),
    ],
)  # fmt: skip
def test_data_and_folders_are_checked_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    settings = experiment(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        prepare(settings)


def test_a_good_experiment_can_be_prepared(tmp_path: Path) -> None:
    assert prepare(experiment(tmp_path)).results() == []


def test_a_data_set_whose_file_is_missing(tmp_path: Path) -> None:
    settings = experiment(tmp_path)
    (tmp_path / "data" / "domain.jsonl").unlink()
    with pytest.raises(ValueError, match=r"dataset=domain: .*domain.jsonl does not exist"):
        Planner(settings, tmp_path)


def test_hub_data_need_a_number_of_rows(tmp_path: Path) -> None:
    settings = experiment(tmp_path)
    info = tmp_path / "data" / "dataset_info.json"
    entries = json.loads(info.read_text()) | {"domain": {"hf_hub_url": "someone/something"}}
    info.write_text(json.dumps(entries))
    planner = Planner(settings, tmp_path)
    assert planner.data.entries["words"] == {"hf_hub_url": "someone/something", "num_samples": 16}
    unlimited = settings.domains["words"].model_copy(update={"max_samples": None})
    settings = settings.model_copy(update={"domains": {"words": unlimited}})
    with pytest.raises(ValueError, match=r"domains.words.max_samples is not set"):
        Planner(settings, tmp_path)


def test_shares_of_general_data_are_exact(tmp_path: Path) -> None:
    methods = {
        "direct": {"learning_rate": 1e-4},
        **{name: {"learning_rate": 1e-4} for name in ("replay_10", "mix_1_3")},
    }
    planner = Planner(experiment(tmp_path, methods=methods), tmp_path / "out")
    assert planner.data.entries["words"]["num_samples"] == 16
    assert planner.data.entries["words_general_2"]["num_samples"] == 2
    assert planner.data.entries["words_general_48"]["num_samples"] == 48
    yamls = {run.row: run.yaml for run in planner.grid()}
    assert yamls["direct"]["dataset"] == "words"
    assert yamls["replay_10"]["dataset"] == "words,words_general_2"
    assert yamls["mix_1_3"]["mix_strategy"] == "concat"


def test_sweeps_make_rows_and_anchors(tmp_path: Path) -> None:
    methods = {
        "direct": {"learning_rate": 1e-4},
        "daa": {"learning_rate": 1e-4, "sweep": {"daa_k0": [1, 2], "anchor.max_samples": [8]}},
    }
    planner = Planner(experiment(tmp_path, methods=methods), tmp_path / "out")
    runs = {run.row: run for run in planner.grid()}
    assert [runs[f"daa daa_k0={k}"].yaml["daa_k0"] for k in (1, 2)] == [1, 2]
    small = runs["daa anchor.max_samples=8"]
    assert small.anchor == "anchors/general_8"
    assert small.yaml["daa_anchor"] == str(tmp_path / "out" / "anchors" / "general_8")
    anchors = [run.id for run in planner.first() if run.task == "anchor"]
    assert anchors == ["anchors/general_16", "anchors/general_8"]


def test_presets_are_of_known_kinds() -> None:
    assert {preset["kind"] for preset in PRESETS.values()} == set(KINDS)
    assert len({slug(name) for name in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_experiments_are_read(path: Path) -> None:
    settings = read_experiment(path)
    refuse_unknown_keys(dict(settings.yaml_keys()))
