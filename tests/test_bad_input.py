"""Bad input through the real host: a clear error, and nothing is lost. Keys: test_config.py."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from host import CLI, Host, report, same, steps, weights
from tiny import make_data, make_model, poison

from daa_ext.artifact import MANIFEST, read_manifest, verify_files


@pytest.fixture
def anchored(host: Host) -> Host:
    host.anchor()
    return host


def refused(host: Host, arguments: dict[str, Any], *words: str) -> None:
    """The run stops with a ValueError that says `words`, and writes no model."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        host.run(arguments)
    for word in words:
        assert word in str(caught.value)
    assert not list(Path(arguments["output_dir"]).glob("*.safetensors"))


def test_missing_anchor(host: Host) -> None:
    refused(host, host.daa("run", "anneal"), "daa_anchor=", "no anchor there", "daa_stage: anchor")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damaged_anchor(anchored: Host, damage: str) -> None:
    folder = anchored.folder / "anchor"
    path = folder / "anchor.safetensors"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        path.unlink()
    else:
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-200])
    refused(anchored, anchored.daa("run", "anneal"), "daa_anchor=", "Delete the folder")


def test_anchor_of_another_base_model(anchored: Host, tmp_path: Path) -> None:
    other = str(make_model(tmp_path / "other", seed=1))
    arguments = anchored.daa("run", "anneal", model_name_or_path=other)
    refused(anchored, arguments, "other weights", "fingerprint")
    deeper = str(make_model(tmp_path / "deeper", num_hidden_layers=3))
    arguments = anchored.daa("run", "anneal", model_name_or_path=deeper)
    refused(anchored, arguments, "train but are not in the anchor", "model.layers.2")
    flatter = str(make_model(tmp_path / "flatter", num_hidden_layers=1))
    arguments = anchored.daa("run", "anneal", model_name_or_path=flatter)
    refused(anchored, arguments, "are in the anchor but do not train", "model.layers.1")
    wider = str(make_model(tmp_path / "wider", intermediate_size=128))
    arguments = anchored.daa("run", "anneal", model_name_or_path=wider)
    refused(anchored, arguments, "has shape")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"daa_rank": 0}, ("daa_rank=0", "whole number >= 1")),
        ({"daa_rank": -3}, ("daa_rank=-3", "whole number >= 1")),
        ({"daa_k0": -1.0}, ("daa_k0=-1.0", "a number >= 0")),
        ({"daa_k0": float("nan")}, ("daa_k0=nan", "a number >= 0")),
        ({"daa_kO": 3.0}, ("daa_kO", "did you mean daa_k0")),
        ({"daa_anchor": None}, ("daa_anchor is not set",)),
        ({"pure_bf16": True}, ("pure_bf16", "bf16: true")),
        ({"use_muon": True}, ("use_muon", "adamw_torch")),
        ({"use_galore": True}, ("use_galore", "whole gradient")),
        ({"stage": "dpo"}, ("stage=dpo", "sft or pt")),
        ({"finetuning_type": "full"}, ("daa_stage=auto", "finetuning_type: daa")),
        ({"daa_anchor_dataset": None}, ("daa_anchor_dataset is not set",)),
        ({"quantization_bit": 4}, ("Quantization",)),
    ],
)
def test_settings_refused_before_anything_is_read(
    host: Host, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    arguments = host.daa("run", "auto", daa_anchor_dataset="general") | changes
    refused(host, {k: v for k, v in arguments.items() if v is not None}, *words)
    assert not (host.folder / "anchor").exists()


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_optimizers_that_are_no_adamw(anchored: Host, optim: str) -> None:
    refused(anchored, anchored.daa("run", "anneal", optim=optim), f"optim={optim}", "adamw_torch")


def test_a_finished_run_is_not_taken_for_a_new_one(anchored: Host) -> None:
    arguments = anchored.daa("run", "anneal", save_strategy="steps", save_steps=3)
    before = weights(anchored.run(arguments))
    with pytest.raises(ValueError, match="no optimizer step was taken"):
        anchored.run(arguments)
    assert same(before, weights(anchored.folder / "run"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lamb"}}, "optimizer.type"),
    ],
)
def test_deepspeed_settings_that_would_go_around_the_anchor(
    host: Host, config: dict[str, Any], words: str
) -> None:
    path = host.folder / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", **config}))
    arguments = host.daa("run", "auto", daa_anchor_dataset="general", deepspeed=str(path))
    done = host.command(arguments, check=False, FORCE_TORCHRUN="1", NPROC_PER_NODE="1")
    assert done.returncode != 0
    assert f"{words}" in done.stderr
    assert "cannot go with finetuning_type=daa" in done.stderr
    assert not (host.folder / "anchor").exists()


def test_reuse_of_an_anchor_built_in_another_way(anchored: Host) -> None:
    arguments = anchored.daa("run", "auto", daa_anchor_dataset="general", daa_rank=3)
    refused(anchored, arguments, "daa_rank=3", "built with 512")
    arguments = anchored.daa("run", "auto", daa_anchor_dataset="domain")
    refused(anchored, arguments, "daa_anchor_dataset=", "general")


def test_an_anchor_is_not_overwritten_unasked(anchored: Host) -> None:
    before = weights(anchored.folder / "anchor")
    arguments = anchored.daa("again", "anchor", dataset="domain")
    refused(anchored, arguments, "holds an anchor already", "overwrite_output_dir")
    assert same(before, weights(anchored.folder / "anchor"))
    anchored.run({**arguments, "overwrite_output_dir": True})
    assert not same(before, weights(anchored.folder / "anchor"))


def test_anchor_stage_without_data(host: Host) -> None:
    refused(host, host.daa("run", "anchor", dataset=None), "dataset")
    with pytest.raises(RuntimeError, match="Cannot find valid samples"):
        host.run(host.daa("run", "anchor", dataset="unanswered"))
    with pytest.raises(RuntimeError, match="Cannot find valid samples"):
        host.run(host.daa("run", "auto", daa_anchor_dataset="unanswered"))
    assert not (host.folder / "anchor").exists()


def test_nan_steps_are_skipped_counted_and_reported(tmp_path: Path) -> None:
    """A poisoned token (its embedding is NaN) makes real NaN gradients in one batch of three."""
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", poisoned=1)
    poison(model)
    host = Host(tmp_path, model, data)
    host.anchor()
    out = host.run(host.daa("run", "anneal", dataset="poisoned"))
    assert report(out)["skipped_steps"] == [0]
    assert [record["step"] for record in steps(out)] == [1, 2]
    finite = {n: w for n, w in weights(out).items() if "embed_tokens" not in n}
    assert all(bool(w.isfinite().all()) for w in finite.values())
    folder = tmp_path / "poisoned"
    run = host.daa("anchor_run2", "anchor", daa_anchor=str(folder), dataset="poisoned")
    host.run(run)
    manifest = read_manifest(folder)
    assert (manifest.steps, manifest.skipped_steps) == (2, 1)


def test_too_many_nan_steps_end_the_run(tmp_path: Path) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", poisoned=24)
    poison(model)
    host = Host(tmp_path, model, data)
    host.anchor()
    common: dict[str, Any] = {"dataset": "poisoned", "num_train_epochs": 2.0}
    refused(host, host.daa("run", "anneal", **common), "4 steps had a NaN", "3 allowed")
    arguments = host.daa("anchor2", "anchor", daa_anchor=str(tmp_path / "a"), **common)
    refused(host, arguments, "4 steps had a NaN")
    arguments = host.daa("anchor3", "anchor", daa_anchor=str(tmp_path / "a"), dataset="poisoned")
    refused(host, arguments, "no usable gradient")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("key", ["daa_anchor", "output_dir"])
def test_folder_that_cannot_be_written(host: Host, key: str) -> None:
    (host.folder / "file").write_text("")
    path = str(host.folder / "file" / "below")
    with pytest.raises((ValueError, OSError), match=key if key == "daa_anchor" else "file"):
        host.run({**host.daa("run", "anchor"), key: path})


@pytest.mark.parametrize("change", [{"daa_c0": 0.5}, {"num_train_epochs": 2.0}])
def test_resume_with_other_settings(anchored: Host, change: dict[str, Any]) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = anchored.run(anchored.daa("whole", "anneal", **saving))
    checkpoint = str(whole / "checkpoint-2")
    arguments = anchored.daa("again", "anneal", resume_from_checkpoint=checkpoint, **saving)
    word = "daa_c0=0.5" if "daa_c0" in change else "12 steps"
    refused(anchored, arguments | change, word)


def test_resume_from_a_plain_checkpoint(anchored: Host) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    plain = anchored.run(anchored.arguments("plain", **saving))
    checkpoint = str(plain / "checkpoint-2")
    arguments = anchored.daa("run", "anneal", resume_from_checkpoint=checkpoint)
    refused(anchored, arguments, "daa_state.json", "not a whole checkpoint")


def test_killed_while_training_the_anchor(anchored: Host) -> None:
    """SIGKILL in the middle of a replacing run: the old anchor stays, whole."""
    before = weights(anchored.folder / "anchor")
    arguments = anchored.daa(
        "again", "anchor", dataset="domain", overwrite_output_dir=True, num_train_epochs=2000.0
    )
    path = anchored.folder / "again.json"
    (anchored.folder / "again.yaml").write_text(json.dumps(arguments))
    process = subprocess.Popen(
        [str(CLI), "train", str(path.with_suffix(".yaml"))], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "PATH": f"{CLI.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    log = anchored.folder / "again" / "trainer_log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.exists(), "the run had not begun"
    verify_files(anchored.folder / "anchor", read_manifest(anchored.folder / "anchor"))
    assert same(before, weights(anchored.folder / "anchor"))
