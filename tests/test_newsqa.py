"""daa newsqa build with a stub for the model: what is kept, what is refused, what is never lost."""

import fcntl
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from host import Host
from tiny import WORDS, make_model
from typer.testing import CliRunner

from daa_ext.newsqa import articles as articles_module
from daa_ext.newsqa.articles import (
    Article,
    by_date,
    deduplicated,
    jaccard,
    normalised,
    read_articles,
    shingles,
)
from daa_ext.newsqa.build import Asking, Choosing, build
from daa_ext.newsqa.command import newsqa_app
from daa_ext.newsqa.files import Item, alpaca, choice, distinct, split
from daa_ext.newsqa.generate import LocalModel, RefusedError, Sampling
from daa_ext.newsqa.questions import MalformedError, Message, Question, ask, parse

DEMO = Path(__file__).resolve().parents[1] / "examples" / "data" / "articles_demo.jsonl"
ASKING = Asking("stub", "local", None, None, 12000, 2)
ARTICLE = Article("a1", "A bridge opens", "The bridge at Selm opened on Monday.", "2026-01-05")
GOOD = [
    {"statement": "The bridge at Selm opened in January 2026.", "answer": True},
    {"statement": "The bridge at Selm is for trains.", "answer": False},
    {"statement": "Selm has a bridge.", "answer": True},
]


def text_of(items: Any) -> str:
    return json.dumps({"questions": items})


