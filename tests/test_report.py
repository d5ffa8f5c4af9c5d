"""What a run leaves beside its weights: the report, the steps, the curves, the retention card."""

import io
import json
import math
import random
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from daa_ext import retention
from daa_ext.anchored import StepRecord
from daa_ext.ranks import Ranks
from daa_ext.report import peak_memory, plot_curves, versions, write_report, write_steps
from daa_ext.retention import RetentionCard, count_changed, snapshot, untouched_rng
from daa_ext.trainer import DaaTrainerMixin

# the card


def card() -> RetentionCard:
    filled = RetentionCard()
    filled.record(0, {"domain": {"loss": 2.0, "accuracy": 0.25}, "general": {"loss": 1.5}})
    filled.record(5, {"domain": {"loss": 1.0, "accuracy": 0.5}, "general": {"loss": 1.6}})
    filled.record(9, {"domain": {"loss": 0.5, "accuracy": 0.75}, "general": {"loss": 1.75}})
    return filled


def test_summary_compares_the_last_row_with_the_first() -> None:
    summary = card().summary()
    assert summary["sets"] == {
        "domain": {
            "loss": {"base": 2.0, "final": 0.5, "delta": -1.5},
            "accuracy": {"base": 0.25, "final": 0.75, "delta": 0.5},
        },
        "general": {"loss": {"base": 1.5, "final": 1.75, "delta": 0.25}},
    }
    assert [row["step"] for row in summary["rows"]] == [0, 5, 9]
    assert json.loads(json.dumps(summary)) == summary


def test_second_measurement_of_a_step_replaces_the_first() -> None:
    filled = card()
    filled.record(9, {"general": {"loss": 1.0}})
    assert [row["step"] for row in filled.rows] == [0, 5, 9]
    assert filled.summary()["sets"] == {
        "general": {"loss": {"base": 1.5, "final": 1.0, "delta": -0.5}}
    }
    filled.record(10, {"general": {"loss": 1.25}})
    assert len(filled.rows) == 4


def test_only_the_base_row_makes_a_summary_of_no_change() -> None:
    filled = RetentionCard()
    filled.record(0, {"domain": {"loss": 2.0}})
    assert filled.summary()["sets"]["domain"]["loss"]["delta"] == 0.0
    assert "better" not in text(filled)


def text(filled: RetentionCard) -> str:
    console = Console(width=92, file=io.StringIO(), record=True)
    console.print(filled.table())
    return console.export_text()


def test_table_says_what_became_better() -> None:
    lines = text(card()).splitlines()
    rows = {(words[0], words[1]): line for line in lines if len(words := line_words(line)) > 3}
    assert "2.0000" in rows["domain", "loss"]
    assert "-1.5000 (better)" in rows["domain", "loss"]
    assert "+0.5000 (better)" in rows["domain", "accuracy"]
    assert "+0.2500" in rows["general", "loss"]
    assert "better" not in rows["general", "loss"]


def line_words(line: str) -> list[str]:
    return [word for word in line.split() if any(char.isalnum() for char in word)]


def test_table_counts_changed_weights() -> None:
    filled = card()
    assert "weights changed" not in text(filled)
    filled.weights = {"total": 2000, "changed": 500, "changed_in_bf16": 10}
    assert "500 of 2,000 (25.0%); 0.5%" in " ".join(text(filled).split())
    filled.weights = {"total": 0, "changed": 0, "changed_in_bf16": 0}
    assert "0 of 0" in text(filled)


def test_print_shows_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    card().print()
    assert "Retention card" in capsys.readouterr().out


# measuring leaves no trace


def draws() -> tuple[float, float, list[float]]:
    return random.random(), float(np.random.random()), torch.rand(3).tolist()


def seed() -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def test_random_generators_are_untouched() -> None:
    seed()
    wanted = [draws(), draws()]
    seed()
    found = [draws()]
    with untouched_rng():
        assert draws() == wanted[1], "the block sees the generators as they are"
        torch.manual_seed(8)
        draws()
    assert [*found, draws()] == wanted


def test_random_generators_are_untouched_by_a_block_that_fails() -> None:
    seed()
    wanted = draws()
    seed()
    with pytest.raises(ZeroDivisionError), untouched_rng():
        print(draws(), 1 / 0)
    assert draws() == wanted


