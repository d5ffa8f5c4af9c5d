"""What ranks do together: three gloo processes, and one rank, for which it is all a no-op."""

import time
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import spawned
import torch
from spawned import ALONE, CPU, Cases, Outcomes
from torch import Tensor

from daa_ext.fragments import Fragment, Shape, cut, share, whole
from daa_ext.ranks import Ranks

SIZE = 3
MEND = "Start all nodes alike."


# what each rank does; the tests look at what came out


def who(ranks: Ranks) -> tuple[int, int]:
    return (ranks.rank, ranks.size)


def add_up(ranks: Ranks) -> dict[str, Tensor]:
    given = {
        "float": torch.tensor([0.1, 2.0**60, -1.0], dtype=torch.float64) * (ranks.rank + 1),
        "integer": torch.tensor([2**62 + ranks.rank, -(2**63), 7]),
        "scalar": torch.tensor(float(ranks.rank), dtype=torch.float64),
    }
    before = {name: values.clone() for name, values in given.items()}
    summed = {name: ranks.add_up(values) for name, values in given.items()}
    assert all(torch.equal(given[name], before[name]) for name in given), "the input is kept"
    return summed


def gather(ranks: Ranks) -> list[Any]:
    return ranks.gather({"rank": ranks.rank, "items": ["x"] * ranks.rank})


def together(failing: Sequence[int], ranks: Ranks) -> int:
    return ranks.together(partial(check, failing, ranks.rank))


def check(failing: Sequence[int], rank: int) -> int:
    if rank in failing:
        raise ValueError(f"disk {rank} is full")
    return 10 * rank


def differ(odd: int | None, ranks: Ranks) -> None:
    settings = {"learning_rate": 1e-5, "seed": 43 if ranks.rank == odd else 42}
    ranks.refuse_differences(settings, MEND)


def gather_into(ranks: Ranks) -> Tensor:
    buffer = torch.full((2 * ranks.size,), -1.0)
    ranks.gather_into(buffer, torch.tensor([1.0, 2.0]) + 10 * ranks.rank)
    return buffer


def values_of(name: str, shape: Shape) -> Tensor:
    """A flat parameter whose elements occur nowhere else."""
    return torch.arange(prod(shape)).float() + 1000 * ord(name[0])


SHAPES: dict[str, Shape] = {"matrix": (5, 4), "vector": (2,), "point": (), "empty": (0, 3)}
PARTITION = 11  # elements per rank of a flat buffer; cuts the matrix in mid-row


def fragments() -> dict[str, list[Fragment | None]]:
    """{parameter: one fragment or None per rank}, as ZeRO-1/2 and as ZeRO-3 cut; some whole."""
    cuts: dict[str, list[Fragment | None]] = {}
    for rank in range(SIZE):
        begin = rank * PARTITION
        for piece in cut(list(SHAPES.items()), [0, 25, 28, 29], begin, begin + PARTITION):
            cuts.setdefault(piece.name, [None] * SIZE)[rank] = piece
    for name, shape in SHAPES.items():
        cuts[f"{name}.shared"] = [share(name, shape, rank, SIZE) for rank in range(SIZE)]
    cuts["on 2 alone"] = [None, None, whole("vector", (2,))]
    return cuts


# (destination, key of `fragments()`) of each call of `bring`: no destination twice in one.
CALLS: list[list[tuple[int, str]]] = [
    [(2, "matrix"), (0, "matrix.shared"), (1, "vector")],
    [(1, "matrix"), (0, "point"), (2, "point.shared")],
    [(0, "vector.shared"), (1, "empty.shared")],
    [(2, "on 2 alone")],
    [(0, "on 2 alone"), (2, "matrix.shared")],
    [],
]


def bring(ranks: Ranks) -> list[Any]:
    """Per call: what came, and which fragments were asked for here."""
    held, outcome = fragments(), []
    for call in CALLS:
        asked: list[Fragment] = []

        def own(fragment: Fragment, asked: list[Fragment] = asked) -> Tensor:
            asked.append(fragment)
            flat = values_of(fragment.name, fragment.shape)
            return flat[fragment.start : fragment.start + fragment.numel]

        came = ranks.bring([(destination, held[key]) for destination, key in call], own)
        outcome.append((came, asked))
    return outcome


