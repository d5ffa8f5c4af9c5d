"""Real ranks for tests: gloo processes that run a test module's cases and write what came out.

Starting processes costs seconds, so a module starts them once, for all its cases. A case is a
function at module level (processes find it by name) or a `partial` of one. A ValueError that it
raises is an outcome like any other; anything else ends all ranks and is the test's error.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from daa_ext.ranks import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
LONGEST_WAIT = timedelta(seconds=60)  # of one rank for another
Cases = Mapping[str, Callable[[Ranks], Any]]
Outcomes = dict[str, Any]


def run(cases: Cases, folder: Path, size: int) -> list[Outcomes]:
    """{name of the case: what it returned, or its ValueError} of each of `size` ranks."""
    arguments = (dict(cases), folder, size, torch.get_num_threads())
    torch.multiprocessing.spawn(_rank, arguments, nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, cases: Cases, folder: Path, size: int, threads: int) -> None:
    torch.set_num_threads(threads)  # sums are then split as in the test's own process
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", LONGEST_WAIT, rank=rank, world_size=size
    )
    ranks = Ranks.of_run(CPU)
    torch.save({name: _outcome(case, ranks) for name, case in cases.items()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _outcome(case: Callable[[Ranks], Any], ranks: Ranks) -> Any:
    try:
        return case(ranks)
    except ValueError as error:
        return error
