"""The anchor's factors, whoever computes them: one rank, replicas, ZeRO-1/2, ZeRO-3."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import spawned
import torch
from spawned import ALONE, Outcomes
from test_artifact import make_manifest
from torch import Tensor

from daa_ext import artifact
from daa_ext.artifact import AnchorReader, read_manifest, tensors_of, verify_files, write_anchor
from daa_ext.factorize import factorize, files
from daa_ext.fragments import Fragment, Shape, cut, share, whole
from daa_ext.lowrank import compress
from daa_ext.manifest import describe
from daa_ext.ranks import Ranks

SIZE, RANK, SEED = 3, 4, 7
Held = list[list[Fragment]]

# Exact and randomized SVD, tall and wide, of full rank and not, zero; smaller than the ranks.
SHAPES: dict[str, Shape] = {
    "wide": (24, 61), "bias": (13,), "tall": (50, 20), "zero": (20, 30), "scalar": (),
    "random": (70, 90), "pair": (2,), "deficient": (30, 40), "one": (1, 1), "cube": (2, 3, 4),
    "small": (3, 3), "second": (64, 66),
}  # fmt: skip
MODELS: dict[str, dict[str, Shape]] = {
    "many": SHAPES,
    "two": {name: SHAPES[name] for name in ("wide", "bias")},
    "one": {"tall": (50, 20)},
}
GAP = 5  # padding between two parameters of a flat buffer


def gradient(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sorted(SHAPES).index(name))
    shape = SHAPES[name]
    if name == "zero":
        return torch.zeros(shape)
    if name == "deficient":
        left, right = (torch.randn(n, 2, generator=generator) for n in shape)
        return left @ right.T
    return torch.randn(shape, generator=generator)


# who holds what


def replicated(shapes: dict[str, Shape]) -> Held:
    return [[whole(name, shape) for name, shape in shapes.items()]]


def partitions(shapes: dict[str, Shape]) -> Held:
    """ZeRO-1/2: one flat buffer in equal partitions, cut wherever it falls."""
    ends = list(itertools.accumulate(prod(shape) + GAP for shape in shapes.values()))
    offsets = [end - prod(shape) for end, shape in zip(ends, shapes.values(), strict=True)]
    length = -(-ends[-1] // SIZE)
    return [
        cut(list(shapes.items()), offsets, rank * length, (rank + 1) * length)
        for rank in range(SIZE)
    ]


def shares(shapes: dict[str, Shape]) -> Held:
    """ZeRO-3: each parameter cut by itself."""
    return [[share(name, s, rank, SIZE) for name, s in shapes.items()] for rank in range(SIZE)]


LAYOUTS: dict[str, Callable[[dict[str, Shape]], Held]] = {
    "alone": replicated, "replicated": replicated, "partitions": partitions, "shares": shares,
}  # fmt: skip


# what each rank does; the tests look at what came out


@dataclass(frozen=True)
class Watched(Ranks):
    """Ranks that note how many elements each call of `bring` brings here, by parameter."""

    brought: list[list[int]] = field(default_factory=list)

    def bring(self, *args: Any) -> dict[int, Tensor]:
        came = super().bring(*args)
        self.brought.append([flat.numel() for flat in came.values()])
        return came


@dataclass
class Outcome:
    """What one rank computed, and what passed through its memory."""

    terms: list[str]
    entries: dict[str, dict[str, Any]]
    asked: list[int]  # elements of each fragment that `own` was asked for
    brought: list[list[int]]
    files: list[str]
    received: int  # elements that came here to be written


def build(model: str, layout: str, folder: Path, ranks: Ranks) -> Outcome:
    """All that a run does from its gradients to the folder `model layout`, in files of 2 KB."""
    asked: list[int] = []

    def own(fragment: Fragment) -> Tensor:
        asked.append(fragment.numel)
        flat = gradient(fragment.name).view(-1)
        return flat[fragment.start : fragment.start + fragment.numel].clone()

    watched = Watched(**vars(ranks))
    terms, entries = factorize(LAYOUTS[layout](MODELS[model]), own, watched, RANK, SEED)
    manifest = make_manifest({}, tensors=entries, rank=RANK, seed=SEED)
    outcome = Outcome(list(terms), entries, asked, watched.brought, [], 0)

    def written() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for file, tensors in files(terms, manifest, ranks):
            outcome.files.append(file)
            outcome.received += sum(tensor.numel() for tensor in tensors.values())
            yield file, tensors

    with mock.patch.object(artifact, "MAX_FILE", "2KB"):
        if ranks.rank == 0:
            write_anchor(folder / f"{model} {layout}", written(), manifest)
        else:
            list(written())
    return outcome


SHARED = [layout for layout in LAYOUTS if layout != "alone"]
ALL = list(itertools.product(MODELS, SHARED))


@dataclass
class Built:
    """The folders "model layout", and what each rank of each run on three saw."""

    folder: Path
    outcomes: list[Outcomes]

    def each(self, model: str, layout: str) -> list[Outcome]:
        return [outcome[f"{model} {layout}"] for outcome in self.outcomes]

    def files(self, model: str, layout: str) -> dict[str, bytes]:
        folder = self.folder / f"{model} {layout}"
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("factorize")
    cases = {f"{m} {layout}": partial(build, m, layout, folder) for m, layout in ALL}
    for model in MODELS:
        build(model, "alone", folder, ALONE)
    return Built(folder, spawned.run(cases, folder, SIZE))


EVERY_RUN = pytest.mark.parametrize(("model", "layout"), ALL)


@EVERY_RUN
def test_the_folder_is_the_same_bit_by_bit(built: Built, model: str, layout: str) -> None:
    alone = built.files(model, "alone")
    assert built.files(model, layout) == alone
    if model == "many":
        assert sum(name.endswith(".safetensors") for name in alone) > 3


@pytest.mark.parametrize("model", MODELS)
def test_the_folder_holds_what_compress_gives_for_each_gradient(built: Built, model: str) -> None:
    folder = built.folder / f"{model} shares"
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    reader = AnchorReader(folder, manifest)
    assert list(manifest.tensors) == sorted(MODELS[model])
    for name, shape in MODELS[model].items():
        term, energy = compress(gradient(name), RANK, SEED)
        assert manifest.tensors[name] == describe(term, shape, energy)
        found, wanted = tensors_of(name, reader.term(name)), tensors_of(name, term)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_gradients_are_of_all_kinds(built: Built) -> None:
    """Without this the tests above could pass on an anchor that is all dense."""
    tensors = read_manifest(built.folder / "many alone").tensors
    ranks = {name: entry["rank"] for name, entry in tensors.items()}
    factorized = {"wide": 4, "tall": 4, "random": 4, "second": 4, "deficient": 2, "zero": 1}
    assert ranks == {**dict.fromkeys(SHAPES), **factorized}
    assert tensors["zero"]["norm"] == 0.0
    other, _ = compress(gradient("random"), RANK, SEED + 1)
    same, _ = compress(gradient("wide"), RANK, SEED + 1)
    folder = built.folder / "many alone"
    reader = AnchorReader(folder, read_manifest(folder))
    assert not torch.equal(reader.whole("random.U"), tensors_of("random", other)["random.U"])
    assert torch.equal(reader.whole("wide.U"), tensors_of("wide", same)["wide.U"])


@EVERY_RUN
def test_each_parameter_is_computed_by_one_rank(built: Built, model: str, layout: str) -> None:
    outcomes = built.each(model, layout)
    names = [name for outcome in outcomes for name in outcome.terms]
    assert sorted(names) == sorted(MODELS[model])
    most = -(-len(names) // SIZE)
    assert all(len(outcome.terms) in (most - 1, most) for outcome in outcomes), "shared evenly"
    assert all(outcome.entries == outcomes[0].entries for outcome in outcomes)
    assert all(outcome.files == outcomes[0].files for outcome in outcomes)


@EVERY_RUN
def test_no_rank_holds_more_than_one_gradient_at_a_time(
    built: Built, model: str, layout: str
) -> None:
    sizes = {name: prod(shape) for name, shape in MODELS[model].items()}
    rounds = -(-len(sizes) // SIZE)
    held = LAYOUTS[layout](MODELS[model])
    for rank, outcome in enumerate(built.each(model, layout)):
        own = [sizes[name] for name in outcome.terms]
        if layout == "replicated":  # nothing moves: each rank has the gradients that it takes
            assert outcome.asked == own
            assert outcome.brought == []
        else:
            assert len(outcome.brought) == rounds
            assert [n for came in outcome.brought for n in came] == own
            assert all(len(came) <= 1 for came in outcome.brought), "one matrix in each round"
            assert sorted(outcome.asked) == sorted(f.numel for f in held[rank] if f.numel)
            assert sum(outcome.asked) < sum(sizes.values()) or len(sizes) == 1


def test_the_costly_ones_come_first(built: Built) -> None:
    first = [outcome.terms[0] for outcome in built.each("many", "shares")]
    assert first == ["random", "second", "deficient"]


@EVERY_RUN
def test_all_tensors_come_to_the_first_rank(built: Built, model: str, layout: str) -> None:
    first, *others = built.each(model, layout)
    stored = 0
    for name in MODELS[model]:
        term, _ = compress(gradient(name), RANK, SEED)
        stored += sum(tensor.numel() for tensor in vars(term).values())
    assert first.received == stored
    assert all(outcome.received == 0 for outcome in others)
    assert all(outcome.terms for outcome in others) or len(MODELS[model]) < SIZE


def test_a_rank_may_have_nothing_to_compute(built: Built) -> None:
    for layout in SHARED:
        assert [len(outcome.terms) for outcome in built.each("two", layout)] == [1, 1, 0]
        assert [len(outcome.terms) for outcome in built.each("one", layout)] == [1, 0, 0]


def test_the_terms_keep_no_memory_but_their_own() -> None:
    terms, _ = factorize(
        replicated(MODELS["many"]), lambda f: gradient(f.name).view(-1), ALONE, RANK, SEED
    )
    for term in terms.values():
        storages = {t.untyped_storage().data_ptr(): t for t in vars(term).values()}
        assert sum(t.untyped_storage().nbytes() for t in storages.values()) == term.nbytes
