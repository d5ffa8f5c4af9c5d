"""The anchor's factors, computed by all ranks together; no rank ever holds the whole gradient.

Matrices are taken in order of cost, as many at a time as there are ranks: those of one round
cost about the same, each comes together on one rank, is factorized there, and makes room for the
next. What the ranks have computed then goes to rank 0 file by file, as it is written.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from daa_ext.artifact import plan_files, tensors_of
from daa_ext.fragments import Fragment, Shape
from daa_ext.lowrank import AnchorTerm, compress, factors_pay
from daa_ext.manifest import Manifest, describe
from daa_ext.ranks import Ranks

Terms = dict[str, AnchorTerm]
Entries = dict[str, dict[str, Any]]  # of Manifest.tensors


def factorize(
    held: Sequence[Sequence[Fragment]],
    own: Callable[[Fragment], Tensor],
    ranks: Ranks,
    rank: int,
    seed: int,
) -> tuple[Terms, Entries]:
    """Compress every parameter's gradient. Collective.

    Args:
        held: the fragments of each rank. Where all ranks hold all parameters, one list is enough.
        own: this rank's elements of one of its fragments, flat, fp32.
        rank: ceiling of the factors' rank.
        seed: of `lowrank.compress`.

    Returns:
        The terms that this rank has computed (on the CPU), and the manifest's entries of all.
    """
    replicated = len(held) < ranks.size
    by_name: dict[str, list[Fragment | None]] = {}
    for index, fragments in enumerate(held):
        for fragment in fragments:
            row: list[Fragment | None] = [None] * len(held)
            by_name.setdefault(fragment.name, row)[index] = fragment
    shapes = {f.name: f.shape for fragments in held for f in fragments}
    order = sorted(shapes, key=lambda name: (-_cost(shapes[name], rank), name))
    terms: Terms = {}
    entries: Entries = {}
    rounds = range(0, len(order), ranks.size)
    for first in tqdm(rounds, desc="Compressing the anchor", disable=ranks.rank > 0):
        names = order[first : first + ranks.size]
        if replicated:
            mine = by_name[names[ranks.rank]][0] if ranks.rank < len(names) else None
            brought = {ranks.rank: own(mine)} if mine is not None else {}
        else:
            brought = ranks.bring([(i, by_name[name]) for i, name in enumerate(names)], own)
        for index, flat in brought.items():
            name = names[index]
            term, energy = compress(flat.view(shapes[name]), rank, seed)
            terms[name] = _on_cpu(term)
            entries[name] = describe(term, shapes[name], energy)
    merged = {name: entry for part in ranks.gather(entries) for name, entry in part.items()}
    return terms, {name: merged[name] for name in sorted(merged)}


def files(
    terms: Terms, manifest: Manifest, ranks: Ranks
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of every file of the anchor, on rank 0; elsewhere the tensors are empty.

    Collective: all ranks must exhaust it. Rank 0 holds the tensors of one file at a time.
    """
    tensors = {key: t for name, term in terms.items() for key, t in tensors_of(name, term).items()}
    owners: dict[str, int] = {}
    for rank, keys in enumerate(ranks.gather(list(tensors))):
        owners |= dict.fromkeys(keys, rank)
    for file, shapes in plan_files(manifest).items():
        yield (
            file,
            {
                key: ranks.send_to_first(owners[key], shape, tensors.get(key))
                for key, shape in shapes.items()
            },
        )


def _cost(shape: Shape, rank: int) -> int:
    """A measure of the work on one parameter; multiplications, but for a constant."""
    return prod(shape) * (min(shape) if factors_pay(shape, rank) else 1)


def _on_cpu(term: AnchorTerm) -> AnchorTerm:
    parts: dict[str, torch.Tensor] = {key: tensor.cpu() for key, tensor in vars(term).items()}
    return type(term)(**parts)
