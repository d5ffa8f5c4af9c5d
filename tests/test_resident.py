"""The anchor in memory: the parts of all ranks are the anchor, and no rank holds or reads more."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from unittest import mock

import pytest
import spawned
import torch
from spawned import CPU
from test_artifact import files, make_manifest
from torch import Tensor

from daa_ext import gathered
from daa_ext.artifact import AnchorReader, read_manifest, write_anchor
from daa_ext.fragments import Fragment, Shape, cut, share
from daa_ext.layout import Buffer, Layout, Replicated
from daa_ext.lowrank import AnchorTerm, Dense, LowRank
from daa_ext.manifest import anchor_bytes
from daa_ext.parts import DensePart
from daa_ext.ranks import Ranks
from daa_ext.resident import ResidentAnchor, load

WORLDS = [1, 2, 3, 4]
SIZE = 3
LAYERS = 32
LAW_8 = 1.05  # what all ranks hold together, in anchors
GAP = 3  # padding between two parameters of a flat buffer
SMALL, LARGE = 4 * 500, 128 << 20  # bytes of a bucket: a small part of all Vt, and all of it
Terms = dict[str, AnchorTerm]


class Partitions(Layout):
    """ZeRO-1/2: one flat buffer in equal partitions, cut wherever it falls."""

    sharded = True

    def __init__(self, shapes: dict[str, Shape], world: int) -> None:
        self.parameters = list(shapes.items())
        self.world = world
        ends = list(itertools.accumulate(prod(shape) + GAP for shape in shapes.values()))
        self.offsets = [end - prod(s) for end, s in zip(ends, shapes.values(), strict=True)]
        self.length = -(-ends[-1] // world)

    def fragments_of(self, rank: int) -> list[Fragment]:
        begin = rank * self.length
        return cut(self.parameters, self.offsets, begin, begin + self.length)

    def buffers(self) -> list[Buffer]:
        raise NotImplementedError

    def raw(self) -> Iterator[tuple[Fragment, Tensor]]:
        raise NotImplementedError


class Shares(Partitions):
    """ZeRO-3: each parameter cut by itself."""

    cuts_every_parameter = True

    def fragments_of(self, rank: int) -> list[Fragment]:
        return [share(name, shape, rank, self.world) for name, shape in self.parameters]


class Counting(AnchorReader):
    """Counts the elements that are asked for, by tensor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, read_manifest(folder))
        self.flats: list[tuple[str, int, int]] = []
        self.wholes: list[str] = []

    def flat(self, tensor: str, start: int, numel: int) -> Tensor:
        self.flats.append((tensor, start, numel))
        return super().flat(tensor, start, numel)

    def whole(self, tensor: str) -> Tensor:
        self.wholes.append(tensor)
        return super().whole(tensor)


# the anchor


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(m: int, rank: int, n: int, seed: int) -> LowRank:
    return LowRank(noise(m, rank, seed=seed), noise(rank, seed=seed), noise(rank, n, seed=seed))


def make_terms() -> Terms:
    """Many matrices of the ranks 1 to 4, with what is stored dense between them."""
    terms: Terms = {"embed": low_rank(60, 4, 24, seed=1), "scalar": Dense(noise(seed=2))}
    for i in range(LAYERS):
        terms |= {
            f"{i}.q": low_rank(24, 3, 24, seed=100 * i),
            f"{i}.norm": Dense(noise(24, seed=100 * i + 10)),
            f"{i}.up": low_rank(50, 1 + i % 4, 24, seed=100 * i + 20),
            f"{i}.down": low_rank(24, 4, 50, seed=100 * i + 30),
        }
    return {
        **terms,
        "one": Dense(noise(1, 1, seed=3)),
        "empty": Dense(torch.empty(0, 4)),
        "cube": Dense(noise(2, 3, 4, seed=4)),
    }


TERMS = make_terms()
SHAPES: dict[str, Shape] = {name: tuple(term.dense().shape) for name, term in TERMS.items()}


def write(folder: Path, terms: Terms) -> Path:
    manifest = make_manifest(terms)
    write_anchor(folder, files(terms, manifest), manifest)
    return folder


def scaled(factor: float) -> Terms:
    """The anchor with other singular values."""
    return {
        name: LowRank(term.U_MR, factor * term.S_R, term.Vt_RN)
        if isinstance(term, LowRank)
        else term
        for name, term in TERMS.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("resident") / "anchor", TERMS)


def gradient(name: str) -> Tensor:
    return noise(prod(SHAPES[name]), seed=list(SHAPES).index(name))


# what each rank does; the tests look at what came out


