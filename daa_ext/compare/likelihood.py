"""Log-likelihood of answers given a prompt, and of texts: batched, without changing a score.

A prompt runs through the model once. What its answers share, the keys and values of the prompt,
is repeated for them; an answer of one token is read off the prompt's own logits. Prompts are padded
on the left, so that all of them end, and all answers begin, at the same place; answers and texts
are padded on the right, where a causal model does not look. Beyond rounding, no score depends on
what else was in the batch.

Shapes: B sequences, T tokens, V vocabulary.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.functional import cross_entropy

IGNORE = -100  # target of a token that is not scored; what cross_entropy ignores unless told
WINDOW = 16  # batches whose items are sorted by length together
WIDER = 4  # an answer is short: this many times the batch size of answers run together

Progress = Callable[[int], object]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to choose from, as token ids; at least one token each."""

    prompt: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Text:
    """Token ids and, of the same length, what is scored: the token itself or IGNORE."""

    tokens: list[int]
    targets: list[int]

    @property
    def scored(self) -> int:
        """Number of tokens whose loss counts."""
        return sum(target != IGNORE for target in self.targets[1:])


def fit(question: Question, cutoff_len: int) -> Question:
    """Cut the prompt from the left until it fits `cutoff_len` tokens with the longest answer.

    All answers keep the same prompt and stay whole: a score of half an answer, or after another
    prompt than its rivals', would not be comparable.

    Raises:
        ValueError: an answer leaves no room for one token of the prompt.
    """
    longest = max(len(answer) for answer in question.answers)
    if longest >= cutoff_len:
        raise ValueError(
            f"an answer has {longest} tokens and cutoff_len={cutoff_len}: at least one token of "
            "the prompt must fit before it. Raise cutoff_len or shorten the answer."
        )
    return Question(question.prompt[longest - cutoff_len :], question.answers)


def batches(lengths: Sequence[int], batch_size: int, order_seed: int) -> Iterator[list[int]]:
    """Indices of items of the given lengths, in batches of similar length.

    The items are shuffled by `order_seed`, and only windows of WINDOW batches are sorted: another
    seed makes other batches, whose scores differ by rounding alone (the noise floor of a score).
    """
    order = list(range(len(lengths)))
    random.Random(order_seed).shuffle(order)
    for window in _chunks(order, WINDOW * batch_size):
        longest_first = sorted(window, key=lambda i: -lengths[i])
        yield from _chunks(longest_first, batch_size)


@torch.no_grad()
def answer_scores(
    model: Any,
    questions: Sequence[Question],
    batch_size: int,
    order_seed: int = 0,
    progress: Progress = lambda done: None,
) -> list[list[float]]:
    """Summed log-likelihood, in nats, of each answer after its prompt, in the order given.

    Args:
        model: a causal language model of transformers.
        questions: see `fit` for those that are too long.
        batch_size: prompts that run together.
        progress: is told how many questions are done, batch by batch.
    """
    scores: list[list[float]] = [[] for _ in questions]
    lengths = [len(question.prompt) for question in questions]
    for batch in batches(lengths, batch_size, order_seed):
        found = _scores_of_batch(model, [questions[i] for i in batch], WIDER * batch_size)
        for i, row in zip(batch, found, strict=True):
            scores[i] = row
        progress(len(batch))
    return scores


@torch.no_grad()
def text_losses(
    model: Any,
    texts: Sequence[Text],
    batch_size: int,
    order_seed: int = 0,
    progress: Progress = lambda done: None,
) -> list[float]:
    """Summed negative log-likelihood, in nats, of the scored tokens of each text.

    Arguments as in `answer_scores`. The first token has nothing before it and is never scored.
    """
    losses = [0.0] * len(texts)
    lengths = [len(text.tokens) for text in texts]
    for batch in batches(lengths, batch_size, order_seed):
        tokens_BT, mask_BT = _padded([texts[i].tokens for i in batch], 0, model.device)
        targets_BT, _ = _padded([texts[i].targets for i in batch], IGNORE, model.device)
        # Logits at t are of token t + 1; those of long unscored prompts are not made at all.
        scored = (targets_BT[:, 1:] != IGNORE).any(0).nonzero().flatten()
        logits_BtV = model(
            input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=scored
        ).logits
        found = _losses(logits_BtV, targets_BT[:, 1:][:, scored])
        for i, loss in zip(batch, found, strict=True):
            losses[i] = loss
        progress(len(batch))
    return losses


def _scores_of_batch(model: Any, questions: list[Question], width: int) -> list[list[float]]:
    prompts_BT, mask_BT = _padded([q.prompt for q in questions], 0, model.device, left=True)
    ends_B = mask_BT.sum(1)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    done = model(
        input_ids=prompts_BT, attention_mask=mask_BT, position_ids=positions_BT,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    first_BV = done.logits[:, -1].float().log_softmax(-1)
    scores = [
        row[torch.tensor([answer[0] for answer in question.answers], device=row.device)].tolist()
        for row, question in zip(first_BV, questions, strict=True)
    ]
    longer = [
        (len(answer), i, j)
        for i, question in enumerate(questions)
        for j, answer in enumerate(question.answers)
        if len(answer) > 1
    ]
    for part in _chunks(sorted(longer), width):
        rows_b = torch.tensor([i for _, i, _ in part], device=model.device)
        answers = [questions[i].answers[j] for _, i, j in part]
        cache = copy.deepcopy(done.past_key_values)  # a forward pass appends to it
        cache.batch_select_indices(rows_b)
        tokens_bt, mask_bt = _padded([answer[:-1] for answer in answers], 0, model.device)
        targets_bt, _ = _padded([answer[1:] for answer in answers], IGNORE, model.device)
        steps_t = torch.arange(tokens_bt.shape[1], device=model.device)
        logits_btV = model(
            input_ids=tokens_bt,
            attention_mask=torch.cat([mask_BT[rows_b], mask_bt], 1),
            position_ids=ends_B[rows_b, None] + steps_t,
            past_key_values=cache,
        ).logits
        for (_, i, j), loss in zip(part, _losses(logits_btV, targets_bt), strict=True):
            scores[i][j] -= loss
    return scores


def _chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    yield from (list(items[i : i + size]) for i in range(0, len(items), size))


def _padded(
    rows: list[list[int]], value: int, device: torch.device, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one int64 tensor (B, T) filled up with `value`; a mask of what is real."""
    filled = torch.full((len(rows), max(map(len, rows))), value)
    mask = torch.zeros_like(filled)
    for i, row in enumerate(rows):
        real = slice(filled.shape[1] - len(row), None) if left else slice(0, len(row))
        filled[i, real] = torch.tensor(row)
        mask[i, real] = 1
    return filled.to(device), mask.to(device)


def _losses(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> list[float]:
    """Summed cross entropy of each sequence; row by row, so that one row is in fp32 at a time."""
    rows = zip(logits_BTV, targets_BT, strict=True)
    sums = [cross_entropy(row.float(), targets, reduction="sum") for row, targets in rows]
    return torch.stack(sums).tolist()
