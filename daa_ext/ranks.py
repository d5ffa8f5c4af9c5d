"""The ranks of a run, and what they do together. The only caller of torch.distributed.

Every method is a collective: all ranks call it, in the same order. With one rank each is a no-op
that gives back what it got.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from daa_ext.fragments import Fragment

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank's number, how many there are, and the device on which they exchange tensors."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_run(cls, device: torch.device) -> "Ranks":
        """All ranks of the process group, or the one rank of a run that has none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on the device of `values`. int64 wraps around modulo 2^64."""
        if self.size == 1:
            return values
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def gather(self, value: T) -> list[T]:
        """One picklable value of every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, check: Callable[[], T]) -> T:
        """check() of this rank. If it fails on any rank, it fails on all: no rank waits for ever.

        Raises:
            ValueError: what `check` raised here, or, naming rank and host, on another rank.
        """
        result, error = None, None
        try:
            result = check()
        except ValueError as caught:
            error = caught
        words = self.gather(None if error is None else f"{error} (host {socket.gethostname()})")
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(words) if text]
        if failed and (error is None or len(failed) < self.size):
            raise ValueError(
                f"{len(failed)} of {self.size} ranks cannot go on. {failed[0]}"
            ) from error
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def refuse_differences(self, settings: Mapping[str, Any], mend: str) -> None:
        """Raise ValueError on every rank unless all of them bring the same `settings`."""
        everyones = self.gather(dict(settings))
        for key in dict.fromkeys(key for settings in everyones for key in settings):
            values = [other.get(key) for other in everyones]
            odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if odd is not None:
                raise ValueError(
                    f"{key}={values[0]} on rank 0, but {key}={values[odd]} on rank {odd}. {mend}"
                )

    def gather_into(self, buffer: Tensor, part: Tensor) -> None:
        """Fill `buffer` with every rank's `part` (all of one length), in the order of the ranks."""
        assert buffer.numel() == self.size * part.numel()
        if self.size == 1:
            buffer.copy_(part)
        else:
            dist.all_gather_into_tensor(buffer, part)

    def bring(
        self,
        wanted: Sequence[tuple[int, Sequence[Fragment | None]]],
        own: Callable[[Fragment], Tensor],
    ) -> dict[int, Tensor]:
        """Send fragments to the rank that wants them whole.

        Args:
            wanted: (destination, one fragment or None per rank) for each of several parameters;
                one destination never occurs twice.
            own: this rank's fp32 elements of one of its fragments, flat.

        Returns:
            {index in `wanted`: the flat parameter, fp32} for those that came to this rank.
        """
        brought: dict[int, Tensor] = {}
        operations: list[dist.P2POp] = []
        for index, (destination, fragments) in enumerate(wanted):
            mine = fragments[self.rank]
            if destination == self.rank:
                total = sum(fragment.numel for fragment in fragments if fragment is not None)
                flat = torch.empty(total, device=self.device)
                for source, fragment in enumerate(fragments):
                    if fragment is None or fragment.numel == 0:
                        continue
                    place = flat[fragment.start : fragment.start + fragment.numel]
                    if source == self.rank:
                        place.copy_(own(fragment))
                    else:
                        operations.append(dist.P2POp(dist.irecv, place, source))
                brought[index] = flat
            elif mine is not None and mine.numel > 0:
                sent = own(mine).to(self.device).contiguous()
                operations.append(dist.P2POp(dist.isend, sent, destination))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        return brought

    def send_to_first(self, owner: int, shape: tuple[int, ...], tensor: Tensor | None) -> Tensor:
        """An fp32 tensor of `owner`'s on rank 0 (on the CPU); elsewhere an empty one."""
        if self.rank == owner:
            assert tensor is not None
            if owner == 0:
                return tensor.cpu()
            dist.send(tensor.to(self.device).contiguous(), 0)
        elif self.rank == 0:
            received = torch.empty(shape, device=self.device)
            dist.recv(received, owner)
            return received.cpu()
        return torch.empty(0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
