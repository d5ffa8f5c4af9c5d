"""FLOW's base losses: computed once, kept with the run, never used for another model or data."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host import Host, same, weights
from tiny import make_data, make_model, poison

from daa_ext.flow_cache import FILE, differences, read_losses, write_losses
from daa_ext.flow_trainer import FlowTrainerMixin

ORIGIN = {"weights": "a", "data": "b", "precision": "c"}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "disable_shuffling": False}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What FLOW says. transformers' loggers do not propagate, so caplog does not see them."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("daa_ext.flow_trainer")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of the training set, once for every time that the base model is measured."""
    counts: list[int] = []
    real = FlowTrainerMixin._base_losses

    def spy(self: Any) -> torch.Tensor:
        losses = real(self)
        counts.append(len(losses))
        return losses

    monkeypatch.setattr(FlowTrainerMixin, "_base_losses", spy)
    return counts


def flow(host: Host, name: str, **changes: Any) -> Path:
    return host.run(host.arguments(name, use_flow_loss=True, **changes))


def test_file_holds_what_was_written(tmp_path: Path) -> None:
    assert read_losses(tmp_path / "none") is None
    losses = torch.tensor([0.1, math.nan, 1 / 3, -0.0, 1e-30])
    write_losses(tmp_path / "new" / "folder", losses, ORIGIN)
    found = read_losses(tmp_path / "new" / "folder")
    assert found is not None
    assert torch.equal(found[0].nan_to_num(7.0), losses.nan_to_num(7.0))
    assert found[0].dtype == torch.float32
    assert found[1] == ORIGIN
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [FILE]


@pytest.mark.parametrize("change", [{"weights": "x"}, {"data": "x", "precision": "y"}, {}])
def test_differences_are_named(change: dict[str, str]) -> None:
    assert differences(ORIGIN, {**ORIGIN, **change}) == list(change)
    assert differences(ORIGIN, {}) == list(ORIGIN)


DAMAGE = {
    "cut": lambda text: text[:-5],
    "changed": lambda text: text.replace("0.5", "0.6"),
    "other": lambda text: "[1, 2]",
    "empty": lambda text: "",
    "no origin": lambda text: json.dumps(
        {k: v for k, v in json.loads(text).items() if k[0] != "o"}
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_an_error_that_names_the_file_and_keeps_it(tmp_path: Path, name: str) -> None:
    write_losses(tmp_path, torch.tensor([0.5, 2.0]), ORIGIN)
    damaged = DAMAGE[name]((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(damaged)
    with pytest.raises(ValueError, match=rf"^flow_cache={tmp_path}: {FILE} is damaged .* Delete"):
        read_losses(tmp_path)
    assert (tmp_path / FILE).read_text() == damaged


def test_a_damaged_file_stops_the_run_before_anything_is_computed(
    host: Host, measured: list[int]
) -> None:
    (host.folder / "kept").mkdir()
    (host.folder / "kept" / FILE).write_text("{")
    with pytest.raises(ValueError, match=rf"^flow_cache=.*kept: {FILE} is damaged"):
        flow(host, "run", flow_cache=str(host.folder / "kept"))
    assert measured == []
    assert (host.folder / "kept" / FILE).read_text() == "{"


def test_losses_are_computed_once_for_many_runs(
    host: Host, measured: list[int], warnings: list[str]
) -> None:
    first = flow(host, "first", disable_shuffling=False)
    cache = {"flow_cache": str(first), "disable_shuffling": False}
    second = flow(host, "second", **cache)
    third = flow(host, "third", flow_tau=1.0, learning_rate=1e-4, **cache)
    assert measured == [48]
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(third))
    assert (first / FILE).is_file()
    assert not (second / FILE).exists()
    assert [words for words in warnings if words.startswith("Reusing")] == [
        f"Reusing the base model's losses of 48 samples: {first}."
    ] * 2


@pytest.mark.parametrize("what", ["weights", "data", "precision"])
def test_losses_of_another_origin_are_not_used(
    host: Host, tmp_path: Path, measured: list[int], warnings: list[str], what: str
) -> None:
    cache = str(flow(host, "first"))
    kept = (Path(cache) / FILE).read_text()
    changes: dict[str, dict[str, Any]] = {
        "weights": {"model_name_or_path": str(make_model(tmp_path / "other", seed=1))},
        "data": {"dataset": "general"},
        "precision": {"bf16": True},
    }
    run = flow(host, "second", flow_cache=cache, **changes[what])
    assert len(measured) == 2
    assert any(f"was computed for other {what} than this run's" in words for words in warnings)
    assert (Path(cache) / FILE).read_text() != kept
    assert same(weights(run), weights(flow(host, "alone", **changes[what])))


@pytest.mark.parametrize("step", [1, 4])
def test_resume_is_bitwise_and_weighs_by_the_base_model(
    host: Host, measured: list[int], step: int
) -> None:
    whole = flow(host, "whole", **SAVING)
    again = flow(
        host, "again", flow_cache=str(whole),
        resume_from_checkpoint=str(whole / f"checkpoint-{step}"), **SAVING,
    )  # fmt: skip
    assert same(weights(whole), weights(again))
    assert len(measured) == 1


def test_resume_without_the_base_losses_is_refused(host: Host) -> None:
    whole = flow(host, "whole", **SAVING)
    kept = weights(whole)
    (whole / FILE).unlink()
    with pytest.raises(
        ValueError, match=rf"^flow_cache=.*: no {FILE} of this base model.*Put back"
    ):
        flow(host, "whole", resume_from_checkpoint=str(whole / "checkpoint-2"), **SAVING)
    assert same(weights(whole), kept)


def test_a_broken_base_model_is_named(host: Host, tmp_path: Path) -> None:
    poisoned = Host(tmp_path, make_model(tmp_path / "model"), make_data(tmp_path / "data", 2))
    poison(poisoned.model)
    with pytest.raises(ValueError, match=r"NaN or infinite on 2 of 24 samples, such as number 0"):
        flow(poisoned, "run", dataset="poisoned")
    assert not (tmp_path / "run" / FILE).exists()


def test_a_folder_that_cannot_be_written_is_named_first(host: Host, measured: list[int]) -> None:
    (host.folder / "file").write_text("")
    with pytest.raises(ValueError, match=r"^flow_cache=.*file: cannot write there"):
        flow(host, "run", flow_cache=str(host.folder / "file"))
    assert measured == []
