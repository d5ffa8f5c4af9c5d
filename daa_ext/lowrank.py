"""The anchor of one parameter: factors U diag(S) Vt, or the tensor itself where that is smaller.

Shapes: M rows, N columns, R the rank kept. `Dense` and `LowRank` are the anchor of a whole
parameter, as it is computed and stored; `parts` has what a rank keeps of it while it trains.
"""

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

OVERSAMPLE = 16  # extra random directions (Halko, Martinsson, Tropp 2011, sec. 4.2)
POWER_ITERATIONS = 2
# Measured (docs/method.md): exact SVD wins while min(M, N) < 3 (rank + OVERSAMPLE).
EXACT_UP_TO = 3
# Factors cost two matrix products a step; they must save at least a quarter of the memory.
MAX_FACTOR_SHARE = 0.75


@dataclass
class Dense:
    """A parameter's anchor kept as it is (vectors, small matrices). `values`: any shape."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def rank(self) -> int | None:
        return None

    def norm(self) -> float:
        return torch.linalg.vector_norm(self.values, dtype=torch.float64).item()

    def dense(self) -> Tensor:
        """The whole anchor, in the parameter's shape."""
        return self.values


@dataclass
class LowRank:
    """U diag(S) Vt of an (M, N) matrix: U_MR and Vt_RN with orthonormal columns and rows."""

    U_MR: Tensor
    S_R: Tensor
    Vt_RN: Tensor

    @property
    def nbytes(self) -> int:
        return self.U_MR.nbytes + self.S_R.nbytes + self.Vt_RN.nbytes

    @property
    def rank(self) -> int | None:
        return self.S_R.numel()

    def norm(self) -> float:
        return torch.linalg.vector_norm(self.S_R, dtype=torch.float64).item()

    def dense(self) -> Tensor:
        """The whole anchor multiplied out, shape (M, N)."""
        return (self.U_MR * self.S_R) @ self.Vt_RN


AnchorTerm = Union[Dense, LowRank]


def factors_pay(shape: tuple[int, ...], rank: int) -> bool:
    """Whether rank-`rank` factors of a parameter of this shape are small enough to keep."""
    if len(shape) != 2 or min(shape) == 0:
        return False
    rank = min(rank, *shape)
    return rank * (sum(shape) + 1) <= MAX_FACTOR_SHARE * shape[0] * shape[1]


def compress(gradient: Tensor, rank: int, seed: int = 0) -> tuple[AnchorTerm, float]:
    """The anchor term of one fp32 gradient and the share of its energy that the term keeps.

    Matrices whose rank-`rank` factors pay are factorized: exactly (LAPACK) where min(M, N) is
    below EXACT_UP_TO * (rank + OVERSAMPLE), else by a randomized range finder (Halko et al.
    2011, alg. 4.4 and 5.1), whose error is not estimated but measured: the approximation is an
    orthogonal projection, so ||G - A||^2 = ||G||^2 - ||A||^2, and energy = ||A||^2 / ||G||^2.
    Singular values below fp32 resolution are dropped: `rank` is a ceiling.

    Args:
        gradient: fp32, any shape, finite.
        rank: ceiling of the rank, >= 1.
        seed: of the random directions; the result does not depend on the global generator.
    """
    if not factors_pay(tuple(gradient.shape), rank):
        return Dense(gradient), 1.0
    kept = min(rank, *gradient.shape)
    if min(gradient.shape) <= EXACT_UP_TO * (kept + OVERSAMPLE):
        U_MR, S_R, Vt_RN = torch.linalg.svd(gradient, full_matrices=False)
    else:
        U_MR, S_R, Vt_RN = _randomized_svd(gradient, kept + OVERSAMPLE, seed)
    kept = max(1, int((S_R[:kept] > torch.finfo(S_R.dtype).eps * S_R[0]).sum()))
    cuts = (U_MR[:, :kept], S_R[:kept], Vt_RN[:kept])  # cloned: views keep the whole SVD
    term = LowRank(*(cut.clone(memory_format=torch.contiguous_format) for cut in cuts))
    whole = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
    return term, min(1.0, (term.norm() / whole) ** 2) if whole > 0.0 else 1.0


def _randomized_svd(G_MN: Tensor, directions: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device=G_MN.device).manual_seed(seed)
    omega = torch.randn(
        G_MN.shape[1], directions, generator=generator, device=G_MN.device, dtype=G_MN.dtype
    )
    Q_MK = torch.linalg.qr(G_MN @ omega).Q
    for _ in range(POWER_ITERATIONS):
        Q_NK = torch.linalg.qr(G_MN.T @ Q_MK).Q
        Q_MK = torch.linalg.qr(G_MN @ Q_NK).Q
    U_KK, S_K, Vt_KN = torch.linalg.svd(Q_MK.T @ G_MN, full_matrices=False)
    return Q_MK @ U_KK, S_K, Vt_KN