SENT: dict[str, tuple[int, Shape]] = {
    "from itself": (0, (2, 3)), "matrix": (1, (5, 4)), "vector": (2, (3,)), "point": (2, ()),
    "empty": (1, (0, 4)),
}  # fmt: skip


def send_to_first(ranks: Ranks) -> dict[str, Tensor]:
    came = {}
    for name, (owner, shape) in SENT.items():
        tensor = values_of(name, shape).view(shape) if ranks.rank == owner else None
        came[name] = ranks.send_to_first(owner, shape, tensor)
    return came


def barrier(path: Path, ranks: Ranks) -> bool:
    if ranks.rank == 1:
        time.sleep(0.3)
        path.touch()
    ranks.barrier()
    return path.exists()


FAILING: dict[str, Sequence[int]] = {"none": (), "one": (1,), "two": (0, 2), "all": (0, 1, 2)}
ODD: dict[str, int | None] = {"alike": None, "last": 2, "first": 0}


def cases(folder: Path) -> Cases:
    simple = (who, add_up, gather, gather_into, bring, send_to_first)
    return {
        **{case.__name__: case for case in simple},
        **{f"together {name}": partial(together, failing) for name, failing in FAILING.items()},
        **{f"differ {name}": partial(differ, odd) for name, odd in ODD.items()},
        "barrier": partial(barrier, folder / "reached"),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcomes]:
    folder = tmp_path_factory.mktemp("ranks")
    return spawned.run(cases(folder), folder, SIZE)


def of_each(outcomes: list[Outcomes], name: str) -> list[Any]:
    return [outcome[name] for outcome in outcomes]


def test_ranks_know_their_number(outcomes: list[Outcomes]) -> None:
    assert of_each(outcomes, "who") == [(0, 3), (1, 3), (2, 3)]
    assert Ranks.of_run(CPU) == ALONE, "without a process group"


def test_add_up_is_the_sum_on_every_rank(outcomes: list[Outcomes]) -> None:
    for summed in of_each(outcomes, "add_up"):
        expected = torch.tensor([0.6, 6 * 2.0**60, -6.0], dtype=torch.float64)
        torch.testing.assert_close(summed["float"], expected, rtol=1e-15, atol=0)
        assert summed["scalar"].dtype == torch.float64
        assert summed["scalar"].shape == ()
        assert summed["scalar"].item() == 3.0


def test_add_up_of_integers_wraps_around(outcomes: list[Outcomes]) -> None:
    for summed in of_each(outcomes, "add_up"):
        assert summed["integer"].tolist() == [3 * 2**62 + 3 - 2**64, -(2**63), 21]


def test_gather_keeps_the_order_of_the_ranks(outcomes: list[Outcomes]) -> None:
    expected = [{"rank": rank, "items": ["x"] * rank} for rank in range(SIZE)]
    assert of_each(outcomes, "gather") == [expected] * SIZE


# together


def test_together_gives_each_rank_its_own_result(outcomes: list[Outcomes]) -> None:
    assert of_each(outcomes, "together none") == [0, 10, 20]


@pytest.mark.parametrize(("name", "failed", "first"), [("one", 1, 1), ("two", 2, 0)])
def test_a_failure_on_some_ranks_is_an_error_on_all(
    outcomes: list[Outcomes], name: str, failed: int, first: int
) -> None:
    for error in of_each(outcomes, f"together {name}"):
        assert isinstance(error, ValueError)
        text = f"{failed} of 3 ranks cannot go on. rank {first}: disk {first} is full (host "
        assert str(error).startswith(text)


def test_a_failure_on_all_ranks_keeps_its_own_words(outcomes: list[Outcomes]) -> None:
    for rank, error in enumerate(of_each(outcomes, "together all")):
        assert isinstance(error, ValueError)
        assert str(error) == f"disk {rank} is full"


