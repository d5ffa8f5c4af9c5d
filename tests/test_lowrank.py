"""The anchor of one parameter: compression, norm, bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daa_ext.lowrank import MAX_FACTOR_SHARE, AnchorTerm, Dense, LowRank, compress, factors_pay

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_norm_and_bytes() -> None:
    assert Dense(torch.full((3, 4), 2.0)).norm() == pytest.approx(48**0.5)
    assert (Dense(noise(3, 4)).nbytes, Dense(noise(3, 4)).rank) == (48, None)
    term, _ = compress(noise(40, 30), 5)
    assert term.norm() == pytest.approx(term.dense().double().norm().item(), rel=1e-6)
    assert (term.nbytes, term.rank) == (4 * 5 * (40 + 1 + 30), 5)


@pytest.mark.parametrize("shape", [(6, 5), (1, 4), (4, 1)])
def test_dense_is_the_factors_multiplied_out(shape: tuple[int, int]) -> None:
    U_MR, S_R, Vt_RN = noise(shape[0], 2), noise(2, seed=1).abs(), noise(2, shape[1], seed=2)
    whole = LowRank(U_MR, S_R, Vt_RN).dense()
    torch.testing.assert_close(whole, U_MR @ torch.diag(S_R) @ Vt_RN)
    assert whole.shape == shape
    assert torch.equal(Dense(noise(*shape)).dense(), noise(*shape))


# compression


def matrix(m: int, n: int, decay: float = 0.85) -> Tensor:
    """Singular values 1, decay, decay^2, ... in random directions."""
    values = decay ** torch.arange(min(m, n), dtype=torch.float64)
    U = torch.linalg.qr(noise(m, len(values)).double()).Q
    V = torch.linalg.qr(noise(n, len(values), seed=1).double()).Q
    return ((U * values) @ V.T).float()


def optimum(gradient: Tensor, rank: int) -> float:
    """The largest energy share that any matrix of this rank can keep (Eckart and Young)."""
    squares = torch.linalg.svdvals(gradient.double()).square()
    return float(squares[:rank].sum() / squares.sum())


def share_kept(term: AnchorTerm, gradient: Tensor) -> float:
    """1 - ||G - A||^2 / ||G||^2, multiplied out."""
    error = (gradient.double() - term.dense().double()).square().sum()
    return 1.0 - float(error / gradient.double().square().sum())


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (36, 36), (400, 7), (7, 400)])
def test_exact_compression_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    gradient, rank = noise(*shape), 3
    term, energy = compress(gradient, rank)
    assert term.rank == rank
    assert energy == pytest.approx(optimum(gradient, rank), rel=1e-5)
    U, S, Vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    torch.testing.assert_close(term.dense().double(), best, rtol=0, atol=1e-4)


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
    wholes = [term.dense() for term in (first, second, other)]
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
    assert torch.equal(term.dense(), torch.zeros(shape))


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
