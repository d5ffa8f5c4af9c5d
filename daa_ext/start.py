"""The weights that a run started from: how far has it gone, and how to draw it back.

theta0 is sharded, and lies, as the weights that the optimizer steps: no rank holds more of it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from daa_ext.fragments import Fragment
from daa_ext.layout import Buffer, Layout, squared_norm
from daa_ext.parts import CHUNK_ELEMENTS


def starting_weights(layout: Layout) -> dict[str, Tensor]:
    """Copies of this rank's fragments, by parameter name. Call it while the weights are the base
    model's."""
    return {
        piece.name: _weights(buffer, piece).clone()
        for buffer in layout.buffers()
        for piece in buffer.fragments
    }


class Start:
    """theta0 beside the weights of `layout`.

    Args:
        theta0: of `starting_weights`, with a layout of the same fragments.
    """

    def __init__(self, layout: Layout, theta0: dict[str, Tensor]) -> None:
        self.theta0 = theta0
        self._pieces = {p.name: (b, p) for b in layout.buffers() for p in b.fragments}
        assert self._pieces.keys() == theta0.keys()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.theta0.values())

    def squared_norm(self, device: torch.device) -> Tensor:
        """||theta0||^2 over this rank's fragments as a 0-d fp64 tensor on `device`."""
        return squared_norm(self.theta0.values(), device)

    def squared_distance(self, device: torch.device) -> Tensor:
        """||theta - theta0||^2 over this rank's fragments as a 0-d fp64 tensor on `device`."""
        moved = (m for name, theta0 in self.theta0.items() for _, m in self.moved(name, theta0))
        return squared_norm(moved, device)

    @torch.no_grad()
    def moved(self, name: str, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of `beside`, flat like the fragment, each with its fp32 theta - theta0."""
        now = _weights(*self._pieces[name])
        chunks = (flat.split(CHUNK_ELEMENTS) for flat in (beside, now, self.theta0[name]))
        for piece, theta, theta0 in zip(*chunks, strict=True):
            yield piece, theta.float() - theta0.float()

    @torch.no_grad()
    def draw_back(self, name: str, factor: float) -> None:
        """theta <- theta0 + factor (theta - theta0) on one fragment; 0 <= factor < 1."""
        for theta, moved in self.moved(name, _weights(*self._pieces[name])):
            theta.sub_(moved, alpha=1.0 - factor)


def _weights(buffer: Buffer, piece: Fragment) -> Tensor:
    """The weights of a fragment, flat, where the optimizer steps them."""
    flat = buffer.parameter.detach().view(-1)
    return flat[piece.offset : piece.offset + piece.numel]
