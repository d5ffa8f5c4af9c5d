"""Log-likelihoods and losses against plain loops, and the tokens that they are taken of."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from scored import TOLERANCE, alone
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from daa_ext.compare.encoding import Encoder, split
from daa_ext.compare.likelihood import (
    IGNORE,
    Question,
    Text,
    answer_scores,
    batches,
    fit,
    text_losses,
)
from daa_ext.compare.rows import Row


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def windowed() -> Any:
    """A model whose attention reaches 8 tokens back: padding must not eat of that reach."""
    torch.manual_seed(1)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        )
    ).eval()  # fmt: skip


def draw_questions(count: int, seed: int = 0) -> list[Question]:
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(length)]

    lengths = [1, 1, 2, 7, 13]
    return [
        Question(ids(rng.randint(1, 30)), [ids(rng.choice(lengths)) for _ in range(2 + i % 3)])
        for i in range(count)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("window", [False, True])
def test_answers_score_as_each_alone(model: Any, batch_size: int, window: bool) -> None:
    scored = windowed() if window else model
    questions = draw_questions(11)
    questions.append(Question([5], [[7], [9], [11]]))  # one-token prompt, one-token answers
    done: list[int] = []
    found = answer_scores(scored, questions, batch_size, progress=done.append)
    assert sum(done) == len(questions)
    for question, row in zip(questions, found, strict=True):
        expected = [alone(scored, question.prompt, answer) for answer in question.answers]
        assert row == pytest.approx(expected, abs=TOLERANCE)


def test_a_prompt_matters(model: Any) -> None:
    (first,), (second,) = answer_scores(model, [Question([5], [[7]]), Question([6], [[7]])], 2)
    assert abs(first - second) > 100 * TOLERANCE


def test_many_answers_run_in_parts(model: Any) -> None:
    """More answers than run together at batch size 1; the prompt's cache must survive each part."""
    answers = [[i, i + 1, i + 2] for i in range(3, 14)]
    (found,) = answer_scores(model, [Question([5, 8, 13], answers)], 1)
    expected = [alone(model, [5, 8, 13], answer) for answer in answers]
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_losses_are_those_of_each_text_alone(model: Any, batch_size: int) -> None:
    rng = random.Random(0)
    texts = []
    for i in range(9):
        tokens = [rng.randrange(3, 250) for _ in range(rng.randint(2, 40))]
        start = 1 if i % 2 else len(tokens) // 2
        texts.append(Text(tokens, [IGNORE] * start + tokens[start:]))
    texts.append(Text([4, 5, 6, 7], [IGNORE, 5, IGNORE, 7]))
    found = text_losses(model, texts, batch_size)
    for text, loss in zip(texts, found, strict=True):
        ids, labels = torch.tensor([text.tokens]), torch.tensor([text.targets])
        with torch.no_grad():
            mean = float(model(ids, labels=labels).loss)
        assert loss == pytest.approx(mean * text.scored, rel=1e-5)


def test_batches_hold_everything_once_in_an_order_of_the_seed() -> None:
    lengths = [random.Random(i).randrange(100) for i in range(75)]
    first, again, other = (list(batches(lengths, 4, seed)) for seed in (0, 0, 1))
    assert first == again
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}
    assert sorted(i for batch in other for i in batch) == list(range(75))
    assert max(map(len, first)) == 4
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first]
    assert sum(spread) / len(spread) < 20, "batches are of similar length"


def test_bf16_and_another_order_move_a_score_little(model: Any) -> None:
    questions = draw_questions(9)
    exact = torch.tensor([s for row in answer_scores(model, questions, 3) for s in row])
    with torch.autocast("cpu", torch.bfloat16):
        first, other = (
            torch.tensor([s for row in answer_scores(model, questions, size, seed) for s in row])
            for size, seed in ((3, 0), (4, 1))
        )
    assert not torch.equal(first, exact)
    torch.testing.assert_close(first, exact, rtol=0.01, atol=0.05)
    torch.testing.assert_close(other, first, rtol=0.01, atol=0.05)


