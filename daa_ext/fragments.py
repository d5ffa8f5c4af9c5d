"""Where the elements of a parameter lie when ranks share it: fragments of flat buffers.

ZeRO-1/2 lay all parameters of a group in one flat buffer, in their own order, and cut it into
equal partitions wherever the cut falls, also in mid-row. ZeRO-3 cuts every parameter by itself.
Two ranks, `w` of shape (3, 4) and `b` of shape (3,), padded to a multiple of the ranks:

    ZeRO-1/2   w w w w w w w w | w w w w b b b .        rank 0: w[0:8]        rows 0, 1
                                                        rank 1: w[8:12] b[0:3]
    ZeRO-3     w w w w w w | w w w w w w                rank 0: w[0:6] b[0:2] rows 0, 1 (half)
               b b | b .                                rank 1: w[6:12] b[2:3]

No torch, no host: `layout` and `zero` say which of these a run has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of parameter `name`, in row-major order.

    They are elements [offset, offset + numel) of the flat buffer that this rank's optimizer
    holds. `numel` may be 0: the rank has no part of the parameter, or nothing but padding.
    """

    name: str
    shape: Shape
    start: int
    numel: int
    offset: int = 0

    @property
    def columns(self) -> int:
        """Elements per row, a row being one index of the first dimension."""
        return prod(self.shape[1:])

    @property
    def rows(self) -> tuple[int, int]:
        """[first, last) of the rows that the fragment touches, whole or in part."""
        if self.numel == 0:
            return (0, 0)
        return self.start // self.columns, -(-(self.start + self.numel) // self.columns)

    @property
    def skipped(self) -> int:
        """Elements of the first touched row that lie before the fragment."""
        return self.start - self.rows[0] * self.columns if self.numel else 0

    @property
    def is_whole(self) -> bool:
        return self.numel == prod(self.shape)


def whole(name: str, shape: Shape, offset: int = 0) -> Fragment:
    """The fragment that is the parameter."""
    return Fragment(name, shape, 0, prod(shape), offset)


def cut(
    parameters: Sequence[tuple[str, Shape]], offsets: Sequence[int], begin: int, end: int
) -> list[Fragment]:
    """What lies in [begin, end) of a flat buffer that holds `parameters` at `offsets`.

    Parameters without an element there are left out. The fragments' offsets count from `begin`.
    """
    fragments = []
    for (name, shape), offset in zip(parameters, offsets, strict=True):
        first, last = max(offset, begin), min(offset + prod(shape), end)
        if first < last:
            fragments.append(Fragment(name, shape, first - offset, last - first, first - begin))
    return fragments


def share(name: str, shape: Shape, rank: int, world_size: int, offset: int = 0) -> Fragment:
    """Rank `rank`'s part of one parameter cut into `world_size` parts of equal length.

    The length is ceil(elements / world_size), so trailing ranks may have fewer, or none.
    """
    total = prod(shape)
    length = -(-total // world_size)
    start = min(rank * length, total)
    return Fragment(name, shape, start, min(length, total - start), offset)


def gaps(shapes: dict[str, Shape], held: Iterable[Fragment]) -> list[str]:
    """Names of parameters whose elements are not held exactly once by `held` (of all ranks)."""
    parts: dict[str, list[Fragment]] = {name: [] for name in shapes}
    for fragment in held:
        parts[fragment.name].append(fragment)
    wrong = []
    for name, shape in shapes.items():
        reached = 0
        for fragment in sorted((f for f in parts[name] if f.numel), key=lambda f: f.start):
            if fragment.start != reached:
                reached = -1  # a gap, or elements held twice
                break
            reached += fragment.numel
        if reached != prod(shape) or any(f.shape != shape for f in parts[name]):
            wrong.append(name)
    return wrong