def test_settings_that_differ_are_refused_on_all_ranks(outcomes: list[Outcomes]) -> None:
    assert of_each(outcomes, "differ alike") == [None] * SIZE
    for name, words in {
        "last": "seed=42 on rank 0, but seed=43 on rank 2. ",
        "first": "seed=43 on rank 0, but seed=42 on rank 1. ",
    }.items():
        for error in of_each(outcomes, f"differ {name}"):
            assert isinstance(error, ValueError)
            assert str(error) == words + MEND


# tensors


def test_gather_into_fills_the_buffer_in_order(outcomes: list[Outcomes]) -> None:
    for buffer in of_each(outcomes, "gather_into"):
        assert buffer.tolist() == [1.0, 2.0, 11.0, 12.0, 21.0, 22.0]


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_bring_makes_parameters_whole_where_they_are_wanted(
    outcomes: list[Outcomes], index: int
) -> None:
    held = fragments()
    for rank, (came, asked) in enumerate(outcome["bring"][index] for outcome in outcomes):
        here = {i: key for i, (target, key) in enumerate(CALLS[index]) if target == rank}
        assert came.keys() == here.keys(), "nothing comes to a rank that does not want it"
        for i, key in here.items():
            piece = next(fragment for fragment in held[key] if fragment is not None)
            assert came[i].dtype == torch.float32
            assert torch.equal(came[i], values_of(piece.name, piece.shape))
        own = [held[key][rank] for _, key in CALLS[index]]
        assert asked == [f for f in own if f is not None and f.numel], "its own parts, once each"


def test_bring_was_tried_with_parts_of_all_kinds() -> None:
    """Without this the test above could pass on parameters that no cut has taken apart."""
    held = fragments()
    assert [(f.numel, f.skipped) if f else None for f in held["matrix"]] == [(11, 0), (9, 3), None]
    assert [f.numel if f else None for f in held["vector"]] == [None, None, 2]
    assert [f.numel for f in held["point.shared"] if f] == [1, 0, 0]
    assert [f.numel for f in held["empty.shared"] if f] == [0, 0, 0]


def test_tensors_come_to_the_first_rank_alone(outcomes: list[Outcomes]) -> None:
    first, *others = of_each(outcomes, "send_to_first")
    for name, (_, shape) in SENT.items():
        assert torch.equal(first[name], values_of(name, shape).view(shape))
        assert first[name].device == CPU
        assert all(came[name].numel() == 0 for came in others)


def test_no_rank_passes_a_barrier_before_all_have_come(outcomes: list[Outcomes]) -> None:
    assert all(of_each(outcomes, "barrier"))


# one rank


def test_one_rank_gives_back_what_it_got() -> None:
    values, buffer = torch.tensor([2**62, 5]), torch.zeros(2)
    assert ALONE.add_up(values) is values
    assert ALONE.gather("x") == ["x"]
    assert ALONE.together(partial(check, (), 0)) == 0
    ALONE.refuse_differences({"seed": 42}, MEND)
    ALONE.gather_into(buffer, torch.tensor([3.0, 4.0]))
    assert buffer.tolist() == [3.0, 4.0]
    ALONE.barrier()
    assert ALONE.send_to_first(0, (2,), buffer).tolist() == [3.0, 4.0]
    assert ALONE.bring([], values.__getitem__) == {}  # type: ignore[arg-type]


def test_one_rank_keeps_the_words_of_its_own_error() -> None:
    with pytest.raises(ValueError, match=r"^disk 0 is full$"):
        ALONE.together(partial(check, (0,), 0))


@pytest.mark.parametrize("name", SHAPES)
def test_one_rank_brings_a_copy_of_what_it_has(name: str) -> None:
    held = values_of(name, SHAPES[name])
    came = ALONE.bring([(0, [whole(name, SHAPES[name])])], lambda fragment: held)
    assert came.keys() == {0}
    assert torch.equal(came[0], held)
    came[0] += 1
    assert torch.equal(held, values_of(name, SHAPES[name])), "not the optimizer's own memory"


def test_parts_of_another_length_than_the_buffer_are_no_part_of_it() -> None:
    with pytest.raises(AssertionError):
        ALONE.gather_into(torch.zeros(3), torch.zeros(2))
