"""What the task files need beyond templates: parts, fields and a metric.

lm-evaluation-harness loads this module by its path (`!function documents.x` in the task files).
"""

import re
from collections.abc import Sequence
from typing import Any

SINGLE_CHOICE = "\u5355\u9879\u9009\u62e9\u9898"  # question_type of CMB-Exam: one right option
CATEGORIES = "\u7c7b\u522b\u5305\u62ec"  # LawBench: "the categories are", a list follows
STOP, COLON, COMMA = "\u3002", "\uff1a", "\u3001"  # Chinese full stop, colon, list comma


def fpb_part(docs: Any) -> Any:
    """The quarter of the Financial PhraseBank that FinGPT tests on."""
    return docs.train_test_split(seed=42)["test"]


def fiqa_part(docs: Any) -> Any:
    """The part of FiQA-SA that FinGPT tests on, of its three splits one after another."""
    return docs.train_test_split(0.226, seed=42)["test"]


def weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of (truth, found) pairs, classes weighted by their truths."""
    from sklearn.metrics import f1_score

    truths, found = zip(*pairs, strict=True)
    return float(f1_score(truths, found, average="weighted", zero_division=0.0))


def cmb_exam(docs: Any) -> Any:
    """Questions of CMB-Exam with one right option: `text`, `letters`, `gold`."""
    single = docs.filter(lambda doc: doc["question_type"] == SINGLE_CHOICE)
    return single.map(_cmb_exam, remove_columns=single.column_names)


def lawbench(docs: Any) -> Any:
    """Rows of LawBench with one right answer: `text` up to the answer, `choices`, `gold`."""
    return docs.map(_lawbench, remove_columns=docs.column_names)


def _cmb_exam(doc: dict[str, Any]) -> dict[str, Any]:
    options = {key: text for key, text in sorted(doc["option"].items()) if text and text.strip()}
    lines = [doc["question"], *(f"{key}. {text}" for key, text in options.items())]
    letters = list(options)
    return {"text": "\n".join(lines), "letters": letters, "gold": letters.index(doc["answer"])}


def _lawbench(doc: dict[str, Any]) -> dict[str, Any]:
    """The instruction asks for the answer after a mark in brackets, so there it is scored."""
    instruction, question, answer = doc["instruction"], doc["question"], doc["answer"]
    mark = re.search(r"\[[^]]+]", instruction)
    assert mark is not None, instruction
    if CATEGORIES in instruction:
        named = re.split(f"{CATEGORIES}[:{COLON}]", instruction)[1].partition(STOP)[0]
        choices = named.split(COMMA)
        truth = answer.rpartition(COLON)[2].removesuffix(STOP)
    else:
        choices = sorted(set(re.findall(f"([A-E])[:{COLON}]", question)))
        truth = re.findall("[A-E]", answer)[0]
    text = f"{instruction}\n{question}\n{mark[0]}"
    return {"text": text, "choices": choices, "gold": choices.index(truth)}
