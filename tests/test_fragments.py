"""Fragments of flat buffers: they name the right elements, and together all of them, once."""

from collections.abc import Callable
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daa_ext.fragments import Fragment, Shape, cut, gaps, share, whole

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=150)
WORLDS = [1, 2, 3, 7, 200]
SHAPES: list[Shape] = [(5, 9), (6,), (), (2, 3, 4), (1, 1), (0, 4), (4, 0), (0,), (7, 1), (1, 8)]
PADDING = -1

shape = st.lists(st.integers(0, 5), max_size=3).map(tuple)
parameters = st.lists(st.tuples(shape, st.integers(0, 4)), min_size=1, max_size=6)


def named(shapes: list[Shape]) -> list[tuple[str, Shape]]:
    return [(f"p{index}", shape) for index, shape in enumerate(shapes)]


def contents(index: int, shape: Shape) -> torch.Tensor:
    """A parameter whose elements occur nowhere else."""
    return (torch.arange(prod(shape)) + 1000 * index).view(shape)


# cut


@given(parameters, st.sampled_from(WORLDS), st.integers(0, 2))
@EXAMPLES
def test_cuts_hold_each_element_of_a_flat_buffer_once(
    padded: list[tuple[Shape, int]], world: int, spare: int
) -> None:
    """`padded`: shapes, each with the padding before it; `spare` lengthens every partition."""
    shapes = [shape for shape, _ in padded]
    ends = list(accumulate(prod(shape) + padding for shape, padding in padded))
    offsets = [end - prod(shape) for end, shape in zip(ends, shapes, strict=True)]
    length = -(-ends[-1] // world) + spare
    flat = torch.full((world * length,), PADDING)
    for index, (offset, shape) in enumerate(zip(offsets, shapes, strict=True)):
        flat[offset : offset + prod(shape)] = contents(index, shape).view(-1)
    held: list[Fragment] = []
    for rank, partition in enumerate(flat.clone().split(length) if length else []):
        begin = rank * length
        for piece in cut(named(shapes), offsets, begin, begin + length):
            assert piece.numel > 0
            own = partition[piece.offset : piece.offset + piece.numel]
            source = contents(int(piece.name[1:]), piece.shape).view(-1)
            assert own.tolist() == source[piece.start : piece.start + piece.numel].tolist()
            own.fill_(PADDING)
            held.append(piece)
        assert (partition == PADDING).all(), "an element that no fragment names"
    assert gaps(dict(named(shapes)), held) == []


def test_cut_of_the_buffer_in_the_module_s_picture() -> None:
    both = [("w", (3, 4)), ("b", (3,))]
    first, second = (cut(both, [0, 12], begin, begin + 8) for begin in (0, 8))
    assert first == [Fragment("w", (3, 4), 0, 8, 0)]
    assert second == [Fragment("w", (3, 4), 8, 4, 0), Fragment("b", (3,), 0, 3, 4)]
    assert [first[0].rows, second[0].rows, second[1].rows] == [(0, 2), (2, 3), (0, 3)]
    parts = [share("w", (3, 4), rank, 2) for rank in range(2)]
    assert [(f.rows, f.skipped, f.numel) for f in parts] == [((0, 2), 0, 6), ((1, 3), 2, 6)]
    assert [share("b", (3,), rank, 2).numel for rank in range(2)] == [2, 1]


def test_cut_leaves_out_what_it_does_not_reach() -> None:
    both = [("a", (4,)), ("empty", (0, 3)), ("b", (4,))]
    assert [f.name for f in cut(both, [0, 4, 4], 0, 4)] == ["a"]
    assert [f.name for f in cut(both, [0, 4, 4], 3, 5)] == ["a", "b"]
    assert cut(both, [0, 4, 4], 2, 2) == []
    assert cut(both, [0, 4, 4], 8, 16) == []


# share


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shares_concatenate_to_the_parameter(shape: Shape, world: int) -> None:
    flat = contents(0, shape).view(-1)
    parts = [share("w", shape, rank, world, offset=10) for rank in range(world)]
    pieces = [flat[f.start : f.start + f.numel] for f in parts]
    assert torch.equal(torch.cat(pieces), flat)
    assert gaps({"w": shape}, parts) == []
    assert {f.offset for f in parts} == {10}
    length = -(-flat.numel() // world)
    lengths = [f.numel for f in parts]
    assert lengths == sorted(lengths, reverse=True), "short and empty parts come last"
    assert lengths[0] == min(length, flat.numel())
    assert sum(0 < n < length for n in lengths) <= 1


def test_trailing_ranks_have_empty_shares() -> None:
    assert [share("w", (5, 1), rank, 4).numel for rank in range(4)] == [2, 2, 1, 0]
    assert [share("w", (), rank, 3).numel for rank in range(3)] == [1, 0, 0]
    empty = share("w", (), 2, 3)
    assert (empty.start, empty.rows, empty.skipped) == (1, (0, 0), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_share_of_one_rank_is_the_whole(shape: Shape) -> None:
    assert share("w", shape, 0, 1, 3) == whole("w", shape, 3)
    assert whole("w", shape).is_whole
    first, second = (share("w", shape, rank, 2) for rank in range(2))
    assert first.is_whole == (prod(shape) < 2)
    assert second.is_whole == (prod(shape) == 0)


# rows


@given(shape.filter(lambda shape: prod(shape) > 0), st.data())
@EXAMPLES
def test_rows_are_those_of_the_elements(shape: Shape, data: st.DataObject) -> None:
    """Against numpy: the row of each element, a row being one index of the first dimension."""
    start = data.draw(st.integers(0, prod(shape) - 1))
    numel = data.draw(st.integers(1, prod(shape) - start))
    rows = np.indices(shape)[0].ravel() if shape else np.zeros(1, dtype=int)
    touched = rows[start : start + numel]
    piece = Fragment("w", shape, start, numel)
    assert piece.rows == (touched.min(), touched.max() + 1)
    assert piece.skipped == (rows[:start] == touched[0]).sum()
    assert piece.columns == (rows == 0).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at", [0, 1])
def test_an_empty_fragment_touches_no_row(shape: Shape, at: int) -> None:
    piece = Fragment("w", shape, at * prod(shape), 0)
    assert (piece.rows, piece.skipped) == ((0, 0), 0)


# gaps


def replaced(parts: list[Fragment], index: int, **changes: Any) -> list[Fragment]:
    piece = parts[index]
    parts[index] = Fragment(**{**vars(piece), **changes})
    return parts


FAULTS: dict[str, Callable[[list[Fragment]], list[Fragment]]] = {
    "first missing": lambda parts: parts[1:],
    "middle missing": lambda parts: [parts[0], *parts[2:]],
    "last missing": lambda parts: parts[:-1],
    "all missing": lambda parts: [],
    "first doubled": lambda parts: [parts[0], *parts],
    "middle doubled": lambda parts: [parts[1], *parts],
    "last doubled": lambda parts: [*parts, parts[-1]],
    "all doubled": lambda parts: [*parts, *parts],
    "one more element": lambda parts: replaced(parts, 0, numel=parts[0].numel + 1),
    "one element less": lambda parts: replaced(parts, 1, numel=parts[1].numel - 1),
    "from one earlier": lambda parts: replaced(parts, 1, start=parts[1].start - 1),
    "past the end": lambda parts: replaced(parts, 2, numel=parts[2].numel + 1),
    "last element twice": lambda parts: [*parts, Fragment("w", (3, 5), 14, 1)],
    "all shapes wrong": lambda parts: [Fragment("w", (5, 3), f.start, f.numel) for f in parts],
    "one shape wrong": lambda parts: replaced(parts, 1, shape=(15,)),
    "an empty part's shape": lambda parts: [*parts, Fragment("w", (3, 4), 15, 0)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_gaps_finds_what_is_not_held_exactly_once(name: str) -> None:
    shapes = {"a": (4,), "w": (3, 5), "z": ()}
    others = [share("a", (4,), rank, 3) for rank in range(3)] + [whole("z", ())]
    parts = [share("w", (3, 5), rank, 3) for rank in range(3)]
    assert gaps(shapes, [*parts, *others]) == []
    assert gaps(shapes, [*others, *reversed(parts)]) == [], "in any order"
    assert gaps(shapes, [*FAULTS[name](parts), *others]) == ["w"]


def test_gaps_finds_a_parameter_that_two_ranks_hold_whole() -> None:
    assert gaps({"w": (3, 5)}, [whole("w", (3, 5))]) == []
    assert gaps({"w": (3, 5)}, [whole("w", (3, 5)), whole("w", (3, 5))]) == ["w"]


def test_gaps_of_parameters_without_elements() -> None:
    shapes: dict[str, Shape] = {"empty": (0, 4), "w": (2,)}
    assert gaps(shapes, [whole("w", (2,))]) == [], "nothing to hold"
    assert gaps(shapes, [whole("w", (2,)), whole("empty", (0, 4))]) == []
    assert gaps(shapes, [whole("w", (2,)), Fragment("empty", (0, 4), 0, 1)]) == ["empty"]
    assert gaps(shapes, []) == ["w"]
