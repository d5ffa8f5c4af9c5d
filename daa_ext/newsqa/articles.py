"""Articles: read from JSON Lines, kept by date, rid of duplicates, related ones tied together."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A word, or one character of a script that is written without spaces (kana, han).
TOKEN = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")
SHINGLE = 5  # consecutive words that are compared as one
SKETCH = 64  # smallest hashes of an article; related articles share one of them all but surely
COMMON = 50  # articles that hold a hash; further ones with it share a phrase of the house
KNOWN = frozenset({"id", "title", "text", "date"})


@dataclass(frozen=True)
class Article:
    id: str
    title: str
    text: str
    date: str | None  # YYYY-MM-DD

    @property
    def digest(self) -> str:
        """Of what a model is shown of it."""
        content = json.dumps([self.title, self.text, self.date])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Duplicate:
    """An article that is left out because `of` says the same."""

    id: str
    of: str
    similarity: float


def read_articles(path: Path) -> list[Article]:
    """The articles of a file of JSON objects, one a line: title, text, optionally date and id.

    Raises:
        ValueError: no such file, no articles in it; a line that is no object, lacks a key or
            holds something else than text in it; a date that is none; an id used twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    articles: dict[str, Article] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        article = _article(line, f"{path}:{number}")
        known = articles.get(article.id)
        if known is not None and known.digest != article.digest:
            raise ValueError(
                f"{path}:{number}: id={article.id} is that of another article in line "
                f"{places[article.id]}. Give each article its own id, or leave the ids out."
            )
        if known is None:
            articles[article.id], places[article.id] = article, number
        else:  # the same line again: an exact duplicate, which `deduplicated` reports
            again = f"{article.id}@{number}"
            articles[again] = Article(again, article.title, article.text, article.date)
    if not articles:
        raise ValueError(
            f'{path}: no articles. One JSON object a line is needed: {{"title": ..., "text": ...}}.'
        )
    return list(articles.values())


def _article(line: str, place: str) -> Article:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not JSON ({error.msg} at column {error.colno}). One JSON object a line is "
            "needed, without commas between the lines."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON object is needed, not {type(row).__name__}.")
    title, text = (_words(row, key, place) for key in ("title", "text"))
    date = row.get("date")
    article = Article(str(row.get("id") or ""), title, text, date and iso_date(date, place))
    return article if article.id else Article(article.digest[:16], title, text, article.date)


def _words(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        what = f"is {value!r}" if key in row else f"is missing (there are {', '.join(row) or '-'})"
        raise ValueError(f"{place}: {key} {what}. Every article needs a title and a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {key} is no Unicode text ({error.reason}).") from error
    return value.strip()


def iso_date(value: Any, place: str) -> str:
    """YYYY-MM-DD of an ISO 8601 date or time.

    Raises:
        ValueError: it is none; names `place`.
    """
    try:
        return datetime.fromisoformat(value).date().isoformat()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: date={value!r}: ISO 8601 is needed, as 2025-01-31.") from error


def by_date(
    articles: Iterable[Article], after: str | None, before: str | None
) -> tuple[list[Article], dict[str, str]]:
    """(articles of `after` <= date < `before`, {id of another: why it is left out})."""
    kept: list[Article] = []
    dropped: dict[str, str] = {}
    for article in articles:
        if not (after or before):
            kept.append(article)
        elif article.date is None:
            dropped[article.id] = "no date"
        elif (after and article.date < after) or (before and article.date >= before):
            dropped[article.id] = f"date {article.date}"
        else:
            kept.append(article)
    return kept, dropped


def normalised(text: str) -> str:
    """Words in lower case, single spaces, no punctuation: equal for what reads the same."""
    return " ".join(TOKEN.findall(text.lower()))


def shingles(text: str) -> NDArray[np.int64]:
    """Sorted hashes of all runs of SHINGLE words; a shorter text is one run."""
    words = normalised(text).split()
    runs = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    hashes = (hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.sort(np.frombuffer(b"".join(hashes), dtype=np.int64))


def jaccard(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Shared shingles over all shingles of two articles."""
    shared = np.intersect1d(a, b, assume_unique=True).size
    return shared / (a.size + b.size - shared)


def deduplicated(
    articles: Sequence[Article], duplicate: float, related: float
) -> tuple[list[Article], list[Duplicate], list[list[Article]]]:
    """(kept, left out, groups of kept ones that are related, directly or through others).

    Of articles whose texts share at least the part `duplicate` of their shingles (`jaccard`), the
    first is kept. From `related` on, two are tied together. Pairs to compare are those that share
    one of their SKETCH smallest hashes, and not only one that COMMON articles have (a closing
    line, say), so the cost grows with the number of articles and not with its square. A pair of
    similarity J is overlooked with probability about (1 - J)^SKETCH.
    """
    kept: list[Article] = []
    hashes: list[NDArray[np.int64]] = []
    duplicates: list[Duplicate] = []
    holders: defaultdict[int, list[int]] = defaultdict(list)  # hash -> kept articles that have it
    leader: list[int] = []  # of union-find over kept articles

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for article in articles:
        mine = shingles(article.text)
        sketch = mine[:SKETCH].tolist()
        others = {i for value in sketch for i in holders[value]}
        similar = {i: jaccard(mine, hashes[i]) for i in sorted(others)}
        best = max(similar, key=lambda i: similar[i], default=-1)
        if similar.get(best, -1.0) >= duplicate:
            duplicates.append(Duplicate(article.id, kept[best].id, round(similar[best], 3)))
            continue
        own = len(kept)
        kept.append(article)
        hashes.append(mine)
        leader.append(own)
        for value in sketch:
            if len(holders[value]) < COMMON:
                holders[value].append(own)
        for other, similarity in similar.items():
            if similarity >= related:
                leader[find(other)] = find(own)
    groups: defaultdict[int, list[Article]] = defaultdict(list)
    for i, article in enumerate(kept):
        groups[find(i)].append(article)
    return kept, duplicates, list(groups.values())
