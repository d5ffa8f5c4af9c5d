"""Vt under ZeRO-3: every rank needs all of it for a moment, and keeps 1/world_size of it.

ZeRO-3 cuts each matrix into row blocks over all ranks, so each rank multiplies with the whole Vt
of every matrix. Kept whole, that is 2.6 GB on every GPU for an 8B model at rank 512. Here the Vt
of several matrices stand one after another in a bucket, each rank keeps one equal part of the
bucket, and one all-gather brings it together in a buffer that all buckets share.

    memory       Vt / world_size + one buffer of BUCKET_BYTES (or of the largest Vt)
    per step     every bucket twice (inner products, then blends), less the one still there;
                 nothing at all where the whole Vt fits one bucket
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from daa_ext.fragments import Shape, cut
from daa_ext.ranks import Ranks

BUCKET_BYTES = 128 << 20
FP32_BYTES = 4


@dataclass
class Bucket:
    """Some matrices' Vt in one flat buffer: `offsets` by name, `part` of it on this rank."""

    offsets: dict[str, int]
    numel: int  # padded to a multiple of the ranks
    part: Tensor


class GatheredVt:
    """Vt of many matrices, cut over the ranks, gathered a bucket at a time.

    Args:
        shapes: (R, N) of each matrix's Vt, in the order in which steps will ask for them.
        read: (name, start, numel) -> these elements of that Vt, flat, fp32.
        ranks: who shares them, and on which device.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], read: Callable[[str, int, int], Tensor], ranks: Ranks
    ) -> None:
        self.shapes = dict(shapes)
        self.ranks = ranks
        self.gathered_bytes = 0  # received from other ranks since the start
        self._current: Bucket | None = None
        self._bucket_of: dict[str, Bucket] = {}
        for names in self._divide():
            bucket = self._fill(names, read)
            self._bucket_of |= dict.fromkeys(names, bucket)
        buckets = {id(bucket): bucket for bucket in self._bucket_of.values()}.values()
        self.nbytes = sum(bucket.part.nbytes for bucket in buckets)
        largest = max((bucket.numel for bucket in buckets), default=0)
        self.buffer = torch.empty(largest, device=ranks.device)

    def matrix(self, name: str) -> Tensor:
        """Vt_RN of `name`, valid until another is asked for. Collective."""
        bucket = self._bucket_of[name]
        if bucket is not self._current:
            self.ranks.gather_into(self.buffer[: bucket.numel], bucket.part)
            self.gathered_bytes += (self.ranks.size - 1) * bucket.part.nbytes
            self._current = bucket
        start, shape = bucket.offsets[name], self.shapes[name]
        return self.buffer[start : start + prod(shape)].view(shape)

    def _divide(self) -> list[list[str]]:
        """The names in order, in runs whose Vt fit a bucket together."""
        divided: list[list[str]] = []
        filled = 0
        for name, shape in self.shapes.items():
            size = prod(shape) * FP32_BYTES
            if not divided or filled + size > BUCKET_BYTES:
                divided.append([])
                filled = 0
            divided[-1].append(name)
            filled += size
        return divided

    def _fill(self, names: list[str], read: Callable[[str, int, int], Tensor]) -> Bucket:
        offsets, total = {}, 0
        for name in names:
            offsets[name] = total
            total += prod(self.shapes[name])
        length = -(-total // self.ranks.size)
        begin = self.ranks.rank * length
        part = torch.zeros(length)
        parameters = [(name, self.shapes[name]) for name in names]
        for piece in cut(parameters, list(offsets.values()), begin, begin + length):
            part[piece.offset : piece.offset + piece.numel] = read(
                piece.name, piece.start, piece.numel
            )
        return Bucket(offsets, length * self.ranks.size, part.to(self.ranks.device))
