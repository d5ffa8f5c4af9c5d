"""Three true/false questions about an article: how a model is asked, what its answer must be."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from daa_ext.newsqa.articles import Article, normalised

PER_ARTICLE = 3
Message = dict[str, str]  # role, content: as chat models take it

SYSTEM = """You write true/false questions that test whether a reader knows the facts of a news \
article. The reader does not see the article. Reply with JSON alone, no other text."""
TASK = """Write exactly three statements about the article below. These must be, in this order: \
{pattern}.

- Each statement is one full sentence about one fact that the article reports: who, what, where, \
when, how many.
- A false statement is a true one with one detail changed to another plausible one. It must be \
false by what the article says.
- Each statement can be understood alone. Name people, places and dates; no "he", no "the \
company" without its name. Never mention the article, the text, the report or the author.
- It cannot be answered by common sense. It is not the title.

Reply in this form:
{{"questions": [{{"statement": "...", "answer": {first}}}, {{"statement": "...", "answer": \
{second}}}, {{"statement": "...", "answer": {third}}}]}}

Title: {title}
{date}
{text}"""
REPAIR = "That cannot be used: {problem}. Reply again, with the JSON object alone."

MENTIONS = re.compile(
    r"\b(the|this|that|above|given)\s+((news|above|given)\s+)?"
    r"(article|passage|text|excerpt|headline|news (item|story|report))\b"
    r"|\baccording to the (report|story|piece)\b|\b(as )?mentioned above\b",
    re.IGNORECASE,
)
DANGLING = re.compile(r"(he|she|they|his|her|their)\b", re.IGNORECASE)
THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Question:
    statement: str
    answer: bool


class MalformedError(Exception):
    """A model's answer that cannot be used; the text is told to the model."""


def ask(article: Article, max_chars: int) -> list[Message]:
    """The messages that ask for questions about the first `max_chars` characters of an article.

    Half of the articles are to have two true statements, the others one, in an order that depends
    on the article alone: models left to themselves answer true too often.
    """
    draw = int(article.digest[:8], 16) % 6
    odd_one, majority = draw % 3, draw >= 3
    words = [str(majority != (i == odd_one)).lower() for i in range(PER_ARTICLE)]
    text = TASK.format(
        pattern=", ".join(words), first=words[0], second=words[1], third=words[2],
        title=article.title, text=article.text[:max_chars],
        date=f"Date: {article.date}\n" if article.date else "",
    )  # fmt: skip
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def ask_again(messages: Sequence[Message], answer: str, problem: str) -> list[Message]:
    """`messages` with the model's latest answer and what is wrong with it."""
    return [
        *messages[:2],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": REPAIR.format(problem=problem)},
    ]


def prompt_digest() -> str:
    """Of all that is said to a model beside the article."""
    return hashlib.sha256("\n".join((SYSTEM, TASK, REPAIR)).encode()).hexdigest()[:16]


def parse(text: str, article: Article) -> list[Question]:
    """The questions in a model's answer, which may stand between other words or in a code fence.

    Raises:
        MalformedError: says what is wrong in words that a model can act on.
    """
    items = _items(THOUGHTS.sub("", text))
    if len(items) != PER_ARTICLE:
        raise MalformedError(f"there are {len(items)} questions, exactly {PER_ARTICLE} are needed")
    questions = [_question(item, i + 1) for i, item in enumerate(items)]
    seen = {normalised(article.title)}
    for i, question in enumerate(questions, 1):
        key = normalised(question.statement)
        if key in seen:
            raise MalformedError(f"statement {i} repeats the title or another statement")
        seen.add(key)
    if len({question.answer for question in questions}) == 1:
        raise MalformedError("all answers are the same, both true and false are needed")
    return questions


def _items(text: str) -> list[Any]:
    """What the first JSON object with "questions" has there, or the first list of objects."""
    decoder = json.JSONDecoder()
    for start in re.finditer(r'\{\s*"|\[\s*\{', text):
        try:
            found, _ = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("questions"), list):
            return found["questions"]
        if isinstance(found, list) and any(isinstance(item, dict) for item in found):
            return found
    raise MalformedError('there is no JSON object {"questions": [...]} in it')


def _question(item: Any, number: int) -> Question:
    if not isinstance(item, dict):
        raise MalformedError(f"question {number} is no JSON object")
    statement, answer = item.get("statement"), item.get("answer")
    if not isinstance(statement, str) or not normalised(statement):
        raise MalformedError(f"the statement of question {number} is missing or empty")
    if not isinstance(answer, bool):
        raise MalformedError(f"the answer of question {number} must be true or false, unquoted")
    statement = " ".join(statement.split())
    if statement.endswith("?"):
        raise MalformedError(f"statement {number} is a question, a statement is needed")
    if found := MENTIONS.search(statement):
        raise MalformedError(f'statement {number} says "{found[0]}": it must stand alone')
    if found := DANGLING.match(statement):
        raise MalformedError(f'statement {number} begins with "{found[0]}": name who that is')
    return Question(statement, answer)