# rows to tokens


def test_a_long_prompt_is_cut_from_the_left_for_all_answers() -> None:
    question = Question(list(range(10)), [[50], [51, 52, 53]])
    assert fit(question, 8) == Question([5, 6, 7, 8, 9], question.answers)
    assert fit(question, 13) == fit(question, 99) == question
    assert fit(question, 4).prompt == [9]
    with pytest.raises(ValueError, match=r"3 tokens and cutoff_len=3: .* Raise cutoff_len"):
        fit(question, 3)


def test_what_the_tokenizer_merges_belongs_to_the_answer() -> None:
    assert split([1, 2, 3], [[1, 2, 3, 4], [1, 2, 3, 5, 6]]) == Question([1, 2, 3], [[4], [5, 6]])
    assert split([1, 2, 3], [[1, 2, 9], [1, 2, 3, 5]]) == Question([1, 2], [[9], [3, 5]])
    # The first choice is a part of the second: one token must remain for it.
    assert split([1, 2], [[1, 2], [1, 2, 3]]) == Question([1], [[2], [2, 3]])
    # What all answers begin with is part of each of them.
    assert split([1], [[1, 7, 2], [1, 7, 3]]) == Question([1], [[7, 2], [7, 3]])


def row(**content: Any) -> Row:
    return Row("score set 'x', x.jsonl line 1", content)


def test_choices_are_the_tokens_of_the_whole_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoder = Encoder(tokenizer, "default", 64)
    asked = row(question="the river", choices=["falls", "grows early"], answer=0, style="cont")
    question = encoder.choice(asked)
    for choice, answer in zip(asked.content["choices"], question.answers, strict=True):
        assert question.prompt + answer == tokenizer(f"the river {choice}")["input_ids"]
    asked.content["style"] = "qa"
    with_answer = encoder.choice(asked)
    assert tokenizer.decode(with_answer.prompt).endswith("the river\nAnswer:")
    assert with_answer.answers == question.answers


def test_rows_are_encoded_as_in_training(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The host's own data set, with a cutoff that cuts some of its rows."""
    cutoff = 105
    arguments = {
        "model_name_or_path": str(tiny_model), "template": "llama3", "stage": "sft",
        "do_train": True, "finetuning_type": "full", "dataset": "general", "use_cpu": True,
        "dataset_dir": str(tiny_data), "cutoff_len": cutoff, "output_dir": str(tmp_path / "out"),
        "report_to": "none",
    }  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    dataset = get_dataset(
        template, model_args, data_args, training_args, "sft", tokenizer=tokenizer
    )["train_dataset"]
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), "llama3", cutoff)
    whole = Encoder(AutoTokenizer.from_pretrained(tiny_model), "llama3", 1000)
    lines = [json.loads(line) for line in (tiny_data / "general.jsonl").read_text().splitlines()]
    cut = 0
    for line, expected in zip(lines, dataset, strict=True):
        text = encoder.text(row(**line))
        assert (text.tokens, text.targets) == (expected["input_ids"], expected["labels"])
        question = whole.labelled(row(**line), [line["output"]])
        uncut = question.prompt + question.answers[0]
        cut += uncut != expected["input_ids"]
        if uncut == expected["input_ids"]:
            targets = [IGNORE] * len(question.prompt) + question.answers[0]
            assert targets == expected["labels"]
    assert 0 < cut < len(lines), "both cases are met"


def test_a_plain_text_is_scored_but_for_its_first_token(tiny_model: Path) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), "default", 5)
    text = encoder.text(row(text="the market river model teacher apple engine"))
    assert len(text.tokens) == 5
    assert text.targets == [IGNORE, *text.tokens[1:]]
    assert text.scored == 4
    with pytest.raises(ValueError, match=r"x.jsonl line 1: cutoff_len=5 leaves no token to score"):
        encoder.text(row(text="t"))


def test_unknown_template() -> None:
    with pytest.raises(ValueError, match=r"template='llama33' is not .* near it: llama3"):
        Encoder(make_tokenizer(), "llama33", 64)
