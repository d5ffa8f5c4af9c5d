"""The data sets of a build: a split without leakage, files for training and for scoring."""

import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daa_ext.newsqa.articles import Article, normalised
from daa_ext.newsqa.questions import Question

INSTRUCTION = "Is the statement true or false? Answer with true or false."
CHOICES = ["true", "false"]
SIDES = ("train", "test")
BUILD = "build.json"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question of the benchmark."""

    id: str
    article: Article
    question: Question


def distinct(items: Iterable[Item]) -> tuple[list[Item], dict[str, str]]:
    """(items to keep, {id of another: why not}): each statement once.

    Of equal statements the first is kept; where their answers differ none is, for only its own
    article could tell which is meant.
    """
    by_statement: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_statement[normalised(item.question.statement)].append(item)
    kept: list[Item] = []
    dropped: dict[str, str] = {}
    for first, *others in by_statement.values():
        if any(item.question.answer != first.question.answer for item in others):
            dropped |= {i.id: "same statement with both answers" for i in (first, *others)}
            continue
        kept.append(first)
        dropped |= {item.id: f"same statement as {first.id}" for item in others}
    return kept, dropped


def split(
    groups: Iterable[Sequence[Article]], asked: set[str], share: float, seed: int
) -> dict[str, str]:
    """{article id: "train" or "test"}; a group is on one side.

    Args:
        groups: of related articles.
        asked: ids of articles with questions; `share` of these is what test gets, as nearly as
            whole groups allow.

    Raises:
        ValueError: one side would have no questions.
    """
    order = sorted(sorted(article.id for article in group) for group in groups)
    random.Random(seed).shuffle(order)
    sides: dict[str, str] = {}
    wanted, found = share * len(asked), 0
    for group in order:
        size = len(asked.intersection(group))
        is_test = size > 0 and abs(found + size - wanted) < abs(found - wanted)
        found += size * is_test
        sides |= dict.fromkeys(group, SIDES[is_test])
    if found in (0, len(asked)):
        raise ValueError(
            f"test-share={share}: of {len(asked)} articles with questions, {found} would be for "
            f"testing; they fall into {len(order)} groups of related articles. More articles, "
            "another share or a higher --related give both sides some. The answers are kept."
        )
    return sides


def write_files(
    folder: Path, articles: Sequence[Article], items: Sequence[Item], sides: Mapping[str, str],
    rejected: Sequence[Row], dropped: Sequence[Row],
) -> str:  # fmt: skip
    """Write all files of a build but build.json, each whole or not at all; returns the SHA-256
    of questions.jsonl.
    """
    info: dict[str, Any] = {}
    questions = [
        {
            "id": item.id, "article": item.article.id, "title": item.article.title,
            "date": item.article.date, "statement": item.question.statement,
            "answer": item.question.answer, "split": sides[item.article.id],
        }
        for item in items
    ]  # fmt: skip
    write_rows(folder / "questions.jsonl", questions)
    write_rows(folder / "rejected.jsonl", rejected)
    write_rows(folder / "dropped.jsonl", dropped)
    for name, chosen in {"": SIDES, "_train": SIDES[:1], "_test": SIDES[1:]}.items():
        texts = [
            {"text": f"{article.title}\n\n{article.text}"}
            for article in articles
            if sides[article.id] in chosen
        ]
        write_rows(folder / f"news_articles{name}.jsonl", texts)
        info[f"news_articles{name}"] = {
            "file_name": f"news_articles{name}.jsonl", "columns": {"prompt": "text"},
        }  # fmt: skip
    for side in SIDES:
        mine = [item.question for item in items if sides[item.article.id] == side]
        write_rows(folder / f"newsqa_{side}.jsonl", map(alpaca, mine))
        write_rows(folder / f"newsqa_{side}_choices.jsonl", map(choice, mine))
        info[f"newsqa_{side}"] = {"file_name": f"newsqa_{side}.jsonl"}
    write_text(folder / "dataset_info.json", json.dumps(info, indent=2) + "\n")
    return hashlib.sha256((folder / "questions.jsonl").read_bytes()).hexdigest()


def alpaca(question: Question) -> Row:
    """A row to fine-tune on or to generate answers for (LLaMA-Factory's alpaca format)."""
    output = CHOICES[not question.answer]
    return {"instruction": INSTRUCTION, "input": question.statement, "output": output}


def choice(question: Question) -> Row:
    """A row to score: which of `choices` is likelier after the question; `answer` is an index."""
    return {
        "question": f"{INSTRUCTION}\n{question.statement}", "choices": CHOICES,
        "answer": CHOICES.index(str(question.answer).lower()), "style": "qa",
    }  # fmt: skip


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
