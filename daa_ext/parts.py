"""What a rank keeps of the anchor of one parameter: the part of its own fragment.

Shapes: N columns, R the rank kept, m the rows that the fragment touches. A part never looks at
the rest of the parameter: it needs its rows of U diag(S) and, for the time of a product, Vt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # bound on fp32 copies of a gradient of another type, 64 MiB


@dataclass
class DensePart:
    """Elements of a dense anchor: `values` is flat, one per element of the fragment."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def inner(self, grad: Tensor) -> Tensor:
        """<grad, anchor> over the fragment as a 0-d fp64 tensor; `grad` is flat."""
        total = grad.new_zeros((), dtype=torch.float64)
        chunks = (flat.split(CHUNK_ELEMENTS) for flat in (grad, self.values))
        for piece, values in zip(*chunks, strict=True):
            total += torch.dot(piece.float(), values)
        return total

    def blend_(self, grad: Tensor, domain: float, anchor: float) -> None:
        """grad <- domain * grad + anchor * (this part of the anchor), in place; `grad` is flat."""
        grad.mul_(domain).add_(self.values, alpha=anchor)


@dataclass
class FactorPart:
    """Rows of a factorized anchor.

    Args:
        US_mR: rows of U diag(S) that the fragment touches.
        columns: N.
        skipped: elements of the first of these rows that lie before the fragment.
        Vt: gives Vt_RN, on whatever device it lies. It is called in every product, also by a
            rank whose fragment is empty, because it may be a collective (ZeRO-3).
        Vt_bytes: what this rank keeps of Vt for this part.
    """

    US_mR: Tensor
    columns: int
    skipped: int
    Vt: Callable[[], Tensor]
    Vt_bytes: int

    @property
    def nbytes(self) -> int:
        return self.US_mR.nbytes + self.Vt_bytes

    def inner(self, grad: Tensor) -> Tensor:
        """<grad, anchor> over the fragment as a 0-d fp64 tensor; `grad` is flat."""
        Vt_RN = self.Vt().to(grad.device)
        total = grad.new_zeros((), dtype=torch.float64)
        for piece, US_kR, columns in self._blocks(grad):
            G_kn = piece.view(US_kR.shape[0], -1).float()
            total += ((US_kR.T @ G_kn) * Vt_RN[:, columns]).sum(dtype=torch.float64)
        return total

    def blend_(self, grad: Tensor, domain: float, anchor: float) -> None:
        """grad <- domain * grad + anchor * (this part of the anchor), in place; `grad` is flat."""
        Vt_RN = self.Vt().to(grad.device)
        for piece, US_kR, columns in self._blocks(grad):
            G_kn = piece.view(US_kR.shape[0], -1)
            if G_kn.dtype == US_kR.dtype:
                G_kn.addmm_(US_kR, Vt_RN[:, columns], beta=domain, alpha=anchor)
            else:
                G_kn.mul_(domain).add_(US_kR @ Vt_RN[:, columns], alpha=anchor)

    def _blocks(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """(elements, their rows of US, their columns): whole rows, but for a cut first and last."""
        done, row = 0, 0
        while done < flat.numel():
            left = flat.numel() - done
            column = self.skipped if row == 0 else 0
            if column or left < self.columns:  # part of one row
                rows, length = 1, min(left, self.columns - column)
            else:
                rows = min(left, max(CHUNK_ELEMENTS, self.columns)) // self.columns
                length = rows * self.columns
            width = length // rows
            yield (
                flat[done : done + length],
                self.US_mR[row : row + rows],
                slice(column, column + width),
            )
            done, row = done + length, row + rows


Part = Union[DensePart, FactorPart]
