"""lm-evaluation-harness offline: its tasks and ours on small files of the same columns."""

import importlib.util
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from tiny import WORDS, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from daa_ext.compare import harness, score
from daa_ext.compare.encoding import split
from daa_ext.compare.likelihood import answer_scores
from daa_ext.compare.scoring import check
from daa_ext.tasks import documents

pytest.importorskip("lm_eval")
CHOICE = "\u5355\u9879\u9009\u62e9\u9898"  # CMB-Exam: one right option


def sentence(i: int) -> str:
    return " ".join(random.Random(i).choices(WORDS, k=5))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "finance_fpb": lambda i: {"sentence": sentence(i), "label": i % 3},
    "finance_fiqa_sa": lambda i: {
        "sentence": sentence(i), "sentiment_score": (-0.5, 0.0, 0.1)[i % 3],
        "format": ("post", "headline")[i % 2],
    },
    "finance_tfns": lambda i: {"text": sentence(i), "label": i % 3},
    "finance_nwgi": lambda i: {
        "news": sentence(i),
        "label": ("moderately negative", "mildly positive", "strong positive")[i % 3],
    },
    "cmb_exam": lambda i: {
        "question": sentence(i), "question_type": CHOICE if i % 4 else "several",
        "answer": "AC"[i % 2] if i % 4 else "AC",
        "option": {"A": "river", "B": " ", "C": sentence(i + 1), "D": None},
    },
    "lawbench_1_2": lambda i: {
        "instruction": "Choose. [mark] as in [mark]A<eoa>.",
        "question": f"{sentence(i)}A:river;B\uff1aengine",
        "answer": f"it is: {'AB'[i % 2]}\u3002",
    },
    "lawbench_2_4": lambda i: {
        "instruction": "\u7c7b\u522b\u5305\u62ec:river\u3001bridge\u3002Write it after [class].",
        "question": sentence(i),
        "answer": ("river", "of class\uff1abridge\u3002")[i % 2],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model with room for what gsm8k generates, and its tokenizer."""
    folder = make_model(tmp_path_factory.mktemp("harness"))
    model = AutoModelForCausalLM.from_pretrained(folder, max_position_embeddings=1024)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("task", sorted(ROWS))
def test_our_tasks_read_files_of_the_same_columns(
    loaded: tuple[Any, Any], tmp_path: Path, task: str
) -> None:
    path = write(tmp_path / "rows.jsonl", [ROWS[task](i) for i in range(16)])
    harness.check("mine", task, path, "acc")
    found = harness.evaluate(*loaded, task, dataset_path=path, batch_size=4)
    sentiment = not task.startswith(("cmb", "law"))
    assert list(found.metrics) == (["f1", "acc"] if sentiment else ["acc"])
    expected = {"finance_fpb": 4, "finance_fiqa_sa": 4, "cmb_exam": 12}  # a part; one right answer
    assert found.n == len(found.items) == expected.get(task, 16)
    correct = [item["correct"] for item in found.items]
    assert sum(correct) / len(correct) == pytest.approx(found.metrics["acc"])


def test_a_task_scores_as_a_plain_reading_of_it(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """TFNS by our own log-likelihoods: the same prompt, the summed scores of the three words."""
    model, tokenizer = loaded
    rows = [ROWS["finance_tfns"](i) for i in range(24)]
    questions = []
    for row in rows:
        prompt = (
            "Instruction: What is the sentiment of this tweet? Please choose an answer from "
            f"{{negative/neutral/positive}}.\nInput: {row['text']}\nAnswer:"
        )
        texts = [f"{prompt} {word}" for word in ("negative", "positive", "neutral")]
        alone, *whole = tokenizer([prompt, *texts])["input_ids"]
        questions.append(split(alone, whole))
    scores = torch.tensor(answer_scores(model, questions, 8))
    truths, found = [row["label"] for row in rows], scores.argmax(1).tolist()
    path = write(tmp_path / "rows.jsonl", rows)
    given = harness.evaluate(model, tokenizer, "finance_tfns", dataset_path=path)
    assert [bool(item["correct"]) for item in given.items] == [
        a == b for a, b in zip(truths, found, strict=True)
    ]
    expected = f1_score(truths, found, average="weighted", zero_division=0)
    assert given.metrics["f1"] == pytest.approx(expected)
    half = harness.evaluate(model, tokenizer, "finance_tfns", dataset_path=path, limit=12)
    assert half.items == given.items[:12]


def test_a_task_of_the_harness_that_generates(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """gsm8k takes examples from another split: a folder holds both."""
    rows = [{"question": sentence(i), "answer": f"so #### {i}"} for i in range(4)]
    for name in ("train", "test"):
        write(tmp_path / "gsm" / f"{name}.jsonl", rows)
    folder = str(tmp_path / "gsm")
    found = harness.evaluate(*loaded, "gsm8k", dataset_path=folder, num_fewshot=1, limit=2)
    assert found.metrics == {
        "exact_match": 0.0, "exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.0,
    }  # fmt: skip
    assert found.items == [{"correct": 0.0}] * 2
    assert found.n == 2


def test_a_group_is_the_mean_of_its_tasks(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LawBench with files in the place of its addresses, of several lengths."""
    folder = tmp_path / "tasks"
    shutil.copytree(harness.TASKS, folder)
    for count, path in enumerate(sorted(folder.glob("lawbench_*.yaml")), 3):
        rows = [ROWS["lawbench_1_2"](i * count) for i in range(count)]
        data = write(tmp_path / "data" / f"{path.stem}.jsonl", rows)
        path.write_text(re.sub(r"https://\S+", data, path.read_text()))
    monkeypatch.setattr(harness, "TASKS", folder)
    harness._manager.cache_clear()
    try:
        found = harness.evaluate(*loaded, "lawbench")
        single = [harness.evaluate(*loaded, path.stem) for path in folder.glob("lawbench_*.yaml")]
    finally:
        harness._manager.cache_clear()
    means = [each.metrics["acc"] for each in single]
    assert len(means) == 5
    assert found.metrics == {"acc": pytest.approx(sum(means) / 5)}
    assert found.n == len(found.items) == sum(range(3, 8))


def test_the_documents_of_our_tasks() -> None:
    make = documents._cmb_exam
    assert make(ROWS["cmb_exam"](1)) == {
        "text": f"{sentence(1)}\nA. river\nC. {sentence(2)}", "letters": ["A", "C"], "gold": 1,
    }  # fmt: skip
    made = documents._lawbench(ROWS["lawbench_1_2"](1))
    assert made["text"].endswith("engine\n[mark]")
    assert (made["choices"], made["gold"]) == (["A", "B"], 1)
    made = documents._lawbench(ROWS["lawbench_2_4"](1))
    assert made["text"].endswith("\n[class]")
    assert (made["choices"], made["gold"]) == (["river", "bridge"], 1)
    assert documents._lawbench(ROWS["lawbench_2_4"](0))["gold"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": None}, "kind=harness needs task"),
        ({"task": "finance_fbp"}, r"task='finance_fbp' is not a task .*; near it: .*finance_fpb"),
        (
            {"metric": "exact_match"},
            r"metric='exact_match' is not one of task finance_fpb: one of f1, acc",
        ),
        ({"dataset_path": "gone.jsonl"}, r"dataset_path=gone.jsonl does not exist"),
        ({"path": "x.jsonl"}, r"path='x.jsonl' has no effect with kind=harness"),
        ({"limit": 0}, r"limit=0 must be an integer, 1 or more"),
        ({"num_fewshot": 0.5}, r"num_fewshot=0.5 must be an integer, 0 or more"),
    ],
)
def test_bad_sets_are_named(changes: dict[str, Any], words: str) -> None:
    good = {"name": "mine", "kind": "harness", "task": "finance_fpb", "metric": "acc"}
    check([good, {"name": "group", "kind": "harness", "task": "lawbench"}])
    with pytest.raises(ValueError, match=f"score set 'mine'.*{words}"):
        check([good | changes])


