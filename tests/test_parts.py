"""What a rank keeps of the anchor of one parameter: slices of it, arithmetic with slices."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import part_of
from torch import Tensor

from daa_ext import parts
from daa_ext.fragments import Fragment, share
from daa_ext.lowrank import AnchorTerm, Dense, LowRank
from daa_ext.parts import DensePart, FactorPart, Part

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)
side = st.integers(1, 9)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def terms(m: int, n: int, rank: int) -> Iterator[tuple[AnchorTerm, Tensor]]:
    """Both kinds of term of an (m, n) parameter, each with the matrix that it stands for."""
    U_MR, S_R, Vt_RN = noise(m, rank), noise(rank, seed=1).abs(), noise(rank, n, seed=2)
    yield LowRank(U_MR, S_R, Vt_RN), U_MR @ torch.diag(S_R) @ Vt_RN
    yield Dense(noise(m, n)), noise(m, n)


def piece(m: int, n: int, start: int, numel: int) -> Fragment:
    return Fragment("w", (m, n), start, numel)


def elements(part: Part, numel: int) -> Tensor:
    """The part's own slice of the anchor."""
    flat = torch.zeros(numel)
    part.blend_(flat, 1.0, 1.0)
    return flat


def shards(numel: int, world: int) -> list[tuple[int, int]]:
    """(start, numel) per rank, as ZeRO cuts: equal lengths, the last ones short or empty."""
    length = -(-numel // world)
    ends = [min(rank * length, numel) for rank in range(world + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(ends)]


# law 3


@pytest.mark.parametrize("world", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("shape", [(5, 9), (1, 6), (6, 1), (2, 3), (1, 1), (3, 16)])
def test_law_3_shards_concatenate_to_the_whole(shape: tuple[int, int], world: int) -> None:
    m, n = shape
    fragments = [share("w", shape, rank, world) for rank in range(world)]
    assert [(f.start, f.numel) for f in fragments] == shards(m * n, world)
    for term, whole in terms(m, n, min(2, m, n)):
        found = [elements(part_of(term, fragment), fragment.numel) for fragment in fragments]
        torch.testing.assert_close(torch.cat(found), whole.view(-1))


@given(side, side, st.data())
@EXAMPLES
def test_law_3_any_cuts_concatenate_to_the_whole(m: int, n: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, m * n), max_size=6))
    for term, whole in terms(m, n, data.draw(st.integers(1, min(m, n)))):
        pairs = itertools.pairwise([0, *sorted(cuts), m * n])
        found = [elements(part_of(term, piece(m, n, a, b - a)), b - a) for a, b in pairs]
        torch.testing.assert_close(torch.cat(found), whole.view(-1))


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_law_3_of_parameters_that_are_no_matrices(shape: tuple[int, ...], world: int) -> None:
    fragments = [share("w", shape, rank, world) for rank in range(world)]
    found = [elements(part_of(Dense(noise(*shape)), f), f.numel) for f in fragments]
    assert torch.equal(torch.cat(found), noise(*shape).view(-1))


def test_a_part_holds_the_rows_that_it_touches_and_no_more() -> None:
    (factors, _), (dense, _) = terms(6, 5, 2)
    for start, numel, rows in ((10, 15, 3), (12, 9, 3), (12, 2, 1), (14, 2, 2), (15, 0, 0)):
        part = part_of(factors, piece(6, 5, start, numel))
        assert isinstance(part, FactorPart)
        assert part.US_mR.shape == (rows, 2)
        assert part.nbytes == part.US_mR.untyped_storage().nbytes() + 4 * 2 * 5
        flat = part_of(dense, piece(6, 5, start, numel))
        assert isinstance(flat, DensePart)
        assert flat.nbytes == 4 * numel


# arithmetic with a slice


CUTS = {
    "whole": (0, 63),
    "one row": (9, 9),
    "whole rows": (18, 36),
    "rows from mid-row": (4, 18),
    "inside a row": (11, 5),
    "over a border": (16, 4),
    "tail": (50, 13),
    "one element": (62, 1),
    "empty": (27, 0),
    "empty at the end": (63, 0),
}


@pytest.mark.parametrize("scratch", [1, 9, 20, 1 << 24])
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_and_blend_equal_dense_arithmetic(
    name: str, scratch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CHUNK_ELEMENTS", scratch)
    start, numel = CUTS[name]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for term, whole in terms(7, 9, 3):
        part = part_of(term, piece(7, 9, start, numel))
        buffer = noise(numel + 2, seed=5).to(dtype)
        grad = buffer[1:-1]
        before, own = grad.double(), whole.view(-1)[start : start + numel].double()
        inner = part.inner(grad)
        assert inner.dtype == torch.float64
        assert inner.shape == ()
        torch.testing.assert_close(inner, before.dot(own), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), before, rtol=0, atol=0)
        part.blend_(grad, 0.7, -1.3)
        expected = 0.7 * before - 1.3 * own
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)
        edges = noise(numel + 2, seed=5).to(dtype)
        assert (buffer[0], buffer[-1]) == (edges[0], edges[-1]), "only the slice may change"


@pytest.mark.parametrize("cut", [(0, 63), (4, 18)])
def test_blend_has_no_effect_at_anchor_zero_and_one_above(cut: tuple[int, int]) -> None:
    for term, _ in terms(7, 9, 3):
        part, grad = part_of(term, piece(7, 9, *cut)), noise(cut[1], seed=5)
        part.blend_(grad, 1.0, 0.0)
        assert torch.equal(grad, noise(cut[1], seed=5))
        part.blend_(grad, 1.0, 1e-3)
        assert (grad != noise(cut[1], seed=5)).sum() > 0.9 * cut[1]


@pytest.mark.parametrize("numel", [63, 5, 0])
def test_each_product_asks_for_vt_once_whatever_the_rank_holds(numel: int) -> None:
    """Vt may come by a collective: a rank that did not ask would leave the others waiting."""
    Vt_RN, asked = noise(3, 9), []
    fragment = piece(7, 9, 0, numel)

    def give() -> Tensor:
        asked.append(None)
        return Vt_RN

    US_mR = noise(7, 3)[: fragment.rows[1]]
    part = FactorPart(US_mR, fragment.columns, fragment.skipped, give, Vt_bytes=0)
    part.inner(noise(numel))
    assert len(asked) == 1
    part.blend_(noise(numel), 0.5, 0.5)
    assert len(asked) == 2
