"""Vt in buckets over the ranks: whole whenever asked for, kept once, gathered when needed."""

import itertools
from dataclasses import dataclass
from functools import partial
from math import prod
from unittest import mock

import pytest
import spawned
import torch
from spawned import ALONE, Cases, Outcomes
from torch import Tensor

from daa_ext import gathered
from daa_ext.fragments import Shape
from daa_ext.gathered import GatheredVt
from daa_ext.ranks import Ranks

SIZE = 3
SHAPES: dict[str, Shape] = {"a": (2, 5), "b": (3, 7), "c": (1, 1), "d": (4, 10), "e": (2, 2)}
SIZES = {name: prod(shape) for name, shape in SHAPES.items()}  # 10, 21, 1, 40, 4
# {bytes of a bucket: the matrices that lie in one}, written out
BUCKETS: dict[int, list[str]] = {
    1: ["a", "b", "c", "d", "e"],  # smaller than any matrix
    4 * 30: ["a", "bc", "d", "e"],
    4 * 31: ["ab", "c", "d", "e"],  # exactly filled by two; d is larger than a bucket
    4 * 41: ["abc", "d", "e"],
    4 * 44: ["abc", "de"],
    4 * 76 - 1: ["abcd", "e"],
    4 * 76: ["abcde"],  # exactly filled by all
    1 << 20: ["abcde"],
}
FORWARD, BACKWARD = list(SHAPES), list(SHAPES)[::-1]
ORDERS = {
    "forward": FORWARD,
    "backward": BACKWARD,
    "step": BACKWARD + FORWARD,  # inner products, then blends
    "twice each": [name for name in FORWARD for _ in range(2)],
    "zigzag": ["e", "a", "d", "b", "c", "a", "e", "e", "b"],
}
ALL = list(itertools.product(BUCKETS, ORDERS))
WORLDS = pytest.mark.parametrize("world", [1, SIZE])
EVERY_BUCKET = pytest.mark.parametrize("size", BUCKETS)
Found = dict[int, list[Outcomes]]  # by number of ranks


@dataclass
class Outcome:
    """What one rank saw."""

    matrices: list[tuple[str, Tensor]]
    bytes_after: list[int]  # gathered_bytes after each matrix
    nbytes: int
    buffer: int  # elements
    read: list[tuple[str, int, int]]
    views: bool  # whether each matrix lay in the buffer


def whole(name: str) -> Tensor:
    return (torch.arange(SIZES[name]) + 1000.0 * ord(name)).view(SHAPES[name])


def gather(size: int, order: str, ranks: Ranks) -> Outcome:
    """One rank's work: build with buckets of `size` bytes, then ask for all matrices in `order`."""
    read: list[tuple[str, int, int]] = []

    def reader(name: str, start: int, numel: int) -> Tensor:
        read.append((name, start, numel))
        return whole(name).view(-1)[start : start + numel]

    with mock.patch.object(gathered, "BUCKET_BYTES", size):
        vt = GatheredVt(SHAPES, reader, ranks)
    outcome = Outcome([], [], vt.nbytes, vt.buffer.numel(), read, True)
    storage = vt.buffer.untyped_storage().data_ptr()
    for name in ORDERS[order]:
        matrix = vt.matrix(name)
        outcome.views &= matrix.untyped_storage().data_ptr() == storage
        outcome.matrices.append((name, matrix.clone()))
        outcome.bytes_after.append(vt.gathered_bytes)
    return outcome


def cases() -> Cases:
    return {f"{size} {order}": partial(gather, size, order) for size, order in ALL}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Found:
    alone = {name: case(ALONE) for name, case in cases().items()}
    folder = tmp_path_factory.mktemp("gathered")
    return {1: [alone], SIZE: spawned.run(cases(), folder, SIZE)}


def of_each(outcomes: Found, world: int, size: int, order: str) -> list[Outcome]:
    return [outcome[f"{size} {order}"] for outcome in outcomes[world]]


