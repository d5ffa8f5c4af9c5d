"""One rank of several that run many YAMLs in one process: torchrun rank.py jobs.json.

Starting ranks costs more than a tiny run, so tests start them once for a list of runs. What a
run raised is written to errors.<rank>.json by the run's place in the list. "on_rank" in a YAML
holds keys that differ on one rank.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch.distributed
from llamafactory.train.tuner import run_exp

from daa_ext import gathered


def main(path: Path) -> None:
    # The host ends its process group after each run; here the next run needs it.
    torch.distributed.destroy_process_group = lambda *args: None  # type: ignore[assignment]
    if "DAA_TEST_BUCKET_BYTES" in os.environ:  # tiny models never fill a bucket of 128 MiB
        gathered.BUCKET_BYTES = int(os.environ["DAA_TEST_BUCKET_BYTES"])
    rank = os.environ.get("RANK", "0")
    errors: dict[int, str] = {}
    for index, arguments in enumerate(json.loads(path.read_text())):
        arguments |= arguments.pop("on_rank", {}).get(rank, {})
        try:
            run_exp(arguments, [])
        except Exception as error:
            traceback.print_exc()
            errors[index] = f"{type(error).__name__}: {error}"
            error.__traceback__ = None
        gc.collect()
    path.with_name(f"errors.{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
