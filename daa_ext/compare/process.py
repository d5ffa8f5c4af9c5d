"""One child process: its log, its wall time, its peak memory, its progress."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.5
GPU_QUERY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Outcome:
    """What a process cost. Peaks in bytes: over the process tree, and over all visible GPUs."""

    code: int
    seconds: float
    peak_memory: int
    peak_gpu_memory: int | None


def run(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    watch: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run `command` to its end, its output in `log`.

    `watch` is called while it runs. An exception (Ctrl-C as well) ends the whole process group.
    """
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            list(command), stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            env={**os.environ, **env}, start_new_session=True,
        )  # fmt: skip
    peak, gpu_peak = 0, None
    has_gpu = shutil.which(GPU_QUERY[0]) is not None
    try:
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            if has_gpu and (used := _gpu_memory()) is not None:
                gpu_peak = max(used, gpu_peak or 0)
            watch()
            time.sleep(POLL_SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return Outcome(process.returncode, time.monotonic() - started, peak, gpu_peak)


def _resident(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:
        pass  # it ended between two looks
    return total


def _gpu_memory() -> int | None:
    """Bytes in use on the fullest visible GPU, by all processes."""
    done = subprocess.run(GPU_QUERY, capture_output=True, text=True, check=False)
    used = [int(line) for line in done.stdout.split() if line.strip().isdigit()]
    return max(used) << 20 if used else None


def gpu_count(env: Mapping[str, str]) -> int:
    """GPUs that a launched run may use; 0 on a CPU."""
    visible = env.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len([line for line in done.stdout.splitlines() if line.startswith("GPU")])


def step_of(output_dir: Path) -> str:
    """Where LLaMA-Factory's training stands ("step 12/60, loss 1.234"), "" before it begins."""
    try:
        last = (output_dir / "trainer_log.jsonl").read_text().rstrip("\n").split("\n")[-1]
        row = json.loads(last)
    except (OSError, json.JSONDecodeError):
        return ""
    loss = f", loss {row['loss']:.3f}" if "loss" in row else ""
    return f"step {row.get('current_steps', '?')}/{row.get('total_steps', '?')}{loss}"


def reason_of(log: Path) -> str:
    """The line of a failed run's log that says why: the last error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n") if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] and ":" in line]
    return (errors or lines or ["no output"])[-1]
