"""Runs stock LLaMA-Factory for a test: `llamafactory-cli train x.yaml`, in this process or not."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from daa_ext.artifact import AnchorReader, read_manifest

Weights = dict[str, torch.Tensor]
CLI = Path(sys.executable).with_name("llamafactory-cli")


@dataclass
class Host:
    """Where a test's runs live and what they share."""

    folder: Path
    model: Path
    data: Path

    def arguments(self, name: str, **changes: Any) -> dict[str, Any]:
        """A YAML for run `name`: plain full tuning on the domain unless changed; None removes."""
        arguments = {
            "model_name_or_path": str(self.model),
            "template": "default",
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "dataset": "domain",
            "dataset_dir": str(self.data),
            "cutoff_len": 64,
            "output_dir": str(self.folder / name),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1.0,
            "learning_rate": 1.0e-3,
            "adam_beta2": 0.95,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_shuffling": True,
            **changes,
        }
        return {key: value for key, value in arguments.items() if value is not None}

    def daa(self, name: str, daa_stage: str, **changes: Any) -> dict[str, Any]:
        """A YAML of a DAA stage; the anchor lies in the test's folder `anchor`."""
        settings: dict[str, Any] = {
            "finetuning_type": "daa",
            "daa_stage": daa_stage,
            "daa_anchor": str(self.folder / "anchor"),
        }
        if daa_stage == "anchor":
            settings["dataset"] = "general"
        elif "daa_k0" not in changes and changes.get("daa_gga", True):
            settings["daa_k0"] = 3.0
        return self.arguments(name, **settings | changes)

    def run(self, arguments: dict[str, Any], *callbacks: Any) -> Path:
        """Run in this process, through the host's own entry; returns the output folder."""
        from llamafactory.train.tuner import run_exp

        run_exp(dict(arguments), list(callbacks))
        return Path(arguments["output_dir"])

    def anchor(self, **changes: Any) -> Path:
        """Build the test's anchor; every parameter dense unless `daa_rank` says otherwise."""
        self.run(self.daa("anchor_run", "anchor", **changes))
        return self.folder / "anchor"

    def command(
        self, arguments: dict[str, Any], *prefix: str, check: bool = True, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run `llamafactory-cli train` on the arguments in a process of its own."""
        path = self.folder / f"{Path(arguments['output_dir']).name}.yaml"
        path.write_text(yaml.safe_dump(arguments))
        command = [*prefix] or [str(CLI), "train"]
        path_entry = f"{CLI.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [*command, str(path)], capture_output=True, text=True, timeout=300,
            env={**os.environ, "PATH": path_entry, **environment}, cwd=self.folder,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    def ranks(
        self, jobs: list[dict[str, Any]], count: int, check: bool = True, **environment: str
    ) -> list[dict[int, str]]:
        """Run the jobs one after another on `count` ranks (rank.py); the errors of each rank."""
        path = self.folder / f"jobs{count}" / "jobs.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(jobs))
        command = [str(CLI.with_name("torchrun")), "--standalone", "--nproc_per_node", str(count)]
        done = subprocess.run(
            [*command, str(Path(__file__).with_name("rank.py")), str(path)],
            capture_output=True, text=True, timeout=60 + 30 * len(jobs), cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        texts = [path.with_name(f"errors.{rank}.json").read_text() for rank in range(count)]
        errors = [{int(i): words for i, words in json.loads(text).items()} for text in texts]
        assert not check or not any(errors), errors
        return errors


def weights(folder: Path) -> Weights:
    """The saved weights of a run, by name, over all its files."""
    found: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    assert found, f"no weights in {folder}"
    return found


def anchor_of(folder: Path) -> Weights:
    """A stored anchor multiplied out, by parameter name."""
    manifest = read_manifest(folder)
    reader = AnchorReader(folder, manifest)
    return {name: reader.term(name).dense() for name in manifest.tensors}


def same(a: Weights, b: Weights) -> bool:
    """Whether two sets of weights are bitwise the same."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(found: Weights, expected: Weights, start: Weights) -> float:
    """||w - w_ref|| / ||w_ref - w_0||: the error of an update relative to its length."""
    error = sum(_squared(found[name], expected[name]) for name in start)
    update = sum(_squared(expected[name], start[name]) for name in start)
    return (error / update) ** 0.5


def _squared(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).square().sum())


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "daa_report.json").read_text())


def steps(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "daa_steps.jsonl").read_text().splitlines()]
