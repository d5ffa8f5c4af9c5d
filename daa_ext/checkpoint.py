"""daa_state.json: what a checkpoint of the host must remember of a DAA stage.

The anchor is not in it, only its digest: a resumed run reads the anchor's folder again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

CHECKPOINT_STATE = "daa_state.json"


def write_state(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the state into the folder of a checkpoint."""
    (folder / CHECKPOINT_STATE).write_text(json.dumps(content))


def read_state(
    checkpoint: str, expected: Mapping[str, Any], settings: Mapping[str, Any], force: bool
) -> dict[str, Any]:
    """What `write_state` wrote.

    Args:
        checkpoint: the folder that the run resumes from.
        expected: entries that must be what they were, by name.
        settings: entries that must be what they were unless `force`d.

    Raises:
        ValueError: not a checkpoint of this method, or an entry differs.
    """
    path = Path(checkpoint) / CHECKPOINT_STATE
    try:
        state = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint}: {CHECKPOINT_STATE} is missing or damaged "
            f"({error}): not a whole checkpoint of a DAA run. Resume from another checkpoint, or "
            "start anew with overwrite_output_dir: true."
        ) from error
    for name, value in {**expected, **settings}.items():
        if state.get(name) == value:
            continue
        words = (
            f"resume_from_checkpoint={checkpoint}: {name}={value} now, but the run that is "
            f"to be resumed had {name}={state.get(name)}."
        )
        if name not in settings:
            raise ValueError(
                f"{words} Resume with the same value, or start anew with "
                "overwrite_output_dir: true."
            )
        if not force:
            raise ValueError(
                f"{words} Resume with the same value, set daa_force_resume: true to go on with "
                "the new one, or start anew with overwrite_output_dir: true."
            )
        logger.warning(f"{words} Going on with {name}={value} (daa_force_resume).")
    return state


def refuse_other_sharding(
    checkpoint: str, state: Mapping[str, Any], sharding: Mapping[str, Any], universal: bool
) -> None:
    """Raise ValueError where DeepSpeed cannot read a checkpoint of differently sharded ranks.

    Args:
        state: of the checkpoint.
        sharding: zero_stage (None without DeepSpeed) and world_size of this run.
        universal: whether the run reads DeepSpeed's universal checkpoints.
    """
    now, then = (
        {key: source.get(key) for key in ("zero_stage", "world_size")}
        for source in (sharding, state)
    )
    if now == then or (now["zero_stage"] is None and then["zero_stage"] is None):
        return
    both = now["zero_stage"] is not None and then["zero_stage"] is not None
    if both and universal:
        return
    mend = (
        "Convert the checkpoint (python -m deepspeed.checkpoint.ds_to_universal, docs/zero.md) and "
        'set "checkpoint": {"load_universal": true} in the DeepSpeed file'
        if both
        else "Resume with the DeepSpeed setting that it was written with"
    )
    raise ValueError(
        f"resume_from_checkpoint={checkpoint} was written by {_words(then)}, this run has "
        f"{_words(now)}: DeepSpeed cuts its checkpoints per rank. {mend}, or resume as it was."
    )


def _words(sharding: Mapping[str, Any]) -> str:
    stage = sharding["zero_stage"]
    kind = "no DeepSpeed" if stage is None else f"ZeRO stage {stage}"
    return f"{kind} on {sharding['world_size']} ranks"
