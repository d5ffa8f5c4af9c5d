"""The stock commands, each in processes of its own: CLI, torchrun, export, chat's parser."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from host import CLI, Host, distance, report, same, steps, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from daa_ext.artifact import read_manifest, verify_files

RANKS: dict[str, Any] = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}


def auto(host: Host, name: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "daa_anchor": str(host.folder / f"{name}_anchor"),
        "daa_anchor_dataset": "general",
        "daa_retention_dataset": "general_test",
        "eval_dataset": "domain_test",
        "daa_k0": 3.0,
        "daa_rank": 8,
        # 1e-5: see test_laws; Adam would turn rounding noise into whole steps
        "adam_epsilon": 1e-5,
        **changes,
    }
    return host.daa(name, "auto", **settings)


def test_one_stock_command_anchors_anneals_and_reports(host: Host) -> None:
    arguments = auto(
        host, "run", plot_loss=True, eval_strategy="steps", eval_steps=3, report_to="tensorboard"
    )
    done = host.command(arguments)
    out = host.folder / "run"
    manifest = read_manifest(host.folder / "run_anchor")
    verify_files(host.folder / "run_anchor", manifest)
    content = report(out)
    assert content["stage"] == "anneal"
    assert content["total_steps"] == len(steps(out)) == 6
    assert [row["step"] for row in content["retention"]["rows"]] == [0, 3, 6]
    assert {"domain", "general"} == content["retention"]["sets"].keys()
    assert content["retention"]["weights"]["changed"] > 0
    assert (out / "daa_curves.png").stat().st_size > 10_000
    assert "Retention card" in done.stdout
    assert "daa/similarity" in done.stdout
    tags: set[str] = set()
    for path in out.rglob("events.out.tfevents*"):  # one of the training, one of the evaluation
        tags |= set(EventAccumulator(str(path)).Reload().Tags()["scalars"])
    names = ("similarity", "correction", "gamma", "effective_lr", "domain_grad_norm")
    assert {f"train/daa/{name}" for name in names} <= tags
    # A second run finds the anchor, says so, and gives the same weights.
    again = host.command({**arguments, "output_dir": str(host.folder / "again")})
    assert "Reusing the anchor" in again.stdout + again.stderr
    assert same(weights(out), weights(host.folder / "again"))


def test_auto_on_two_ranks_equals_one_process(host: Host) -> None:
    one = host.run(auto(host, "one"))
    host.command(auto(host, "two", per_device_train_batch_size=4, ddp_backend="gloo"), **RANKS)
    two = host.folder / "two"
    start = weights(host.model)
    anchors = [weights(host.folder / f"{name}_anchor") for name in ("one", "two")]
    # Factors may differ in sign and order: compare what they multiply out to, through the runs,
    # and the dense tensors directly.
    names = [name for name in anchors[0] if name.endswith("norm.weight")]
    dense = [{name: anchor[name] for name in names} for anchor in anchors]
    zero = {name: tensor * 0 for name, tensor in dense[0].items()}
    assert distance(dense[1], dense[0], zero) < 1e-5
    assert distance(weights(two), weights(one), start) < 1e-4
    content = report(two)
    assert content["world_size"] == 2
    assert len(content["anchor_bytes_per_rank"]) == len(content["peak_memory_bytes_per_rank"]) == 2
    first, second = (read_manifest(host.folder / f"{name}_anchor") for name in ("one", "two"))
    assert (first.samples, first.tokens) == (second.samples, second.tokens)


def test_torchrun_by_hand(host: Host) -> None:
    host.anchor()
    torchrun = str(CLI.with_name("torchrun"))
    launcher = str(Path(sys.modules["llamafactory"].__file__ or "").with_name("launcher.py"))
    arguments = host.daa("run", "anneal", ddp_backend="gloo", per_device_train_batch_size=4)
    command = (torchrun, "--standalone", "--nproc_per_node", "2", launcher)
    host.command(arguments, *command, OMP_NUM_THREADS="1")
    assert report(host.folder / "run")["world_size"] == 2


def test_pretraining_stage(host: Host) -> None:
    texts: dict[str, Any] = {"stage": "pt", "dataset": "texts", "packing": True}
    host.run(host.daa("anchor_run", "anchor", **texts))
    plain = host.run(host.arguments("plain", **texts))
    out = host.run(host.daa("run", "anneal", **texts))
    assert report(out)["anchored_params"] == report(out)["trainable_params"]
    assert not same(weights(plain), weights(out))


@pytest.mark.parametrize("kind", ["daa", "full"])
def test_export_takes_the_training_yaml(host: Host, kind: str) -> None:
    """LLaMA-Factory's export refuses training keys unless ALLOW_EXTRA_ARGS=1, for any method."""
    arguments = auto(host, "run") if kind == "daa" else host.arguments("run")
    arguments |= {"export_dir": str(host.folder / "exported"), "infer_dtype": "float32"}
    host.command(arguments, str(CLI), "export", ALLOW_EXTRA_ARGS="1")
    assert same(weights(host.folder / "exported"), weights(host.model))


def test_chat_takes_the_training_yaml(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.chat import ChatModel

    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    model = ChatModel({**auto(host, "run"), "infer_backend": "huggingface", "max_new_tokens": 3})
    answer = model.chat([{"role": "user", "content": "the market rises"}])
    assert answer[0].response_length <= 3
    assert os.environ["ALLOW_EXTRA_ARGS"] == "1"
