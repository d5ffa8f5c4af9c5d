"""The base model's loss of every training sample, kept in a file: FLOW computes it once.

The file says for which weights, data and precision that was (`origin`). It is JSON: whoever loads
a model reads every tensor file of its folder.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FILE = "flow_losses.json"
Origin = Mapping[str, str]


def write_losses(folder: Path, losses: Tensor, origin: Origin) -> None:
    """Write the losses (fp32, one per sample, NaN for none) under a temporary name, then rename."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.tmp-{os.getpid()}"
    numbers = [None if math.isnan(loss) else loss for loss in losses.tolist()]
    content = {"origin": dict(origin), "sha256": _sha256(numbers), "losses": numbers}
    temporary.write_text(json.dumps(content))
    os.replace(temporary, folder / FILE)


def read_losses(folder: Path) -> tuple[Tensor, dict[str, str]] | None:
    """(losses, origin) as they were written; None if there is no such file.

    Raises:
        ValueError: the file is damaged, or none of ours.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        numbers, origin = content["losses"], dict(content["origin"])
        if content["sha256"] != _sha256(numbers):
            raise ValueError("SHA-256 differs")
        values = [math.nan if loss is None else loss for loss in numbers]
        losses = torch.tensor(values, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"flow_cache={folder}: {FILE} is damaged ({error!r}). Delete it, or name another "
            "folder: the losses are computed anew."
        ) from error
    return losses, origin


def differences(now: Origin, then: Origin) -> list[str]:
    """What the losses were computed for otherwise: weights, data, precision."""
    return [name for name in now if then.get(name) != now[name]]


def _sha256(numbers: list[float | None]) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()