def padded(size: int, world: int) -> list[int]:
    """Elements of each bucket, padded to a multiple of the ranks."""
    totals = (sum(SIZES[name] for name in bucket) for bucket in BUCKETS[size])
    return [-(-total // world) * world for total in totals]


@WORLDS
@EVERY_BUCKET
@pytest.mark.parametrize("order", ORDERS)
def test_each_matrix_is_whole_whenever_it_is_asked_for(
    outcomes: Found, world: int, size: int, order: str
) -> None:
    for outcome in of_each(outcomes, world, size, order):
        assert [name for name, _ in outcome.matrices] == ORDERS[order]
        assert all(torch.equal(matrix, whole(name)) for name, matrix in outcome.matrices)
        assert outcome.views, "one buffer for all: no other copy of a whole Vt"


@WORLDS
@EVERY_BUCKET
def test_each_element_is_read_and_kept_by_one_rank(outcomes: Found, world: int, size: int) -> None:
    everyones = of_each(outcomes, world, size, "forward")
    for name in SHAPES:
        pieces = sorted(
            read[1:] for outcome in everyones for read in outcome.read if read[0] == name
        )
        ends = [start + numel for start, numel in pieces]
        assert [0, *ends] == [*(start for start, _ in pieces), SIZES[name]]
    total = sum(outcome.nbytes for outcome in everyones)
    assert total == 4 * sum(padded(size, world))
    assert 0 <= total - 4 * sum(SIZES.values()) < 4 * world * len(BUCKETS[size])
    assert len({outcome.nbytes for outcome in everyones}) == 1, "equal parts"


@WORLDS
@EVERY_BUCKET
def test_the_buffer_is_as_large_as_the_largest_bucket(
    outcomes: Found, world: int, size: int
) -> None:
    for outcome in of_each(outcomes, world, size, "forward"):
        assert outcome.buffer == max(padded(size, world))


@WORLDS
@EVERY_BUCKET
@pytest.mark.parametrize("order", ORDERS)
def test_a_bucket_is_gathered_when_another_was_there_before(
    outcomes: Found, world: int, size: int, order: str
) -> None:
    """The traffic, matrix by matrix: the parts of all other ranks, nothing for the same again."""
    lengths = dict(zip(BUCKETS[size], padded(size, world), strict=True))
    bucket_of = {name: bucket for bucket in BUCKETS[size] for name in bucket}
    for outcome in of_each(outcomes, world, size, order):
        expected, before = 0, ""
        for name, found in zip(ORDERS[order], outcome.bytes_after, strict=True):
            if bucket_of[name] != before:
                expected += 4 * lengths[bucket_of[name]] // world * (world - 1)
            before = bucket_of[name]
            assert found == expected


def test_all_in_one_bucket_is_gathered_once(outcomes: Found) -> None:
    for size in (4 * 76, 1 << 20):
        for outcome in of_each(outcomes, SIZE, size, "zigzag"):
            assert outcome.bytes_after == [2 * 4 * 26] * len(ORDERS["zigzag"])
    for outcome in of_each(outcomes, SIZE, 4 * 76 - 1, "zigzag"):
        assert len(set(outcome.bytes_after)) > 2, "one byte less makes two buckets"


def test_a_step_finds_the_last_bucket_still_there(outcomes: Found) -> None:
    """Backwards, then forwards: each bucket twice, less one."""
    for size in BUCKETS:
        all_once, all_twice = (
            of_each(outcomes, SIZE, size, order)[0].bytes_after[-1]
            for order in ("backward", "step")
        )
        first = padded(size, SIZE)[0] // SIZE * (SIZE - 1) * 4
        assert all_twice == 2 * all_once - first


@WORLDS
def test_nothing_is_gathered_before_it_is_asked_for(outcomes: Found, world: int) -> None:
    for outcome in of_each(outcomes, world, 1, "forward"):
        first = outcome.bytes_after[0]
        assert first == 4 * padded(1, world)[0] // world * (world - 1)
        assert first < outcome.bytes_after[-1] or world == 1


def test_no_matrix_needs_no_memory() -> None:
    vt = GatheredVt({}, lambda name, start, numel: torch.empty(numel), ALONE)
    assert (vt.nbytes, vt.buffer.numel(), vt.gathered_bytes) == (0, 0, 0)


def test_a_rank_of_many_may_have_nothing_but_padding() -> None:
    """8 ranks, one bucket of 10 elements: parts of 2, the last three ranks without an element."""
    read: list[int] = []

    def reader(name: str, start: int, numel: int) -> Tensor:
        read.append(numel)
        return whole(name).view(-1)[start : start + numel]

    parts = [GatheredVt({"a": (2, 5)}, reader, Ranks(rank, 8, spawned.CPU)) for rank in range(8)]
    assert [vt.nbytes for vt in parts] == [8] * 8
    assert read == [2] * 5
    assert {vt.buffer.numel() for vt in parts} == {16}