def model() -> torch.nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(5, 7), (11,), (), (0, 3)]
    tensors: list[Tensor] = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[0][0, 0] = 1.0
    return torch.nn.ParameterDict({f"p{i}": tensor for i, tensor in enumerate(tensors)})


def weights(trained: torch.nn.Module, rank: int = 0, size: int = 1) -> Iterator[Any]:
    """What one of several ranks looks at."""
    ranks = Ranks(rank, size, torch.device("cpu"))
    trainer: Any = SimpleNamespace(model=trained, ranks=ranks)
    trainer.trainable = partial(DaaTrainerMixin.trainable, trainer)
    return DaaTrainerMixin.own_weights(trainer)


@pytest.mark.parametrize("chunk", [1, 4, 1 << 22])
@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_changed_weights_are_counted_exactly(
    size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all ranks, each of which counts a part of every parameter."""
    monkeypatch.setattr(retention, "CHUNK", chunk)
    trained = model()
    before = [snapshot(weights(trained, rank, size)) for rank in range(size)]

    def counts() -> dict[str, int]:
        parts = [count_changed(before[rank], weights(trained, rank, size)) for rank in range(size)]
        return {key: sum(part[key] for part in parts) for key in parts[0]}

    assert counts() == {"total": 47, "changed": 0, "changed_in_bf16": 0}
    with torch.no_grad():
        trained["p0"][0, 0] += 2.0**-20  # below the resolution of bf16
        trained["p0"][4, 6] *= 2.0
        trained["p1"][10] *= -1.0
        trained["p2"].add_(1.0)
    assert counts() == {"total": 47, "changed": 4, "changed_in_bf16": 3}


def test_snapshot_is_a_copy_of_what_trains() -> None:
    trained = model()
    trained["p1"].requires_grad_(False)
    before = snapshot(weights(trained))
    assert list(before) == ["p0", "p2", "p3"]
    with torch.no_grad():
        trained["p0"].add_(1.0)
        trained["p1"].add_(1.0)
    found = count_changed(before, weights(trained))
    assert found == {"total": 36, "changed": 35, "changed_in_bf16": 35}


# the files


def records(count: int = 12) -> list[StepRecord]:
    return [
        StepRecord(t, 0.1 / (t + 1), 0.11, 1 - t / count, 3.0 + math.sin(t), 1e-7 / (t + 1))
        for t in range(count)
    ]


LOSSES: list[dict[str, Any]] = [{"step": t, "loss": 2 - t / 12} for t in range(12)]
EVALS: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 2.0, "eval_general_loss": 1.5},
    {"step": 12, "eval_loss": 1.0, "eval_general_loss": 1.6},
    {"step": 12, "train_loss": 1.5, "train_runtime": 3.0},
]


def test_report_and_steps_round_trip(tmp_path: Path) -> None:
    content = {"stage": "anneal", "similarity_mean": 0.1, "list": [1, 2], "none": None}
    write_report(tmp_path / "new" / "folder", content)
    write_steps(tmp_path / "new" / "folder", records())
    found = json.loads((tmp_path / "new" / "folder" / "daa_report.json").read_text())
    assert found == content
    lines = (tmp_path / "new" / "folder" / "daa_steps.jsonl").read_text().splitlines()
    assert [StepRecord(**json.loads(line)) for line in lines] == records()


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("history", [[], LOSSES + EVALS, EVALS])
def test_curves_are_a_readable_picture(
    tmp_path: Path, count: int, history: list[dict[str, Any]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(tmp_path, records(count), history)
    with Image.open(tmp_path / "daa_curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 5, "not an empty page"


def test_curves_draw_the_losses_that_there_are(tmp_path: Path) -> None:
    pictures = []
    for history in ([], LOSSES, LOSSES + EVALS):
        plot_curves(tmp_path, records(), history)
        pictures.append((tmp_path / "daa_curves.png").read_bytes())
    assert len(set(pictures)) == 3


def test_versions_and_memory() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["daa_ext"] != "missing"
    assert 10 * 2**20 < peak_memory() < 2**40