def test_a_file_cannot_stand_for_several_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"question": "a", "answer": "b"}])
    for task, why in (("gsm8k", "reads test, train"), ("lawbench", "a group of tasks")):
        with pytest.raises(ValueError, match=f"one file cannot replace the data, .*{why}.*folder"):
            harness.check("mine", task, path, None)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'daa_ext\[eval\]'"):
        check([{"name": "mine", "kind": "harness", "task": "hellaswag"}])


def test_a_metric_that_the_task_does_not_give(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [ROWS["finance_tfns"](i) for i in range(3)])
    with pytest.raises(ValueError, match=r"task=finance_tfns: it gives no metric 'mcc'; found: "):
        harness.evaluate(*loaded, "finance_tfns", dataset_path=path, metric="mcc")


@pytest.mark.parametrize("large", [False, True])
def test_a_job_with_the_harness(tmp_path: Path, large: bool) -> None:
    """A set in the whole process; with weights that are NaN, or so large that the scores are."""
    folder = make_model(tmp_path / "model")
    path = write(tmp_path / "rows.jsonl", [ROWS["finance_tfns"](i) for i in range(6)])
    task = {"name": "tfns", "kind": "harness", "task": "finance_tfns", "dataset_path": path}
    content = {
        "model": str(folder), "template": "default", "device": "cpu",
        "sets": [task, task | {"name": "b", "metric": "acc"}], "out": str(tmp_path / "out.json"),
    }  # fmt: skip

    def run() -> dict[str, Any]:
        (tmp_path / "job.json").write_text(json.dumps(content))
        assert score.main([str(tmp_path / "job.json")]) == 0
        written = json.loads((tmp_path / "out.json").read_text())
        assert written["versions"]["lm_eval"]
        return written["sets"]

    found = run()
    assert {name: each["metric"] for name, each in found.items()} == {"tfns": "f1", "b": "acc"}
    assert found["tfns"]["n"] == 6
    assert "diverged" not in found["tfns"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.model.norm.weight, 3e38 if large else float("nan"))
    model.save_pretrained(folder)
    found = run()
    assert found["tfns"]["diverged"]
    assert found["tfns"]["metrics"] == {"f1": None, "acc": None}
