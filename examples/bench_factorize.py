"""Time both ways to factorize a matrix: torch.linalg.svd and the randomized SVD of daa_ext.

    python examples/bench_factorize.py [ROWSxCOLUMNS ...]   # default: the table of docs/method.md

Seconds are medians of 3 on one fp32 Gaussian matrix per shape. "-": not timed, too slow.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from daa_ext.lowrank import EXACT_UP_TO, OVERSAMPLE, _randomized_svd, factors_pay

SHAPES = ["576x576", "1536x576", "4096x1024", "2048x2048", "49152x576", "4096x4096"]
RANK = 512
REPEATS = 3
EXACT_MAX = 2048  # no exact SVD of a matrix whose short side is longer


def median_seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def row(shape: tuple[int, int]) -> str:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    directions = min(RANK, *shape) + OVERSAMPLE
    exact = "-"
    if min(shape) <= EXACT_MAX:
        exact = f"{median_seconds(lambda: torch.linalg.svd(gradient, full_matrices=False)):.2f}"
    randomized = f"{median_seconds(lambda: _randomized_svd(gradient, directions, 0)):.2f}"
    used = "exact" if min(shape) <= EXACT_UP_TO * directions else "randomized"
    kept = used if factors_pay(shape, RANK) else "dense"
    return f"| {shape[0]}x{shape[1]} | {exact} | {randomized} | {kept} |"


def main() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    cpu = models[0] if models else platform.machine()
    print(f"{cpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, fp32, rank ceiling {RANK}\n")
    print("| shape | exact | randomized | what `compress` does |\n| --- | --- | --- | --- |")
    for text in sys.argv[1:] or SHAPES:
        rows, columns = (int(number) for number in text.split("x"))
        print(row((rows, columns)), flush=True)


if __name__ == "__main__":
    main()
