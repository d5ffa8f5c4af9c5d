"""The anchor as a rank holds it while it trains: the parts of its own fragments, no more.

one process, DDP, ZeRO-0   all of it on every rank (each rank steps every weight)
ZeRO-1, 2                  the rows of its partition; Vt of the matrices it touches
ZeRO-3                     the rows of its part of every matrix; 1/world_size of every Vt
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from daa_ext.artifact import AnchorReader
from daa_ext.fragments import Fragment
from daa_ext.gathered import GatheredVt
from daa_ext.layout import Layout
from daa_ext.parts import DensePart, FactorPart, Part
from daa_ext.ranks import Ranks


@dataclass
class ResidentAnchor:
    """This rank's parts by parameter name, and what all parts of all ranks have in common."""

    parts: dict[str, Part]
    norm: float  # ||g_hat|| of the whole anchor
    gathered: GatheredVt | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the anchor on this rank, without `buffer_nbytes`."""
        shared = self.gathered.nbytes if self.gathered is not None else 0
        return sum(part.nbytes for part in self.parts.values()) + shared

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the buffer in which Vt is gathered (ZeRO-3)."""
        return self.gathered.buffer.nbytes if self.gathered is not None else 0


def load(
    reader: AnchorReader, layout: Layout, ranks: Ranks, device: torch.device
) -> ResidentAnchor:
    """Read what this rank needs of an anchor, by slices.

    Args:
        device: where the inner optimizer's gradients lie.
    """
    fragments = layout.fragments_of(ranks.rank)
    gathered = None
    if layout.cuts_every_parameter and ranks.size > 1:
        factorized = [f.name for f in fragments if reader.is_factorized(f.name)]
        gathered = GatheredVt(_shapes_of_vt(reader, factorized), partial(_read_vt, reader), ranks)
    parts = {f.name: _part(reader, f, gathered, device) for f in fragments}
    return ResidentAnchor(parts, reader.manifest.norm, gathered)


def _part(
    reader: AnchorReader, fragment: Fragment, gathered: GatheredVt | None, device: torch.device
) -> Part:
    name = fragment.name
    if not reader.is_factorized(name):
        return DensePart(reader.flat(name, fragment.start, fragment.numel).to(device))
    rank = reader.manifest.tensors[name]["rank"]
    first, last = fragment.rows
    U_mR = reader.flat(f"{name}.U", first * rank, (last - first) * rank).view(-1, rank)
    US_mR = U_mR.mul_(reader.whole(f"{name}.S")).to(device)
    if gathered is not None:
        Vt, held = partial(gathered.matrix, name), 0
    else:
        Vt_RN = reader.whole(f"{name}.Vt").to(device)
        Vt, held = partial(_itself, Vt_RN), Vt_RN.nbytes
    return FactorPart(US_mR, fragment.columns, fragment.skipped, Vt, held)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _shapes_of_vt(reader: AnchorReader, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    entries = reader.manifest.tensors
    return {name: (entries[name]["rank"], entries[name]["shape"][1]) for name in names}


def _read_vt(reader: AnchorReader, name: str, start: int, numel: int) -> torch.Tensor:
    return reader.flat(f"{name}.Vt", start, numel)
