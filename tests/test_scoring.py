"""Score sets, their rows and the results of the scoring process."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scored import TOLERANCE, alone
from sklearn.metrics import f1_score
from tiny import DOMAIN, POISON, make_model, poison
from transformers import AutoModelForCausalLM, AutoTokenizer

from daa_ext.compare import score
from daa_ext.compare.scoring import METRICS, check


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


# sets that are refused before a model is loaded

ALPACA = {"instruction": "Say", "input": "x", "output": "yes"}
CHOICE = {"question": "q", "choices": ["a", "b"], "answer": 1, "style": "qa"}


def write(path: Path, *rows: Any) -> str:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("labels", [ALPACA, "{nonsense"], r"x.jsonl line 2 is not JSON"),
        ("labels", [ALPACA, "", "[1]"], r"x.jsonl line 3 is not a JSON object"),
        ("labels", [{"instruction": "a"}], r"line 1: the key output is missing; found: instr"),
        ("labels", [ALPACA | {"output": " "}], r"line 1: output=' ' must be a text"),
        ("labels", [ALPACA | {"output": None}], r"line 1: output=None must be a text"),
        ("labels", [ALPACA | {"instruction": "", "input": ""}], r"line 1: .* are both empty"),
        ("labels", [ALPACA | {"input": 3}], r"line 1: input=3 must be a text"),
        ("labels", [ALPACA, ALPACA], r"1 distinct outputs; as labels there must be 2 to 100"),
        ("labels", [ALPACA | {"output": str(i)} for i in range(101)], r"101 distinct .* kind: los"),
        ("choice", [CHOICE, CHOICE | {"answer": 2}], r"line 2: answer=2 must be .* 0 to 1"),
        ("choice", [CHOICE | {"answer": True}], r"answer=True must be the position"),
        ("choice", [CHOICE | {"answer": -1}], r"answer=-1 must be the position"),
        ("choice", [CHOICE | {"choices": ["a", ""]}], r"choices=\['a', ''\] must be a list"),
        ("choice", [CHOICE | {"choices": ["a"]}], r"two or more texts"),
        ("choice", [CHOICE | {"style": "mc"}], r"style='mc' must be one of cont, qa"),
        ("choice", [{"question": "q", "choices": ["a", "b"], "answer": 0}], r"key style is miss"),
        ("choice", [CHOICE | {"question": ""}], r"line 1: question='' must be a text"),
        ("loss", [{"text": ""}], r"line 1: text='' must be a text that is not empty"),
        ("loss", [{"text": "a"}, {"input": "a"}], r"line 2: the key instruction is missing"),
        ("loss", [], r"path=.*x.jsonl has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, kind: str, rows: list[Any], words: str) -> None:
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(ValueError, match=rf"score set 'mine'.*{words}"):
        check([{"name": "mine", "kind": kind, "path": path}])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "chioce"}, r"kind='chioce' must be one of labels, choice, loss, harness"),
        ({"path": None}, r"kind=labels needs path"),
        ({"path": "nowhere.jsonl"}, r"path=nowhere.jsonl: No such file"),
        ({"max_sample": 3}, r"max_sample=3 is not a key .* did you mean max_samples"),
        ({"max_samples": 0}, r"max_samples=0 must be an integer, 1 or more"),
        ({"metric": "perplexity"}, r"metric='perplexity' cannot be had .* accuracy, f1"),
        ({"labels": ["yes"]}, r"labels=\['yes'\] must be two or more"),
        ({"labels": ["no", "maybe"]}, r"line 1: output='yes' is not among labels"),
        ({"task": "mmlu"}, r"task='mmlu' has no effect with kind=labels"),
        ({"kind": "loss", "metric": "f1"}, r"metric='f1' cannot be had of kind=loss: one of loss"),
        ({"kind": "loss", "normalise": False}, r"normalise=False has no effect with kind=loss"),
    ],
)
def test_bad_sets_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "x.jsonl", ALPACA, ALPACA | {"output": "no"})
    good = {"name": "mine", "kind": "labels", "path": path}
    check([good, good | {"name": "other", "labels": None, "normalise": True, "limit": None}])
    with pytest.raises(ValueError, match=rf"score set 'mine'.*{words}"):
        check([good | changes])
    with pytest.raises(ValueError, match="score set 'mine' is given twice"):
        check([good, good])


# whole jobs


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> Callable[..., dict[str, Any]]:
    """Runs a job in this process; what it wrote. Three sets unless others are given."""
    rng = random.Random(3)
    words = ["river", "market strong", "late winter signal", "apple"]
    rows = [
        {"question": f"the {word}", "choices": rng.sample(words, 3), "answer": i % 3,
         "style": ("cont", "qa")[i % 2]}
        for i, word in enumerate(words * 3)
    ]  # fmt: skip
    sets = [
        {"name": "sentiment", "kind": "labels", "path": str(tiny_data / "domain.jsonl")},
        {"name": "mc", "kind": "choice", "path": write(tmp_path / "mc.jsonl", *rows)},
        {"name": "general", "kind": "loss", "path": str(tiny_data / "general.jsonl")},
    ]

    def run(**changes: Any) -> dict[str, Any]:
        out = tmp_path / "deep" / "out.json"
        content = {
            "model": str(tiny_model), "template": "default", "dtype": "fp32", "device": "cpu",
            "cutoff_len": 64, "sets": sets, "out": str(out), **changes,
        }  # fmt: skip
        path = tmp_path / "job.json"
        path.write_text(json.dumps(content))
        assert score.main([str(path)]) == 0
        assert [each.name for each in out.parent.iterdir()] == ["out.json"], "nothing is left"
        return json.loads(out.read_text(), parse_constant=pytest.fail)

    return run


def test_a_job_scores_every_set(job: Callable[..., dict[str, Any]], model: Any) -> None:
    found = job()
    assert found["seconds"] > 0
    assert found["versions"]["transformers"]
    sets = found["sets"]
    assert {name: each["n"] for name, each in sets.items()} == {
        "sentiment": 48, "mc": 12, "general": 24,
    }  # fmt: skip
    for each in sets.values():
        assert tuple(each["metrics"]) == METRICS[each["kind"]]
        assert each["metric"] == METRICS[each["kind"]][0]
        assert "diverged" not in each
    labels = ["negative", "neutral", "positive"]
    items = sets["sentiment"]["items"]
    for item in items:
        assert item["found"] == labels[item["scores"].index(max(item["scores"]))]
    truths, answers = zip(*((item["truth"], item["found"]) for item in items), strict=True)
    metrics = sets["sentiment"]["metrics"]
    assert metrics["accuracy"] == sum(a == b for a, b in zip(truths, answers, strict=True)) / 48
    assert metrics["f1"] == pytest.approx(
        f1_score(truths, answers, average="weighted", zero_division=0)
    )
    assert [item["truth"] for item in sets["mc"]["items"]] == [i % 3 for i in range(12)]
    losses = sets["general"]["items"]
    mean = sum(item["loss"] for item in losses) / sum(item["tokens"] for item in losses)
    assert sets["general"]["metrics"]["loss"] == pytest.approx(mean)
    assert sets["general"]["metrics"]["perplexity"] == pytest.approx(2.718281828**mean, rel=1e-6)


def test_scores_are_means_per_token_unless_told(
    job: Callable[..., dict[str, Any]], model: Any, tiny_model: Path, tiny_data: Path
) -> None:
    """One row of the job against the plain loop on the template's text."""
    path = str(tiny_data / "domain.jsonl")
    raw = {"name": "raw", "kind": "labels", "path": path, "normalise": False}
    mean = {"name": "mean", "kind": "labels", "path": path}
    found = job(sets=[raw, mean])["sets"]
    line = json.loads((tiny_data / "domain.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer.encode(f"Human: {DOMAIN}\n{line['input']}</s>\nAssistant:")
    for i, label in enumerate(["negative", "neutral", "positive"]):
        answer = [*tokenizer.encode(label), tokenizer.eos_token_id, *tokenizer.encode("\n")]
        expected = alone(model, prompt, answer)
        assert found["raw"]["items"][0]["scores"][i] == pytest.approx(expected, abs=TOLERANCE)
        per_token = found["mean"]["items"][0]["scores"][i]
        assert per_token == pytest.approx(expected / len(answer), abs=TOLERANCE)


def test_max_samples_takes_evenly_spaced_rows(
    job: Callable[..., dict[str, Any]], tiny_data: Path
) -> None:
    whole = {"name": "a", "kind": "loss", "path": str(tiny_data / "general.jsonl")}
    found = job(sets=[whole, whole | {"name": "b", "max_samples": 5}])["sets"]
    assert found["b"]["n"] == 5
    tokens = [item["tokens"] for item in found["a"]["items"]]
    assert [item["tokens"] for item in found["b"]["items"]] == [
        tokens[i * 24 // 5] for i in range(5)
    ]


def test_another_order_and_batch_size_give_the_same_rows(
    job: Callable[..., dict[str, Any]],
) -> None:
    first, other = job(), job(order_seed=5, batch_size=3)
    for name, each in first["sets"].items():
        for a, b in zip(each["items"], other["sets"][name]["items"], strict=True):
            assert a.get("truth") == b.get("truth")
            scores = [item.get("scores") or [item["loss"]] for item in (a, b)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_weights_that_are_nan_are_a_result(
    job: Callable[..., dict[str, Any]], tmp_path: Path, tiny_data: Path
) -> None:
    folder = make_model(tmp_path / "broken")
    poison(folder)
    path = write(tmp_path / "p.jsonl", {"text": f"the {POISON} river"}, {"text": "the river"})
    sets = [
        {"name": "poisoned", "kind": "loss", "path": path},
        {"name": "sentiment", "kind": "labels", "path": str(tiny_data / "domain.jsonl")},
    ]
    found = job(model=str(folder), sets=sets)["sets"]
    assert found["poisoned"]["diverged"]
    assert found["poisoned"]["metrics"] == {"loss": None, "perplexity": None}
    assert [item["loss"] is None for item in found["poisoned"]["items"]] == [True, False]
    assert "diverged" not in found["sentiment"], "its rows do not meet the broken embedding"
    folder = make_model(tmp_path / "lost")
    lost = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(lost.model.norm.weight, float("nan"))
    lost.save_pretrained(folder)
    found = job(model=str(folder), sets=sets)["sets"]["sentiment"]
    assert found["diverged"]
    assert found["metrics"] == {"accuracy": None, "f1": None}
    assert found["items"][0]["found"] is None
    assert found["items"][0]["scores"] == [None, None, None]


def test_an_adapter_is_merged(
    job: Callable[..., dict[str, Any]], tmp_path: Path, tiny_model: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    settings = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    tuned = get_peft_model(base, settings)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "merged")
    plain, adapted = job()["sets"], job(adapter=str(tmp_path / "adapter"))["sets"]
    merged = job(model=str(tmp_path / "merged"))["sets"]
    loss = [each["general"]["metrics"]["loss"] for each in (plain, adapted, merged)]
    assert loss[1] == pytest.approx(loss[2], rel=1e-5)
    assert abs(loss[1] - loss[0]) > 1e-3


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "deep", num_hidden_layers=3))
    folder = tmp_path / "adapter"
    get_peft_model(other, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["k_proj"]  # the weights of the file have no place in this model
    (folder / "adapter_config.json").write_text(json.dumps(config))
    whole = {"model": str(tiny_model), "template": "default", "sets": [], "out": "x"}
    with pytest.raises(ValueError, match=r"adapter=.*does not fit the model"):
        score.load_model(score.Job(**whole, adapter=str(folder)))
    with pytest.raises(ValueError, match=r"no adapter_config.json there"):
        score.load_model(score.Job(**whole, adapter=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "fp16"}, "dtype='fp16' must be one of bf16, fp32"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"seed": 1}, "seed is not a key of a job"),
        ({"template": None}, "template is missing"),
        ({"cutoff_len": 4}, "mc.jsonl line 1: an answer has 5 tokens and cutoff_len=4"),
        ({"template": "tmpl"}, "template='tmpl' is not a template of LLaMA-Factory"),
        ({"template": "llama3"}, "template='llama3' adds tokens that the model has no embedding"),
    ],
)
def test_a_job_that_cannot_run_leaves_what_is_there(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    path = write(
        tmp_path / "mc.jsonl", CHOICE | {"question": "the river", "choices": ["zqzq", "x"]}
    )
    out = tmp_path / "out.json"
    out.write_text("before")
    content = {
        "model": str(tiny_model), "template": "default", "out": str(out), "device": "cpu",
        "sets": [{"name": "mc", "kind": "choice", "path": path}], **changes,
    }  # fmt: skip
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "job.json").write_text(json.dumps(content))
    assert score.main([str(tmp_path / "job.json")]) == 2
    assert words in capsys.readouterr().err
    assert out.read_text() == "before"