@dataclass
class Outcome:
    """What one rank holds, and what it asked the reader for."""

    pieces: dict[str, tuple[Fragment, Tensor]]  # the anchor's elements, from each part
    inner: float  # <gradient, anchor> over this rank's fragments
    nbytes: int
    buffer_nbytes: int
    allocated: int  # bytes of the storages that the parts keep
    flats: list[tuple[str, int, int]]
    wholes: list[str]


def look(folder: Path, layout: Layout, ranks: Ranks) -> Outcome:
    reader = Counting(folder)
    anchor = load(reader, layout, ranks, CPU)
    flats, wholes = list(reader.flats), list(reader.wholes)
    pieces, inner = {}, 0.0
    for fragment in layout.fragments_of(ranks.rank):
        own = slice(fragment.start, fragment.start + fragment.numel)
        inner += anchor.parts[fragment.name].inner(gradient(fragment.name)[own]).item()
        flat = torch.zeros(fragment.numel)
        anchor.parts[fragment.name].blend_(flat, 1.0, 1.0)
        pieces[fragment.name] = (fragment, flat)
    assert (reader.flats, reader.wholes) == (flats, wholes), "steps do not read the disk"
    return Outcome(
        pieces, inner, anchor.nbytes, anchor.buffer_nbytes, allocated(anchor), flats, wholes
    )


def allocated(anchor: ResidentAnchor) -> int:
    tensors = []
    for part in anchor.parts.values():
        tensors.append(part.values if isinstance(part, DensePart) else part.US_mR)
        if anchor.gathered is None and not isinstance(part, DensePart):
            tensors.append(part.Vt())
    if anchor.gathered is not None:
        tensors += {id(b): b.part for b in anchor.gathered._bucket_of.values()}.values()
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def partitioned(folder: Path, world: int) -> list[Outcome]:
    """All ranks of ZeRO-1/2, one after another: `load` and products need no other rank there."""
    layout = Partitions(SHAPES, world)
    return [look(folder, layout, Ranks(rank, world, CPU)) for rank in range(world)]


def shared(folder: Path, size: int, ranks: Ranks) -> Outcome:
    """A rank of ZeRO-3 with buckets of `size` bytes."""
    with mock.patch.object(gathered, "BUCKET_BYTES", size):
        return look(folder, Shares(SHAPES, ranks.size), ranks)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[Outcome]]:
    """All ranks of every run."""
    cases = {f"ZeRO-3, {size}": partial(shared, folder, size) for size in (SMALL, LARGE)}
    outcomes = spawned.run(cases, folder.parent, SIZE)
    return {
        **{name: [outcome[name] for outcome in outcomes] for name in cases},
        **{f"ZeRO-2 on {world}": partitioned(folder, world) for world in WORLDS},
        "ZeRO-3 on 1": [shared(folder, SMALL, spawned.ALONE)],
    }


ZERO_2 = [f"ZeRO-2 on {world}" for world in WORLDS]
ZERO_3 = [f"ZeRO-3, {size}" for size in (SMALL, LARGE)]
EVERY_RUN = pytest.mark.parametrize("name", [*ZERO_2, *ZERO_3, "ZeRO-3 on 1"])
Runs = dict[str, list[Outcome]]


def whole(outcomes: list[Outcome], name: str) -> Tensor:
    """A parameter's anchor from the pieces of all ranks."""
    pieces = [outcome.pieces[name] for outcome in outcomes if name in outcome.pieces]
    pieces.sort(key=lambda piece: piece[0].start)
    return torch.cat([torch.empty(0), *(flat for _, flat in pieces)])


@EVERY_RUN
def test_the_parts_of_all_ranks_are_the_anchor(runs: Runs, name: str) -> None:
    for parameter, term in TERMS.items():
        found = whole(runs[name], parameter)
        torch.testing.assert_close(found, term.dense().reshape(-1), rtol=1e-5, atol=1e-5)
        if isinstance(term, Dense):
            assert torch.equal(found, term.values.reshape(-1))


@EVERY_RUN
def test_the_inner_products_of_all_ranks_add_up(runs: Runs, name: str) -> None:
    expected = sum(
        gradient(parameter).double().dot(term.dense().reshape(-1).double()).item()
        for parameter, term in TERMS.items()
    )
    assert sum(outcome.inner for outcome in runs[name]) == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1.0


@EVERY_RUN
def test_law_8_all_ranks_together_hold_one_anchor(runs: Runs, folder: Path, name: str) -> None:
    total = anchor_bytes(read_manifest(folder))
    held = [outcome.nbytes for outcome in runs[name]]
    assert 0.9 * total < sum(held) <= LAW_8 * total
    assert max(held) <= 1.15 * total / len(held), "in equal parts, but for a matrix on the border"
    spare = {outcome.allocated - outcome.nbytes for outcome in runs[name]}
    assert spare <= {0, 4}, "counted as it is; 4: a scalar is read whole, also for an empty part"


