"""Rows of a score set as tokens: questions with answers, and texts, within cutoff_len."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from daa_ext.compare.host_template import TemplateEncoder
from daa_ext.compare.likelihood import IGNORE, Question, Text, fit
from daa_ext.compare.rows import Row, choice_prompt


class Encoder:
    """Encodes rows for one tokenizer, template and cutoff_len.

    Raises:
        ValueError: (every method) the row cannot be scored within cutoff_len; names its place.
    """

    def __init__(self, tokenizer: Any, template: str, cutoff_len: int) -> None:
        self._tokenizer = tokenizer
        self._template = TemplateEncoder(tokenizer, template)
        self._cutoff_len = cutoff_len

    def labelled(self, row: Row, labels: Sequence[str]) -> Question:
        """The template's prompt of an alpaca row, each label as its answer, as trained on."""
        turns = [self._template.turn(row.content, label) for label in labels]
        return self._fit(row, Question(turns[0][0], [answer for _, answer in turns]))

    def choice(self, row: Row) -> Question:
        """The question as plain text, each choice after a space."""
        texts = [f"{choice_prompt(row)} {choice}" for choice in row.content["choices"]]
        alone, *whole = self._tokenizer([choice_prompt(row), *texts])["input_ids"]
        question = split(alone, whole)
        if not question.prompt:
            raise ValueError(
                f"{row.place}: question={row.content['question']!r} has no token that all of its "
                "choices leave as it is. Lengthen it."
            )
        return self._fit(row, question)

    def text(self, row: Row) -> Text:
        """What a loss is taken of.

        A text: all tokens but the first. A question with choices: the right choice after it. An
        alpaca row: its answer, as in training.
        """
        if "text" in row.content:
            tokens = self._tokenizer(row.content["text"])["input_ids"][: self._cutoff_len]
            text = Text(tokens, [IGNORE, *tokens[1:]])
        elif "choices" in row.content:
            question = self.choice(row)
            answer = question.answers[row.content["answer"]]
            ignored = [IGNORE] * len(question.prompt)
            text = Text([*question.prompt, *answer], [*ignored, *answer])
        else:
            text = Text(*self._template.training(row.content, self._cutoff_len))
        if text.scored == 0:
            raise ValueError(
                f"{row.place}: cutoff_len={self._cutoff_len} leaves no token to score. Raise it or "
                "take out the row."
            )
        return text

    def _fit(self, row: Row, question: Question) -> Question:
        try:
            return fit(question, self._cutoff_len)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None


def split(alone: list[int], whole: list[list[int]]) -> Question:
    """The prompt's tokens that all of its continuations keep, and what follows them in each.

    A tokenizer may merge the end of the prompt with what follows. The merged token then belongs to
    the answer, so that prompt and answer together are what the model sees of the whole text.

    Args:
        alone: token ids of the prompt by itself.
        whole: token ids of the prompt with each answer.
    """
    pairs = zip(alone, *(ids[:-1] for ids in whole), strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, pairs))
    return Question(alone[:shared], [ids[shared:] for ids in whole])
