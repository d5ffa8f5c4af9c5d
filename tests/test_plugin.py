"""The seams: no effect on any other method, cheap autoload, loud when the host has moved."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from host import Host, same, weights
from typer.testing import CliRunner

from daa_ext import cli, plugin, stages

RUNS = """
import json, sys
from llamafactory.train.tuner import run_exp
from llamafactory.hparams.finetuning_args import FinetuningArguments
for arguments in json.load(open(sys.argv[1])):
    run_exp(arguments)
print("known" if "daa_stage" in FinetuningArguments.__dataclass_fields__ else "unknown")
"""


def plain_runs(host: Host, prefix: str) -> list[dict[str, Any]]:
    lora = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
    freeze = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
    changes: dict[str, dict[str, Any]] = {
        "full": {"eval_dataset": "domain_test", "eval_strategy": "steps", "eval_steps": 2},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        "dft": {"use_dft_loss": True},
        "lora": lora,
        "dora": {**lora, "use_dora": True},
        "freeze": freeze,
        "pt": {"stage": "pt", "dataset": "texts"},
    }
    return [
        host.arguments(f"{prefix}_{name}", disable_shuffling=False, **change)
        for name, change in changes.items()
    ]


def test_plain_runs_are_bitwise_the_same_without_the_plugin(host: Host) -> None:
    """TORCH_DEVICE_BACKEND_AUTOLOAD=0 is torch's own switch for entry points like ours."""
    for prefix, autoload in (("with", "1"), ("without", "0")):
        runs = plain_runs(host, prefix)
        (host.folder / f"{prefix}.json").write_text(json.dumps(runs))
        command = (sys.executable, "-c", RUNS, str(host.folder / f"{prefix}.json"))
        done = host.command(
            host.arguments("unused"), *command, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload
        )
        assert done.stdout.splitlines()[-1] == ("known" if autoload == "1" else "unknown")
    for run in plain_runs(host, "with"):
        found = Path(run["output_dir"])
        other = found.with_name(found.name.replace("with_", "without_"))
        assert same(weights(found), weights(other)), found.name


def test_plain_run_after_a_daa_run_in_one_process(host: Host) -> None:
    """The seams that a DAA run has installed hand a plain run to the host unchanged."""
    before = host.run(host.arguments("before", disable_shuffling=False))
    host.anchor()
    host.run(host.daa("daa", "anneal"))
    after = host.run(host.arguments("after", disable_shuffling=False))
    assert same(weights(before), weights(after))


def test_autoload_is_cheap_and_survives_a_broken_wrapt() -> None:
    code = (
        "import sys, torch\n"
        "heavy = {'llamafactory', 'transformers', 'daa_ext.stages', 'daa_ext.config'}\n"
        "assert 'daa_ext.plugin' in sys.modules, 'not registered'\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    broken = "import sys; sys.modules['wrapt'] = None; import torch; print(torch.ones(1).item())"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1.0"), done.stderr


def test_another_version_of_the_host_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "LLAMAFACTORY", ">=0.9.6,<0.9.7")
    with pytest.raises(ValueError, match=r"llamafactory 0\.9\.5 is installed.*>=0\.9\.6"):
        host.run(host.daa("run", "anneal"))
    host.run(host.arguments("plain"))


def test_a_moved_seam_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages.TRAINERS, "sft", "TrainerOfTomorrow")
    monkeypatch.setattr(stages, "_installed", {})
    monkeypatch.setattr(plugin, "broken", {})
    with pytest.raises(ValueError, match=r"has moved what the plugin needs.*TrainerOfTomorrow"):
        host.run(host.daa("run", "anneal"))


def test_the_seams_are_where_the_plugin_looks() -> None:
    """Fails with the host's next version if a name has moved: then mend plugin.py, stages.py."""
    import inspect

    from llamafactory.hparams import finetuning_args, parser

    choice = finetuning_args.FinetuningArguments.__dataclass_fields__["finetuning_type"]
    assert "daa" in choice.type.__args__
    assert parser.read_args.__wrapped__.__module__ == "llamafactory.hparams.parser"
    for stage in stages.TRAINERS:
        stages.install(stage)
        workflow = stages._installed[stage]
        names = set(inspect.signature(workflow.function).parameters)
        assert {"model_args", "data_args", "training_args", "finetuning_args"} <= names
        assert "callbacks" in names
        assert issubclass(workflow.trainer, sys.modules["transformers"].Trainer)


def test_a_call_that_bypasses_the_stages_is_refused(host: Host) -> None:
    """The host's own function, held since before the plugin: loud, not plain tuning."""
    from llamafactory.hparams import get_train_args

    parsed = get_train_args(host.daa("run", "auto", daa_anchor_dataset="general"))
    with pytest.raises(RuntimeError, match="DAA would not act"):
        stages._installed["sft"].function(*parsed, callbacks=[])


def test_doctor_is_content_here() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "All well" in result.output


def test_doctor_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cli.version

    def version(name: str) -> str:
        other = {"torch": "2.6.0", "torchaudio": "2.11.0", "transformers": "9.0"}
        return other.get(name) or real(name)

    monkeypatch.setattr(cli, "version", version)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "300"})
    text = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "transformers 9.0 is not in the tested range" in text
    assert "torchvision==0.21.*" in text
    assert "torchaudio==2.6.*" in text
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in text


def test_anchor_info_and_verify(host: Host) -> None:
    folder = host.anchor(daa_rank=4)
    runner = CliRunner()
    info = runner.invoke(cli.app, ["anchor", "info", str(folder)])
    assert info.exit_code == 0
    assert "24 samples" in info.output
    assert runner.invoke(cli.app, ["anchor", "verify", str(folder)]).exit_code == 0
    path = folder / "anchor.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    damaged = runner.invoke(cli.app, ["anchor", "verify", str(folder)])
    assert damaged.exit_code == 1
    assert "SHA-256" in " ".join(damaged.output.split())
    assert runner.invoke(cli.app, ["anchor", "info", str(host.folder)]).exit_code == 1