class Stub:
    """A model that writes questions about whatever it is asked; `bad`: titles it fails on."""

    parallel = True

    def __init__(self, bad: Sequence[str] = (), stop_after: int | None = None) -> None:
        self.bad, self.stop_after = bad, stop_after
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, messages: Sequence[Message]) -> str:
        with self._lock:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise ValueError("endpoint=stub: no answer.")
            found = re.search(r"^Title: (.*)$", messages[1]["content"], re.MULTILINE)
            assert found
            self.asked.append(found[1])
        if found[1] in self.bad:
            return "I would rather not."
        facts = [f"Fact {n} of <{found[1]}> holds." for n in range(3)]
        pairs = zip(facts, (True, False, True), strict=True)
        return text_of([{"statement": s, "answer": a} for s, a in pairs])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_articles(path: Path, count: int = 10) -> Path:
    """`count` articles that share no five words in a row."""
    rows = [
        {
            "id": f"n{i}", "title": f"Headline {i}", "date": f"2026-01-{i % 28 + 1:02}",
            "text": " ".join(f"{word}{i}" for word in WORDS),
        }
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    return write_articles(tmp_path / "articles.jsonl")


# reading


def test_the_example_is_read_and_has_no_related_articles() -> None:
    found = read_articles(DEMO)
    assert len(found) == 8
    assert all(article.date and article.id.startswith("demo-") for article in found)
    kept, duplicates, groups = deduplicated(found, 0.8, 0.2)
    assert (kept, duplicates, [len(group) for group in groups]) == (found, [], [1] * 8)


def test_what_an_article_may_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\ufeff{"title": " T ", "text": "x", "extra": 1}\r\n\n'
        '{"title": "U", "text": "y", "date": "2026-01-31T10:00:00+01:00", "id": 7}\n',
        encoding="utf-8",
    )
    first, second = read_articles(path)
    assert (first.title, first.date, len(first.id)) == ("T", None, 16)
    assert (second.id, second.date) == ("7", "2026-01-31")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "T"', r"a.jsonl:2: not JSON \(.* at column \d+\). One JSON object a line"),
        ("[1]", r"a.jsonl:2: a JSON object is needed, not list"),
        ('{"titel": "T", "text": "x"}', r"a.jsonl:2: title is missing \(there are titel, text\)"),
        ('{"title": "T", "text": " "}', r"a.jsonl:2: text is ' '\. Every article needs a title"),
        ('{"title": 5, "text": "x"}', r"a.jsonl:2: title is 5\."),
        ('{"title": "T", "text": "\\ud800"}', r"a.jsonl:2: text is no Unicode text"),
        ('{"title": "T", "text": "x", "date": "May 5"}', r"2: date='May 5': ISO 8601 is needed"),
        ('{"title": "T", "text": "x", "date": 20260101}', r"2: date=20260101: ISO 8601 is needed"),
        ('{"title": "T", "text": "x", "id": "i"}', r"2: id=i is that of another article in line 1"),
    ],
)
def test_lines_that_are_no_articles(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"title": "S", "text": "s", "id": "i"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_articles(path)


def test_files_that_hold_no_articles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl: cannot be read as UTF-8 text \(.*No such"):
        read_articles(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"title": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"latin.jsonl: cannot be read as UTF-8 text"):
        read_articles(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r'empty.jsonl: no articles. .* \{"title": \.\.\., "text'):
        read_articles(tmp_path / "empty.jsonl")


def test_dates_from_and_before(tmp_path: Path) -> None:
    days = ["2025-12-31", "2026-01-01", "2026-01-31", "2026-02-01", None]
    found = [Article(str(day), "t", "x", day) for day in days]
    kept, dropped = by_date(found, "2026-01-01", "2026-02-01")
    assert [article.id for article in kept] == ["2026-01-01", "2026-01-31"]
    assert dropped == {
        "2025-12-31": "date 2025-12-31", "2026-02-01": "date 2026-02-01", "None": "no date",
    }  # fmt: skip
    assert by_date(found, None, None) == (found, {})


# duplicates


def article(name: str, words: Sequence[str]) -> Article:
    return Article(name, name, " ".join(words), None)


def test_similarity_is_that_of_sets_of_five_words() -> None:
    a, b = "one two three four five six seven", "two, THREE four-five six seven!  eight"
    runs = [
        {tuple(words[i : i + 5]) for i in range(3)}
        for words in (a.split(), normalised(b).split())
    ]  # fmt: skip
    assert jaccard(shingles(a), shingles(b)) == len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    assert jaccard(shingles("short text"), shingles("Short, text.")) == 1
    assert jaccard(shingles("short text"), shingles("shorter text")) == 0


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    assert normalised("ab\u4e2d\u6587cd \u3042_x") == "ab \u4e2d \u6587 cd \u3042 x"


def test_duplicates_go_and_related_articles_stay_together() -> None:
    words = [f"w{i}" for i in range(400)]
    found = [
        article("original", words),
        article("copy", words),
        article("near", [*words[:390], "other", "end"]),
        article("half", [*words[:200], *(f"x{i}" for i in range(200))]),
        article("neighbour of half", [f"x{i}" for i in range(200)]),
        article("stranger", [f"y{i}" for i in range(400)]),
    ]
    kept, duplicates, groups = deduplicated(found, 0.8, 0.2)
    assert [(d.id, d.of) for d in duplicates] == [("copy", "original"), ("near", "original")]
    assert duplicates[0].similarity == 1
    assert 0.8 <= duplicates[1].similarity < 1
    ids = sorted(sorted(a.id for a in group) for group in groups)
    assert ids == [["half", "neighbour of half", "original"], ["stranger"]], "through each other"
    assert len(kept) == 4
    assert len(deduplicated(found, 1.0, 1.0)[0]) == 5, "the thresholds have an effect"


def test_the_sketches_overlook_nothing_that_all_pairs_find() -> None:
    """Against the comparison of every pair, at similarities around the threshold."""
    base = [f"w{i}" for i in range(300)]
    found = [article(str(k), [*base[: 20 * k], *(f"v{k}.{i}" for i in range(300 - 20 * k))])
             for k in range(15)]  # fmt: skip
    _, duplicates, groups = deduplicated(found, 1.0, 0.2)
    assert not duplicates
    near = {
        frozenset((a.id, b.id))
        for a, b in itertools.combinations(found, 2)
        if jaccard(shingles(a.text), shingles(b.text)) >= 0.2
    }
    joined = {
        frozenset((a.id, b.id)) for group in groups for a, b in itertools.combinations(group, 2)
    }
    assert near <= joined
    assert 0 < len(near) < 105


def test_a_phrase_of_the_house_relates_nothing_and_costs_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A closing line in every article; the last one is a copy of the last but one."""
    closing = [f"c{i}" for i in range(20)]
    found = [article(str(k), [*(f"w{k}.{i}" for i in range(100)), *closing]) for k in range(200)]
    found.append(replace(found[-1], id="copy"))
    compared: list[int] = []

    def counted(a: Any, b: Any) -> float:
        compared[-1] += 1
        return jaccard(a, b)

    monkeypatch.setattr(articles_module, "jaccard", counted)
    for common in (5, 1000):
        monkeypatch.setattr(articles_module, "COMMON", common)
        compared.append(0)
        kept, duplicates, groups = deduplicated(found, 0.8, 0.2)
        assert len(kept) == len(groups) == 200
        assert [(d.id, d.of) for d in duplicates] == [("copy", "199")]
    assert compared[0] < compared[1] / 2


# what a model answers


def test_a_good_answer_however_it_is_wrapped() -> None:
    expected = [Question(row["statement"], row["answer"]) for row in GOOD]
    plain = text_of(GOOD)
    for text in (
        plain,
        json.dumps(GOOD),
        f"Sure! [1] Here {{it}} is:\n```json\n{plain}\n```\nAnything else?",
        f"<think>maybe {text_of([])}</think>{plain}",
    ):
        assert parse(text, ARTICLE) == expected


def changed(**values: Any) -> list[Any]:
    return [GOOD[0], {**GOOD[1], **values}, GOOD[2]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (GOOD[:2], "there are 2 questions, exactly 3 are needed"),
        ([*GOOD, GOOD[0]], "there are 4 questions"),
        ([GOOD[0], "x", GOOD[2]], "question 2 is no JSON object"),
        (changed(statement="  "), "the statement of question 2 is missing or empty"),
        (changed(statement="..."), "the statement of question 2 is missing or empty"),
        (changed(statement=None), "the statement of question 2 is missing or empty"),
        (changed(answer="false"), "the answer of question 2 must be true or false, unquoted"),
        (changed(answer=0), "the answer of question 2 must be true or false, unquoted"),
        (changed(answer=True), "all answers are the same"),
        (changed(statement="Is Selm a town?"), "statement 2 is a question"),
        (changed(statement="A  Bridge opens."), "statement 2 repeats the title or another"),
        (changed(statement="selm has a BRIDGE"), "statement 3 repeats the title or another"),
        (changed(statement="The article says Selm is far."), 'says "The article": it must stand'),
        (changed(statement="Selm is, in this news report, far."), 'says "this news report"'),
        (changed(statement="According to the report, Selm."), 'says "According to the report"'),
        (changed(statement="He opened the bridge."), 'begins with "He": name who that is'),
    ],
)
def test_answers_that_are_not_good_enough(items: Any, message: str) -> None:
    with pytest.raises(MalformedError, match=re.escape(message)):
        parse(text_of(items), ARTICLE)


@pytest.mark.parametrize(
    "text",
    ["", "no", "{", "[1, 2]", '{"questions": 3}', '{"a": [}', "[" * 10000, '[{"a": ' * 600],
    ids=range(8),
)
def test_answers_without_questions(text: str) -> None:
    with pytest.raises(MalformedError, match="there is no JSON object"):
        parse(text, ARTICLE)


@pytest.mark.parametrize(
    "statement",
    ["The report of the UN names Selm.", "The context is Selm.", "Sheep live in Selm.",
     "The author Ada Holm lives in Selm.", "Prices, as the bank mentioned, above all fell."],
)  # fmt: skip
def test_statements_that_only_look_like_bad_ones(statement: str) -> None:
    assert len(parse(text_of(changed(statement=statement)), ARTICLE)) == 3


def test_the_prompt_holds_the_article_and_asks_for_both_answers() -> None:
    prompts = [ask(replace(ARTICLE, title=f"T{{{i}}}"), 10)[1]["content"] for i in range(300)]
    assert "Title: T{7}\nDate: 2026-01-05\n\nThe bridge" in prompts[7]
    assert "at Selm" not in prompts[7].partition("Title:")[2], "10 characters"
    assert "Date:" not in ask(replace(ARTICLE, date=None), 10)[1]["content"]
    counts = [re.findall(r'"answer": (true|false)', prompt).count("true") for prompt in prompts]
    assert set(counts) == {1, 2}
    assert 0.4 < counts.count(2) / 300 < 0.6


# the split and the files


def test_equal_statements_are_kept_once_and_contradicting_ones_not_at_all() -> None:
    said = [("It rains.", True), ("Snow falls.", True), ("it RAINS", True), ("Snow falls", False)]
    items = [Item(str(i), ARTICLE, Question(*pair)) for i, pair in enumerate(said)]
    kept, dropped = distinct(items)
    assert [item.id for item in kept] == ["0"]
    assert dropped == {
        "2": "same statement as 0", "1": "same statement with both answers",
        "3": "same statement with both answers",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_on_one_side(seed: int) -> None:
    found = [article(f"{i:03}", [str(i)]) for i in range(100)]
    groups = [found[i : i + 5] for i in range(0, 100, 5)]
    asked = {a.id for a in found[10:]}
    sides = split(groups, asked, 0.3, seed)
    assert len(sides) == 100
    assert all(len({sides[a.id] for a in group}) == 1 for group in groups)
    assert [sides[i] for i in sorted(asked)].count("test") in (25, 30)
    assert sides == split(groups[::-1], asked, 0.3, seed), "the order of the file has no effect"
    assert sides != split(groups, asked, 0.3, seed + 1), "the seed has one"


def test_a_split_that_leaves_one_side_empty() -> None:
    found = [article(str(i), [str(i)]) for i in range(4)]
    message = r"test-share=0.5: of 4 articles with questions, 0 would be .* 1 groups of related"
    with pytest.raises(ValueError, match=message):
        split([found], {"0", "1", "2", "3"}, 0.5, 0)


def test_answers_agree_in_both_formats() -> None:
    for answer in (True, False):
        question = Question("Selm has a bridge.", answer)
        row = choice(question)
        assert row["style"] == "qa"
        assert row["choices"][row["answer"]] == alpaca(question)["output"] == str(answer).lower()
        assert question.statement in row["question"]


def test_a_build_from_start_to_end(tmp_path: Path, articles: Path) -> None:
    out = tmp_path / "out"
    report = build(articles, out, Stub(), ASKING, Choosing(test_share=0.3), concurrency=3)
    questions = rows_of(out / "questions.jsonl")
    assert len(questions) == 30
    assert [row["id"] for row in questions[:3]] == ["n0-1", "n0-2", "n0-3"], "in the file's order"
    assert questions[0] == {
        "id": "n0-1", "article": "n0", "title": "Headline 0", "date": "2026-01-01",
        "statement": "Fact 0 of <Headline 0> holds.", "answer": True,
        "split": questions[0]["split"],
    }  # fmt: skip
    by_side = {
        side: {row["statement"]: row["answer"] for row in questions if row["split"] == side}
        for side in ("train", "test")
    }
    texts = {row["text"] for row in rows_of(out / "news_articles.jsonl")}
    assert len(texts) == 10
    for side, count in (("train", 21), ("test", 9)):
        found = rows_of(out / f"newsqa_{side}.jsonl")
        assert {r["input"]: r["output"] == "true" for r in found} == by_side[side]
        assert len(found) == len(rows_of(out / f"newsqa_{side}_choices.jsonl")) == count
        mine = {row["text"] for row in rows_of(out / f"news_articles_{side}.jsonl")}
        assert len(mine) == count / 3
        assert {text.partition("\n")[0] for text in mine} == {
            row["title"] for row in questions if row["split"] == side
        }
        assert mine < texts
    assert report == json.loads((out / "build.json").read_text())
    assert report["sides"]["test"] == {
        "articles": 3, "questions": 9, "true": 6, "false": 3, "share_true": 0.667,
    }  # fmt: skip
    digest = hashlib.sha256((out / "questions.jsonl").read_bytes()).hexdigest()
    assert report["questions_sha256"] == digest
    assert report["counts"]["articles asked about"] == 10


def test_the_host_trains_on_the_files(host: Host, articles: Path) -> None:
    build(articles, host.folder / "qa", Stub(), ASKING, Choosing(test_share=0.3))
    host.data = host.folder / "qa"
    losses = []
    for stage, name in (("sft", "newsqa_train"), ("pt", "news_articles")):
        out = host.run(host.arguments(name, stage=stage, dataset=name, cutoff_len=128))
        losses.append(json.loads((out / "train_results.json").read_text())["train_loss"])
    assert all(0 < loss < 10 for loss in losses)


def test_articles_that_give_no_questions_are_listed(tmp_path: Path, articles: Path) -> None:
    stub, out = Stub(bad=["Headline 3"]), tmp_path / "out"
    report = build(articles, out, stub, ASKING, Choosing())
    assert stub.asked.count("Headline 3") == 2, "attempts=2"
    (rejected,) = rows_of(out / "rejected.jsonl")
    assert rejected["id"] == "n3"
    problem = 'there is no JSON object {"questions": [...]} in it'
    assert rejected["attempts"] == [{"answer": "I would rather not.", "problem": problem}] * 2
    assert report["counts"]["rejected articles"] == 1
    assert report["counts"]["questions"] == 27
    assert len(rows_of(out / "news_articles.jsonl")) == 10, "its text may still be trained on"
    again = Stub()
    build(articles, out, again, ASKING, Choosing())
    assert again.asked == []
    build(articles, out, again, ASKING, Choosing(), retry_rejected=True)
    assert again.asked == ["Headline 3"]
    assert rows_of(out / "rejected.jsonl") == []


def test_a_bad_answer_is_told_what_is_wrong(tmp_path: Path, articles: Path) -> None:
    good = Stub()
    seen: list[Sequence[Message]] = []

    class Learner(Stub):
        def __call__(self, messages: Sequence[Message]) -> str:
            seen.append(messages)
            return "Hm." if len(messages) == 2 else good(messages)

    report = build(articles, tmp_path / "out", Learner(), ASKING, Choosing(limit=5))
    assert report["counts"]["rejected articles"] == 0
    assert report["counts"]["unusable answers"] == 5
    assert [message["role"] for message in seen[1]] == ["system", "user", "assistant", "user"]
    assert seen[1][2]["content"] == "Hm."
    assert "cannot be used: there is no JSON object" in seen[1][3]["content"]


def test_no_questions_at_all_is_an_error_that_keeps_the_answers(
    tmp_path: Path, articles: Path
) -> None:
    class Deaf(Stub):
        def __call__(self, messages: Sequence[Message]) -> str:
            raise RefusedError("HTTP 400: max_tokens is not supported")

    message = "not one of 10 articles gave questions. The first: HTTP 400: max_tokens is not supp"
    with pytest.raises(ValueError, match=message):
        build(articles, tmp_path / "out", Deaf(), ASKING, Choosing())
    assert len(rows_of(tmp_path / "out" / "journal.jsonl")) == 11
    assert not (tmp_path / "out" / "build.json").exists()


def test_duplicates_and_dates_are_counted_and_listed(tmp_path: Path, articles: Path) -> None:
    rows = rows_of(articles)
    extra = [{**rows[1], "id": "copy"}, rows[2], {"title": "Undated", "text": "some words"}]
    articles.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))
    report = build(
        articles, tmp_path / "out", Stub(), ASKING,
        Choosing(after="2026-01-02", before="2026-01-09"),
    )  # fmt: skip
    counts = report["counts"]
    assert counts["articles read"] == 13
    assert counts["without a date"] == 1
    assert counts["outside the dates"] == 3
    assert counts["duplicate articles"] == 2
    assert counts["articles asked about"] == 7
    dropped = {row["id"]: row["reason"] for row in rows_of(tmp_path / "out" / "dropped.jsonl")}
    assert dropped["copy"] == "like n1, similarity 1.0"
    assert dropped["n2@12"] == "like n2, similarity 1.0"
    assert dropped["n0"] == "date 2026-01-01"
    assert len(dropped) == 6
    with pytest.raises(
        ValueError, match=r"none of 13 articles is dated from 2027-01-01 to before -"
    ):
        build(articles, tmp_path / "o2", Stub(), ASKING, Choosing(after="2027-01-01"))


# the journal


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_second_run_continues(tmp_path: Path, articles: Path, concurrency: int) -> None:
    out, broken, rest = tmp_path / "out", Stub(stop_after=4), Stub()
    with pytest.raises(ValueError, match="endpoint=stub: no answer"):
        build(articles, out, broken, ASKING, Choosing(), concurrency)
    assert len(rows_of(out / "journal.jsonl")) == 5, "whatever was answered is on the disk"
    assert not (out / "build.json").exists()
    build(articles, out, rest, ASKING, Choosing(), concurrency)
    assert sorted(broken.asked + rest.asked) == sorted(f"Headline {i}" for i in range(10))
    build(articles, tmp_path / "whole", Stub(), ASKING, Choosing())
    for path in (tmp_path / "whole").iterdir():
        if path.name != "journal.jsonl":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_a_line_cut_off_by_a_killed_run_is_asked_again(tmp_path: Path, articles: Path) -> None:
    out, again = tmp_path / "out", Stub()
    build(articles, out, Stub(), ASKING, Choosing())
    journal = out / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    build(articles, out, again, ASKING, Choosing())
    assert again.asked == ["Headline 9"]
    assert journal.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path, articles: Path) -> None:
    out, again = tmp_path / "out", Stub()
    build(articles, out, Stub(), ASKING, Choosing())
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    damaged = "".join([*lines[:3], '{"digest": "x"}\n', *lines[4:]])
    (out / "journal.jsonl").write_text(damaged)
    with pytest.raises(ValueError, match=r"journal.jsonl:4: damaged .*Remove that line"):
        build(articles, out, again, ASKING, Choosing())
    assert (out / "journal.jsonl").read_text() == damaged
    (out / "journal.jsonl").write_text("".join([*lines[:3], *lines[4:]]))
    build(articles, out, again, ASKING, Choosing())
    assert again.asked == ["Headline 2"]
    (out / "journal.jsonl").write_text('["generation"]\n')
    with pytest.raises(ValueError, match=r"journal.jsonl:1: damaged .*Name a new folder"):
        build(articles, out, again, ASKING, Choosing())


def test_other_settings_are_refused_with_the_difference(tmp_path: Path, articles: Path) -> None:
    out = tmp_path / "out"
    build(articles, out, Stub(), ASKING, Choosing())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = replace(ASKING, model="larger", temperature=0.7)
    message = "begun with other settings: model=stub there, larger now; temperature=None there, 0.7"
    with pytest.raises(ValueError, match=message):
        build(articles, out, Stub(), other, Choosing())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_another_choice_of_articles_needs_no_new_answers(tmp_path: Path, articles: Path) -> None:
    out, stub = tmp_path / "out", Stub()
    build(articles, out, Stub(), ASKING, Choosing(limit=6))
    build(articles, out, stub, ASKING, Choosing(test_share=0.5))
    assert stub.asked == [f"Headline {i}" for i in range(6, 10)]
    assert json.loads((out / "build.json").read_text())["sides"]["test"]["articles"] == 5
    rows = rows_of(articles)
    rows[0]["text"] += " corrected"
    articles.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(articles, out, stub, ASKING, Choosing(test_share=0.5))
    assert stub.asked[4:] == ["Headline 0"], "what has changed is asked about again"


def test_folders_that_are_not_ours(tmp_path: Path, articles: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    for name in ("mine", "articles.jsonl"):
        with pytest.raises(ValueError, match=rf"out=.*{name} exists and has no journal.jsonl"):
            build(articles, tmp_path / name, Stub(), ASKING, Choosing())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


def test_two_builds_at_once(tmp_path: Path, articles: Path) -> None:
    build(articles, tmp_path / "out", Stub(), ASKING, Choosing())
    with (tmp_path / "out" / "journal.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(ValueError, match=r"journal.jsonl: another build is writing it"):
            build(articles, tmp_path / "out", Stub(), ASKING, Choosing())
    build(articles, tmp_path / "out", Stub(), ASKING, Choosing())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test_share": 1.0}, "test-share=1.0: allowed are numbers between 0 and 1"),
        ({"related": 0.9}, "related=0.9, duplicate=0.8: allowed are 0 < related <= duplicate <= 1"),
        ({"limit": 0}, "limit=0: allowed are 1 and more"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choosing(**values)


# a model in this process


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for a prompt, which is long in its bytes."""
    folder = make_model(tmp_path_factory.mktemp("newsqa") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


def test_a_local_model_is_asked_and_its_nonsense_rejected(
    tmp_path: Path, articles: Path, roomy_model: Path
) -> None:
    model = LocalModel(str(roomy_model), Sampling(max_tokens=8))
    with pytest.raises(ValueError, match=r"not one of 2 articles gave questions\. The first: "):
        build(articles, tmp_path / "out", model, ASKING, Choosing(limit=2), concurrency=4)
    attempts = [row["attempts"] for row in rows_of(tmp_path / "out" / "journal.jsonl")[1:]]
    assert [len(found) for found in attempts] == [2, 2]
    assert all(attempt["answer"] for found in attempts for attempt in found), "it said something"


def test_a_local_model_answers_alike_unless_it_draws(roomy_model: Path) -> None:
    messages = [{"role": "user", "content": "the market rises"}]
    greedy = LocalModel(str(roomy_model), Sampling(max_tokens=8))
    drawing = LocalModel(str(roomy_model), Sampling(temperature=5.0, max_tokens=8))
    assert greedy(messages) == greedy(messages)
    assert "market" not in greedy(messages), "the answer alone, not the prompt"
    assert len({drawing(messages) for _ in range(3)}) > 1


def test_a_chat_template_is_used(roomy_model: Path) -> None:
    model = LocalModel(str(roomy_model), Sampling(max_tokens=16))
    plain = model([{"role": "user", "content": "north"}])
    template = "{% for m in messages %}{{ m['content'] }} south south {% endfor %}"
    model._tokenizer.chat_template = template
    assert model([{"role": "user", "content": "north"}]) != plain


def test_an_article_that_does_not_fit_the_local_model(tmp_path: Path, tiny_model: Path) -> None:
    model = LocalModel(str(tiny_model), Sampling())
    with pytest.raises(RefusedError, match=r"tokens of prompt and 512 of answer do not fit .* 256"):
        model(ask(ARTICLE, 12000))
    with pytest.raises(ValueError, match=r"local-model=.*nothing: cannot be loaded"):
        LocalModel(str(tmp_path / "nothing"), Sampling())


# the command


def command(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(newsqa_app, ["build", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


def test_the_command_says_what_is_wrong(tmp_path: Path, articles: Path) -> None:
    out = ("--out", tmp_path / "out")
    code, output = command(articles, *out)
    assert code == 1
    assert output.startswith("endpoint=None, model=None: name the model that writes the questions")
    code, output = command(articles, *out, "--local-model", "x", "--model", "y")
    assert output == "local-model=x: goes without --endpoint, --model, --api-key-env."
    code, output = command(articles, *out, "--after", "May", "--local-model", "x")
    assert output == "--after: date='May': ISO 8601 is needed, as 2025-01-31."
    assert not (tmp_path / "out").exists()


def test_the_command_with_a_local_model(tmp_path: Path, articles: Path, roomy_model: Path) -> None:
    words = ("--local-model", roomy_model, "--max-tokens", 4, "--attempts", 1, "--limit", 1)
    code, output = command(articles, "--out", tmp_path / "out", *words)
    assert code == 1
    assert "1/1" in output
    assert "not one of 1 articles gave questions" in output
    settings = rows_of(tmp_path / "out" / "journal.jsonl")[0]["generation"]
    assert (settings["model"], settings["kind"]) == (str(roomy_model), "local")
