"""The rows of a score set's file, each checked, with its place for errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STYLES = ("cont", "qa")
MAX_LABELS = 100  # found in a file; more are free answers rather than labels


class Row(NamedTuple):
    """One line of a file; `place` names set, file and line."""

    place: str
    content: dict[str, Any]


def read_rows(name: str, kind: str, path: str) -> list[Row]:
    """All rows of the jsonl file of set `name`, valid for its kind (labels, choice or loss).

    Raises:
        ValueError: names set, file, line and key, and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"score set {name!r}: path={path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"score set {name!r}: path={path} is not UTF-8: {error}.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 as well
        if line.strip():
            rows.append(_row(f"score set {name!r}, {path} line {number}", line))
            _CHECKS[kind](rows[-1])
    if not rows:
        raise ValueError(f"score set {name!r}: path={path} has no rows.")
    return rows


def labels_of(name: str, rows: list[Row], labels: list[str] | None) -> list[str]:
    """The closed label set: `labels`, or the distinct outputs of all rows, sorted.

    Raises:
        ValueError: an output is not among `labels`; the outputs are not a set of labels.
    """
    if labels is None:
        found = sorted({row.content["output"] for row in rows})
        if not 2 <= len(found) <= MAX_LABELS:
            raise ValueError(
                f"score set {name!r}: the file has {len(found)} distinct outputs; as labels there "
                f"must be 2 to {MAX_LABELS}. Name them in labels, or use kind: loss."
            )
        return found
    for row in rows:
        if row.content["output"] not in labels:
            raise ValueError(
                f"{row.place}: output={row.content['output']!r} is not among "
                f"labels={labels!r}. Add it, or correct the row."
            )
    return labels


def choice_prompt(row: Row) -> str:
    """The text that a space and a choice follow."""
    return row.content["question"] + ("\nAnswer:" if row.content["style"] == "qa" else "")


def _row(place: str, line: str) -> Row:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}. One object on each line.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place} is not a JSON object: {line[:60]!r}.")
    return Row(place, content)


def _value(row: Row, key: str) -> Any:
    if key not in row.content:
        raise ValueError(f"{row.place}: the key {key} is missing; found: {', '.join(row.content)}.")
    return row.content[key]


def _text(row: Row, key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{row.place}: {key}={value!r} must be a text that is not empty.")
    return value


def _check_alpaca(row: Row) -> None:
    for key in ("instruction", "input"):
        value = row.content.get(key) if key == "input" else _value(row, key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{row.place}: {key}={value!r} must be a text.")
    if not (row.content["instruction"] or row.content.get("input")):
        raise ValueError(f"{row.place}: instruction and input are both empty.")
    _text(row, "output")


def _check_choice(row: Row) -> None:
    _text(row, "question")
    choices, answer, style = (_value(row, key) for key in ("choices", "answer", "style"))
    texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not texts or len(choices) < 2:
        raise ValueError(
            f"{row.place}: choices={choices!r} must be a list of two or more texts, none empty."
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"{row.place}: answer={answer!r} must be the position of the right choice, 0 to "
            f"{len(choices) - 1}."
        )
    if style not in STYLES:
        raise ValueError(f"{row.place}: style={style!r} must be one of {', '.join(STYLES)}.")


def _check_loss(row: Row) -> None:
    if "text" in row.content:
        _text(row, "text")
    elif "choices" in row.content:
        _check_choice(row)
    else:
        _check_alpaca(row)


_CHECKS: dict[str, Callable[[Row], None]] = {
    "labels": _check_alpaca,
    "choice": _check_choice,
    "loss": _check_loss,
}
