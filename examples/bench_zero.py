"""What DAA costs under DeepSpeed: step time over plain full tuning's, bytes, and where time goes.

    python examples/bench_zero.py [--model DIR] [--stages 0 1 2 3] [--ranks 2] [--rank 512]
                                  [--pairs 8] [--batch 8] [--length 128] [--bf16]

Stock LLaMA-Factory trains on text of a fixed length. Every other optimizer step is a plain one:
both kinds of step are neighbours in one run, on the same machine in the same state. Printed is
the median over the pairs of (DAA step / plain step before it), forward and backward included;
and, less noisy, the time spent inside DAA's own functions.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT = Path("saves/bench")
WARM_UP = 2  # steps that are not counted: the first ones allocate
COLUMNS = (
    "",
    "plain step, s",
    "DAA / plain, median (range)",
    "in a DAA step, ms",
    "of a plain step",
    "anchor per rank, MiB",
    "buffer, MiB",
    "Vt received per step, MiB",
)
WORDS = ("market", "river", "model", "teacher", "engine", "garden", "winter", "signal", "bridge")


def write_text(samples: int, length: int) -> Path:
    """A data set of `samples` texts that are each longer than `length` tokens."""
    folder = OUT / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(length)) for i in range(samples)]
    lines = (json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "text.jsonl").write_text("".join(lines))
    info = {"text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def yaml_of(options: argparse.Namespace, stage: int) -> dict[str, Any]:
    """Stage auto: an anchor from two batches, then WARM_UP + 2 * pairs steps."""
    steps = WARM_UP + 2 * options.pairs
    data = write_text(options.batch * steps, options.length)
    anchor = OUT / f"anchor-{options.rank}"
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
    }
    path = OUT / f"ds_z{stage}.json"
    path.write_text(json.dumps(config))
    return {
        "model_name_or_path": options.model,
        "template": "default",
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "daa",
        "daa_stage": "auto",
        "daa_anchor": str(anchor),
        "daa_anchor_dataset": "text",
        "daa_anchor_max_samples": 2 * options.batch,
        "daa_rank": options.rank,
        "daa_k0": 0.5 * steps,
        "dataset": "text",
        "dataset_dir": str(data),
        "cutoff_len": options.length,
        "packing": False,
        "output_dir": str(OUT / f"z{stage}"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": options.batch // options.ranks,
        "max_steps": steps,
        "learning_rate": 1.0e-7,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "deepspeed": str(path),
        "disable_gradient_checkpointing": True,
        "bf16": options.bf16,
        "use_cpu": options.bf16 and not _has_gpu(),
    }


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def worker(path: Path) -> None:
    """One rank: run the YAML with a clock around every step and every part of DAA."""
    import torch
    from llamafactory.train.tuner import run_exp

    from daa_ext import anneal_trainer, gathered, trainer
    from daa_ext.anchored import AnchoredOptimizer
    from daa_ext.engine import EngineSteps
    from daa_ext.ranks import Ranks

    spent: dict[str, float] = defaultdict(float)
    ends: list[float] = []
    traffic: list[int] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += now() - started

        return call

    class Switched(AnchoredOptimizer):
        """Stands aside in plain steps."""

        is_plain = False

        def _before_step(self, *args: Any) -> None:
            if not self.is_plain:
                started = now()
                super()._before_step(*args)
                spent["blend"] += now() - started

    class Alternating(EngineSteps):
        def _step(self, *args: Any, **kwargs: Any) -> Any:
            anchored = getattr(self.stage, "anchored", None)
            if anchored is None:  # the anchor pass
                return super()._step(*args, **kwargs)
            anchored.is_plain = len(ends) % 2 == 0
            if len(ends) == WARM_UP:
                spent.clear()
            step = self._host_step if anchored.is_plain else super()._step
            result = step(*args, **kwargs)
            ends.append(now())
            there = anchored.anchor.gathered
            traffic.append(there.gathered_bytes if there is not None else 0)
            return result

    anneal_trainer.AnchoredOptimizer = Switched  # type: ignore[misc]
    trainer.EngineSteps = Alternating  # type: ignore[misc]
    Alternating._sums = clocked("measure", EngineSteps._sums)  # type: ignore[method-assign]
    Ranks.gather_into = clocked("gather Vt", Ranks.gather_into)  # type: ignore[method-assign]
    gathered.BUCKET_BYTES = int(os.environ.get("BUCKET_BYTES", gathered.BUCKET_BYTES))
    arguments = json.loads(path.read_text())
    run_exp(dict(arguments), [])
    seconds = [b - a for a, b in itertools.pairwise(ends)]  # of steps 1, 2, ...
    first = WARM_UP - 1  # index of step WARM_UP, a plain one
    plain, daa = seconds[first::2], seconds[first + 1 :: 2]
    count = len(daa)
    result = {
        "ratios": [b / a for a, b in zip(plain, daa, strict=False)],
        "plain": statistics.median(plain),
        "daa": statistics.median(daa),
        "spent": {name: total / count for name, total in spent.items()},
        "gathered_bytes_per_step": (traffic[-1] - traffic[WARM_UP - 1]) / count,
    }
    rank = os.environ.get("RANK", "0")
    path.with_suffix(f".{rank}.json").write_text(json.dumps(result))


def run_stage(options: argparse.Namespace, stage: int) -> str:
    """One row of the table."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"z{stage}.yaml.json"
    path.write_text(json.dumps(yaml_of(options, stage)))
    # Fresh pages cost more than the two kinds of step differ: let malloc keep what it has.
    keep = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_ARENA_MAX": "1",
    }
    command = ["torchrun", "--standalone", "--nproc_per_node", str(options.ranks), __file__]
    with (OUT / f"z{stage}.log").open("w") as log:
        subprocess.run(
            [*command, "--worker", str(path)],
            check=True, stdout=log, stderr=log, env={**os.environ, **keep},
        )  # fmt: skip
    found = json.loads(path.with_suffix(".0.json").read_text())
    report = json.loads((OUT / f"z{stage}" / "daa_report.json").read_text())
    ratios = sorted(found["ratios"])
    parts = ", ".join(f"{name} {s * 1e3:.0f}" for name, s in sorted(found["spent"].items()))
    # Vt is gathered inside the other two.
    share = sum(s for name, s in found["spent"].items() if name != "gather Vt") / found["plain"]
    held = max(report["anchor_bytes_per_rank"]) / 2**20
    buffer = max(report["anchor_buffer_bytes_per_rank"]) / 2**20
    return (
        f"| ZeRO-{stage} | {found['plain']:.2f} | {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}) | {parts} | {share:.1%} | {held:.1f} of "
        f"{report['anchor_bytes_total'] / 2**20:.1f} | {buffer:.1f} | "
        f"{found['gathered_bytes_per_step'] / 2**20:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    for name, value in (("ranks", 2), ("rank", 512), ("pairs", 8), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    print(
        f"{options.model}, {options.ranks} ranks, batch {options.batch} x {options.length} tokens, "
        f"{'bf16' if options.bf16 else 'fp32'}, daa_rank {options.rank}, {options.pairs} pairs\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for stage in options.stages:
        print(run_stage(options, stage), flush=True)


RAW = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main())
