"""From articles to a benchmark: ask about each, keep what is finished, write the files."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from daa_ext import __version__
from daa_ext.newsqa.articles import Article, Duplicate, by_date, deduplicated, read_articles
from daa_ext.newsqa.files import BUILD, SIDES, Item, distinct, split, write_files, write_text
from daa_ext.newsqa.generate import Generator, RefusedError
from daa_ext.newsqa.journal import Journal, Outcome
from daa_ext.newsqa.questions import MalformedError, ask, ask_again, parse, prompt_digest


@dataclass(frozen=True)
class Asking:
    """What the answers depend on: a folder's journal is made with one of these."""

    model: str
    kind: str  # endpoint, local
    temperature: float | None
    max_tokens: int | None
    max_chars: int  # of an article that the model is shown
    attempts: int  # answers of a model before an article is given up


@dataclass(frozen=True)
class Choosing:
    """Which articles, and how they are split. May change: the files are made anew."""

    after: str | None = None
    before: str | None = None
    limit: int | None = None
    duplicate: float = 0.8
    related: float = 0.2
    test_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"test-share={self.test_share}: allowed are numbers between 0 and 1.")
        if not 0 < self.related <= self.duplicate <= 1:
            raise ValueError(
                f"related={self.related}, duplicate={self.duplicate}: allowed are "
                "0 < related <= duplicate <= 1."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: allowed are 1 and more.")


@dataclass(frozen=True)
class Chosen:
    """The articles that are asked about, and what became of the others."""

    articles: list[Article]
    groups: list[list[Article]]
    by_date: dict[str, str]  # id -> why it is left out
    duplicates: list[Duplicate]
    read: int


def choose(path: Path, choosing: Choosing) -> Chosen:
    """Read, filter and de-duplicate. `limit` counts what is left then.

    Raises:
        ValueError: see `read_articles`; no article is left.
    """
    everything = read_articles(path)
    dated, dropped = by_date(everything, choosing.after, choosing.before)
    if not dated:
        raise ValueError(
            f"{path}: none of {len(everything)} articles is dated from {choosing.after or '-'} to "
            f"before {choosing.before or '-'} "
            f"({list(dropped.values()).count('no date')} have no date)."
        )
    kept, duplicates, groups = deduplicated(dated, choosing.duplicate, choosing.related)
    chosen = {article.id for article in kept[: choosing.limit]}
    inside = [[a for a in group if a.id in chosen] for group in groups]
    groups = [group for group in inside if group]
    return Chosen(kept[: choosing.limit], groups, dropped, duplicates, len(everything))


def build(
    path: Path, out: Path, generator: Generator, asking: Asking, choosing: Choosing,
    concurrency: int = 1, retry_rejected: bool = False,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Ask about every article that the journal in `out` lacks, then write all files.

    Returns what build.json holds. `advance` is told (articles finished, articles in all).

    Raises:
        ValueError: bad articles or settings, an endpoint that fails (what is finished is kept),
            not one usable answer.
    """
    chosen = choose(path, choosing)
    generation = {**asdict(asking), "prompt": prompt_digest()}
    with contextlib.closing(Journal(out, generation)) as journal:
        done = {d for d, o in journal.outcomes.items() if o.questions or not retry_rejected}
        todo = [article for article in chosen.articles if article.digest not in done]
        total = len(chosen.articles)
        finished = total - len(todo)
        advance(finished, total)
        for outcome in _outcomes(todo, generator, asking, concurrency):
            journal.add(outcome)
            finished += 1
            advance(finished, total)
        outcomes = {a.id: journal.outcomes[a.digest] for a in chosen.articles}
        return _write(out, path, chosen, outcomes, generation, choosing)


def outcome_of(article: Article, generator: Generator, asking: Asking) -> Outcome:
    """Ask until an answer is usable, telling the model what was wrong, `asking.attempts` times."""
    messages = ask(article, asking.max_chars)
    failed: list[dict[str, str]] = []
    for _ in range(asking.attempts):
        try:
            answer = generator(messages)
        except RefusedError as error:
            failed.append({"answer": "", "problem": str(error)})
            break
        try:
            return Outcome(article.id, article.digest, parse(answer, article), failed)
        except MalformedError as error:
            failed.append({"answer": answer, "problem": str(error)})
            messages = ask_again(messages, answer, str(error))
    return Outcome(article.id, article.digest, [], failed)


def _outcomes(
    todo: Sequence[Article], generator: Generator, asking: Asking, concurrency: int
) -> Iterator[Outcome]:
    """The outcome of each as it comes; at a failure those under way, too, then the failure."""
    waiting = iter(todo)
    running: set[Future[Outcome]] = set()
    failure: ValueError | None = None
    places = concurrency if generator.parallel else 1
    with ThreadPoolExecutor(places) as pool:
        while True:
            if failure is None:
                for article in islice(waiting, places - len(running)):
                    running.add(pool.submit(outcome_of, article, generator, asking))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                try:
                    outcome = future.result()
                except ValueError as error:
                    failure = failure or error
                else:
                    yield outcome
    if failure is not None:
        raise failure


def _write(
    out: Path, path: Path, chosen: Chosen, outcomes: dict[str, Outcome],
    generation: dict[str, Any], choosing: Choosing,
) -> dict[str, Any]:  # fmt: skip
    asked = [
        Item(f"{article.id}-{number}", article, question)
        for article in chosen.articles
        for number, question in enumerate(outcomes[article.id].questions, 1)
    ]
    rejected: list[dict[str, Any]] = [
        {"id": article.id, "title": article.title, "attempts": outcomes[article.id].attempts}
        for article in chosen.articles
        if not outcomes[article.id].questions
    ]
    if not asked:
        last = rejected[0]["attempts"][-1]["problem"]
        raise ValueError(
            f"out={out}: not one of {len(rejected)} articles gave questions. The first: {last}. "
            "Mend that, or take a larger model in a new folder; --retry-rejected asks again."
        )
    items, repeated = distinct(asked)
    with_questions = {item.article.id for item in items}
    sides = split(chosen.groups, with_questions, choosing.test_share, choosing.seed)
    dropped = [
        *({"what": "article", "id": id, "reason": why} for id, why in chosen.by_date.items()),
        *(
            {"what": "article", "id": d.id, "reason": f"like {d.of}, similarity {d.similarity}"}
            for d in chosen.duplicates
        ),
        *({"what": "question", "id": id, "reason": why} for id, why in repeated.items()),
    ]
    (out / BUILD).unlink(missing_ok=True)  # there again when all files are those of this build
    digest = write_files(out, chosen.articles, items, sides, rejected, dropped)
    report = {
        "daa_ext": __version__,
        "articles_file": str(path),
        "articles_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "generation": generation,
        "choosing": asdict(choosing),
        "counts": {
            "articles read": chosen.read,
            "without a date": list(chosen.by_date.values()).count("no date"),
            "outside the dates": sum(why != "no date" for why in chosen.by_date.values()),
            "duplicate articles": len(chosen.duplicates),
            "articles asked about": len(chosen.articles),
            "unusable answers": sum(len(o.attempts) for o in outcomes.values()),
            "rejected articles": len(rejected),
            "repeated questions": len(repeated),
            "questions": len(items),
        },
        "sides": {side: _side(items, sides, side) for side in SIDES},
        "questions_sha256": digest,
    }
    write_text(out / BUILD, json.dumps(report, indent=1) + "\n")
    return report


def _side(items: Sequence[Item], sides: dict[str, str], side: str) -> dict[str, Any]:
    """Counts of one side of the split, and which part of its answers is true."""
    mine = [item for item in items if sides[item.article.id] == side]
    answers = Counter(item.question.answer for item in mine)
    return {
        "articles": len({item.article.id for item in mine}), "questions": len(mine),
        "true": answers[True], "false": answers[False],
        "share_true": round(answers[True] / len(mine), 3),
    }  # fmt: skip
