"""Where this run keeps gradients: which fragments, in which flat buffers of which optimizer.

A layout answers what both stages ask, whatever shards the run:

    buffers()        what the inner optimizer steps, and which fragments lie in it
    fragments_of(r)  what rank r holds: the same answer on every rank
    raw()            this rank's gradients as backward left them: whole-batch, not clipped,
                     still multiplied by the loss scale
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from daa_ext.fragments import Fragment, Shape, gaps, whole
from daa_ext.parts import CHUNK_ELEMENTS


@dataclass
class Buffer:
    """A tensor that the inner optimizer steps, and the fragments that lie in it."""

    parameter: Tensor
    fragments: list[Fragment]


class Layout(ABC):
    """Base of all layouts.

    `sharded`: no element's gradient is on more than one rank. `cuts_every_parameter`: every
    parameter has a fragment, be it empty, on every rank (ZeRO-3).
    """

    sharded = False
    cuts_every_parameter = False

    @abstractmethod
    def buffers(self) -> list[Buffer]: ...

    @abstractmethod
    def fragments_of(self, rank: int) -> list[Fragment]: ...

    @abstractmethod
    def raw(self) -> Iterator[tuple[Fragment, Tensor]]:
        """(fragment, its flat gradient); what the batch did not reach may be left out."""

    def loss_scale(self) -> float:
        """What `raw` is multiplied by at this moment."""
        return 1.0

    def check(self, shapes: dict[str, Shape], world_size: int) -> None:
        """Assert that every element of every parameter is held exactly once."""
        ranks = range(world_size) if self.sharded else range(1)
        wrong = gaps(shapes, (f for rank in ranks for f in self.fragments_of(rank)))
        assert not wrong, f"not held exactly once: {wrong}"


class Replicated(Layout):
    """Every rank holds every gradient whole, in the model's own `.grad` (one process, DDP, ZeRO-0).

    Args:
        named: the model's parameters that train.
        buffers: where the inner optimizer steps copies of them; else it steps them.
    """

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], buffers: Sequence[Buffer] | None = None
    ) -> None:
        self._named = list(named)
        self._buffers = buffers

    def buffers(self) -> list[Buffer]:
        if self._buffers is not None:
            return list(self._buffers)
        return [Buffer(p, [whole(name, tuple(p.shape))]) for name, p in self._named]

    def fragments_of(self, rank: int) -> list[Fragment]:
        return [whole(name, tuple(p.shape)) for name, p in self._named]

    def raw(self) -> Iterator[tuple[Fragment, Tensor]]:
        for name, parameter in self._named:
            if parameter.grad is not None:
                yield whole(name, tuple(parameter.shape)), parameter.grad.reshape(-1)

    def discard(self) -> None:
        """Throw this step's gradients away."""
        for _, parameter in self._named:
            parameter.grad = None


def squared_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of flat tensors as a 0-d fp64 tensor on `device`; fp32 products."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        for piece in gradient.split(CHUNK_ELEMENTS):
            flat = piece.float()
            total += torch.dot(flat, flat).to(device)
    return total