def test_replicas_hold_one_anchor_each(folder: Path) -> None:
    """The counterpart of law 8: without sharding each rank steps all weights."""
    layout = Replicated([(name, torch.zeros(shape)) for name, shape in SHAPES.items()])
    first, second = (look(folder, layout, Ranks(rank, 2, CPU)) for rank in range(2))
    singular = sum(term.S_R.nbytes for term in TERMS.values() if isinstance(term, LowRank))
    assert first.nbytes == second.nbytes == anchor_bytes(read_manifest(folder)) - singular
    for name, term in TERMS.items():
        assert torch.equal(first.pieces[name][1], second.pieces[name][1])
        torch.testing.assert_close(first.pieces[name][1], term.dense().reshape(-1))


@EVERY_RUN
def test_only_zero_3_on_several_ranks_has_a_buffer(runs: Runs, name: str) -> None:
    buffers = {outcome.buffer_nbytes for outcome in runs[name]}
    all_vt = sum(t.Vt_RN.nbytes for t in TERMS.values() if isinstance(t, LowRank))
    if name == ZERO_3[0]:
        assert max(buffers) <= SMALL + 4 * SIZE
        assert min(buffers) > SMALL // 2
    elif name == ZERO_3[1]:
        assert buffers == {-(-all_vt // (4 * SIZE)) * 4 * SIZE}
    else:
        assert buffers == {0}


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_the_singular_values_are_in_the_parts(runs: Runs, tmp_path: Path, factor: float) -> None:
    """Powers of two and zero scale without rounding."""
    other = partitioned(write(tmp_path / "anchor", scaled(factor)), 3)
    for name, term in TERMS.items():
        before, after = whole(runs["ZeRO-2 on 3"], name), whole(other, name)
        assert torch.equal(after, before * (factor if isinstance(term, LowRank) else 1.0))


def test_a_rank_without_fragments_holds_nothing(tmp_path: Path) -> None:
    terms: Terms = {"w": low_rank(8, 1, 6, seed=0), "b": Dense(noise(3, seed=1))}
    anchor = write(tmp_path / "anchor", terms)
    shapes: dict[str, Shape] = {"w": (8, 6), "b": (3,)}
    layout, held = Partitions(shapes, 60), []
    for rank in range(60):
        reader = Counting(anchor)
        resident = load(reader, layout, Ranks(rank, 60, CPU), CPU)
        held.append(resident.nbytes)
        if not layout.fragments_of(rank):
            assert (resident.parts, resident.buffer_nbytes) == ({}, 0)
            assert (reader.flats, reader.wholes) == ([], [])
    factors, none = [4 * (1 + 6)] * 48, [0] * GAP  # a row of U diag(S), and Vt
    assert held == [*none, *factors, *none, 4, 4, 4, *none]
    assert load(Counting(anchor), layout, Ranks(0, 60, CPU), CPU).norm == 1.5


@EVERY_RUN
def test_a_rank_reads_its_rows_and_no_more(runs: Runs, name: str) -> None:
    for outcome in runs[name]:
        allowed: dict[str, int] = {}
        touched = set()
        for parameter, (fragment, _) in outcome.pieces.items():
            term = TERMS[parameter]
            if isinstance(term, LowRank):
                first, last = fragment.rows
                allowed[f"{parameter}.U"] = (last - first) * term.S_R.numel()
                touched |= {f"{parameter}.S"} | (set() if name in ZERO_3 else {f"{parameter}.Vt"})
            else:
                allowed[parameter] = fragment.numel
        asked = {tensor: numel for tensor, _, numel in outcome.flats if not is_vt(tensor)}
        assert asked == allowed
        assert len(outcome.flats) == len({tensor for tensor, _, _ in outcome.flats}), "once"
        assert sorted(outcome.wholes) == sorted(touched)


@pytest.mark.parametrize("name", ZERO_3)
def test_each_element_of_vt_is_read_by_one_rank(runs: Runs, name: str) -> None:
    for parameter, term in TERMS.items():
        if isinstance(term, LowRank):
            flats = [flat for outcome in runs[name] for flat in outcome.flats]
            pieces = sorted(flat[1:] for flat in flats if flat[0] == f"{parameter}.Vt")
            ends = [start + numel for start, numel in pieces]
            assert [0, *ends] == [*(start for start, _ in pieces), term.Vt_RN.numel()]


def is_vt(tensor: str) -> bool:
    return tensor.endswith(".Vt")
