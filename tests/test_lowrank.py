"""The anchor of one parameter: slices of it, arithmetic with slices, compression."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daa_ext import lowrank
from daa_ext.lowrank import MAX_FACTOR_SHARE, AnchorTerm, Dense, LowRank, compress, factors_pay

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)
side = st.integers(1, 9)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def terms(m: int, n: int, rank: int) -> Iterator[tuple[AnchorTerm, Tensor]]:
    """Both kinds of term of an (m, n) parameter, each with the matrix that it stands for."""
    U_MR, S_R, Vt_RN = noise(m, rank), noise(rank, seed=1).abs(), noise(rank, n, seed=2)
    yield LowRank(U_MR, S_R, Vt_RN), U_MR @ torch.diag(S_R) @ Vt_RN
    yield Dense(noise(m, n)), noise(m, n)


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
    for term, whole in terms(m, n, min(2, m, n)):
        parts = [term.dense_slice(*cut) for cut in shards(m * n, world)]
        assert [part.numel() for part in parts] == [numel for _, numel in shards(m * n, world)]
        torch.testing.assert_close(torch.cat(parts), whole.view(-1))


@given(side, side, st.data())
@EXAMPLES
def test_law_3_any_cuts_concatenate_to_the_whole(m: int, n: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, m * n), max_size=6))
    for term, whole in terms(m, n, data.draw(st.integers(1, min(m, n)))):
        pairs = itertools.pairwise([0, *sorted(cuts), m * n])
        parts = [term.dense_slice(a, b - a) for a, b in pairs]
        torch.testing.assert_close(torch.cat(parts), whole.view(-1))


def test_rows_are_the_rows_of_the_whole() -> None:
    term, whole = next(terms(6, 5, 2))
    assert isinstance(term, LowRank)
    torch.testing.assert_close(term.rows(2, 5), whole[2:5])
    assert term.rows(3, 3).shape == (0, 5)
    assert (term.rank, term.columns) == (2, 5)


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
    monkeypatch.setattr(lowrank, "SLICE_ELEMENTS", scratch)
    start, numel = CUTS[name]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for term, whole in terms(7, 9, 3):
        buffer = noise(numel + 2, seed=5).to(dtype)
        grad = buffer[1:-1]
        before, part = grad.double(), whole.view(-1)[start : start + numel].double()
        inner = term.inner(grad, start)
        assert inner.dtype == torch.float64
        assert inner.shape == ()
        torch.testing.assert_close(inner, before.dot(part), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), before, rtol=0, atol=0)
        term.blend_(grad, start, 0.7, -1.3)
        expected = 0.7 * before - 1.3 * part
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)
        edges = noise(numel + 2, seed=5).to(dtype)
        assert (buffer[0], buffer[-1]) == (edges[0], edges[-1]), "only the slice may change"


@pytest.mark.parametrize("cut", [(0, 63), (4, 18)])
def test_blend_has_no_effect_at_anchor_zero_and_one_above(cut: tuple[int, int]) -> None:
    for term, _ in terms(7, 9, 3):
        grad = noise(cut[1], seed=5)
        term.blend_(grad, cut[0], 1.0, 0.0)
        assert torch.equal(grad, noise(cut[1], seed=5))
        term.blend_(grad, cut[0], 1.0, 1e-3)
        assert (grad != noise(cut[1], seed=5)).sum() > 0.9 * cut[1]


def test_norm_and_bytes() -> None:
    assert Dense(torch.full((3, 4), 2.0)).norm() == pytest.approx(48**0.5)
    assert (Dense(noise(3, 4)).nbytes, Dense(noise(3, 4)).rank) == (48, None)
    term, _ = compress(noise(40, 30), 5)
    assert term.norm() == pytest.approx(term.dense_slice(0, 1200).double().norm().item(), rel=1e-6)
    assert term.nbytes == 4 * 5 * (40 + 1 + 30)


# compression


def matrix(m: int, n: int, decay: float = 0.85) -> Tensor:
    """Singular values 1, decay, decay^2, ... in random directions."""
    values = decay ** torch.arange(min(m, n), dtype=torch.float64)
    U = torch.linalg.qr(noise(m, len(values)).double()).Q
    V = torch.linalg.qr(noise(n, len(values), seed=1).double()).Q
    return ((U * values) @ V.T).float()


def whole_of(term: AnchorTerm, shape: torch.Size) -> Tensor:
    return term.dense_slice(0, shape.numel()).double().view(shape)


def optimum(gradient: Tensor, rank: int) -> float:
    """The largest energy share that any matrix of this rank can keep (Eckart and Young)."""
    squares = torch.linalg.svdvals(gradient.double()).square()
    return float(squares[:rank].sum() / squares.sum())


def share_kept(term: AnchorTerm, gradient: Tensor) -> float:
    """1 - ||G - A||^2 / ||G||^2, multiplied out."""
    error = (gradient.double() - whole_of(term, gradient.shape)).square().sum()
    return 1.0 - float(error / gradient.double().square().sum())


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (36, 36), (400, 7), (7, 400)])
def test_exact_compression_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    gradient, rank = noise(*shape), 3
    term, energy = compress(gradient, rank)
    assert term.rank == rank
    assert energy == pytest.approx(optimum(gradient, rank), rel=1e-5)
    U, S, Vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    torch.testing.assert_close(whole_of(term, gradient.shape), best, rtol=0, atol=1e-4)


RANDOMIZED = [(80, 100), (100, 80), (61, 61), (61, 500), (500, 61)]  # rank 4: min > 3 (4 + 16)


@pytest.mark.parametrize("shape", RANDOMIZED)
@pytest.mark.parametrize(("decay", "loss"), [(0.5, 1e-6), (0.85, 1e-3), (0.95, 1e-2), (1.0, 0.05)])
def test_randomized_compression_keeps_nearly_the_best_energy(
    shape: tuple[int, int], decay: float, loss: float
) -> None:
    """Within 1 % wherever the spectrum falls; 5 % on a flat one, which no anchor has."""
    gradient = matrix(*shape, decay=decay) if decay < 1.0 else noise(*shape)
    term, energy = compress(gradient, 4)
    assert term.rank == 4
    assert energy >= (1 - loss) * optimum(gradient, 4)
    assert energy == pytest.approx(share_kept(term, gradient), rel=1e-5)
    assert isinstance(term, LowRank)
    for rows in (term.U_MR.T, term.Vt_RN):
        torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)
    assert (term.S_R.diff() <= 0).all()


def test_randomized_compression_has_a_seed_of_its_own() -> None:
    gradient = noise(80, 100)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, energy = compress(gradient, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, again = compress(gradient, 4)
    other, _ = compress(gradient, 4, seed=1)
    wholes = [whole_of(term, gradient.shape) for term in (first, second, other)]
    assert torch.equal(wholes[0], wholes[1])
    assert energy == again
    assert not torch.equal(wholes[0], wholes[2]), "another seed takes other directions"


@pytest.mark.parametrize("shape", [(40, 30), (100, 80), (300, 90)])
@pytest.mark.parametrize("true_rank", [1, 3])
def test_rank_is_a_ceiling(shape: tuple[int, int], true_rank: int) -> None:
    gradient = noise(shape[0], true_rank) @ noise(true_rank, shape[1], seed=1)
    term, energy = compress(gradient, 9)
    assert term.rank == true_rank
    assert energy == pytest.approx(1.0, abs=1e-5)
    assert compress(noise(*shape), 9)[0].rank == 9


@pytest.mark.parametrize("shape", [(40, 30), (80, 100)])
def test_zero_matrix_keeps_nothing_and_no_nan(shape: tuple[int, int]) -> None:
    term, energy = compress(torch.zeros(shape), 4)
    assert (term.rank, term.norm(), energy) == (1, 0.0, 1.0)
    assert torch.equal(whole_of(term, torch.Size(shape)), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "shape", [(9,), (1,), (0,), (), (0, 5), (5, 0), (1, 9), (9, 1), (4, 4), (3, 20, 20)]
)
def test_vectors_empty_and_small_tensors_stay_dense(shape: tuple[int, ...]) -> None:
    gradient = noise(*shape)
    term, energy = compress(gradient, 4)
    assert isinstance(term, Dense)
    assert torch.equal(term.values, gradient)
    assert energy == 1.0


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 600))
@EXAMPLES
def test_factors_are_kept_only_where_they_pay(m: int, n: int, rank: int) -> None:
    term, _ = compress(noise(m, n), rank)
    assert isinstance(term, LowRank) == factors_pay((m, n), rank)
    kept = min(rank, m, n)
    if isinstance(term, LowRank):
        parts = (term.U_MR, term.S_R, term.Vt_RN)
        resident = sum(part.untyped_storage().nbytes() for part in parts)
        assert resident == term.nbytes <= MAX_FACTOR_SHARE * 4 * m * n
    else:
        assert 4 * kept * (m + 1 + n) > MAX_FACTOR_SHARE * 4 * m * n
