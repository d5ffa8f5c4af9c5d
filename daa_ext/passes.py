"""The arguments of a run's stages: what must agree, and what the anchor pass of `auto` changes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint
from transformers.utils import logging

from daa_ext.config import RULES, DaaSettings
from daa_ext.manifest import Manifest
from daa_ext.method_config import METHOD_RULES, METHODS

logger = logging.get_logger(__name__)

Arguments = dict[str, Any]  # of a workflow: model_args, data_args, training_args, ...


@dataclass(frozen=True)
class DaaRun:
    """What the YAML says beyond the arguments that the host hands to its trainers."""

    settings: Any  # DaaSettings, MethodSettings and the host's, in one object
    base_model: str
    datasets: list[str]
    template: str | None
    cutoff_len: int
    host_stage: str
    load_eval: Callable[[str, Any], dict[str, Any]]  # (names, tokenizer) -> {name: data set}


def settings_of_all_ranks(arguments: Arguments) -> dict[str, Any]:
    """What must be the same on all ranks; paths may differ from node to node."""
    settings, training = arguments["finetuning_args"], arguments["training_args"]
    names = (
        "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "adam_beta1", "adam_beta2",
        "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "seed", "bf16", "fp16",
        "per_device_train_batch_size", "gradient_accumulation_steps",
    )  # fmt: skip
    ours = {*RULES, *METHOD_RULES} - {"daa_anchor", "flow_cache"}
    return {
        **{name: getattr(settings, name) for name in sorted(ours)},
        **{name: str(getattr(training, name)) for name in names},
        "dataset": arguments["data_args"].dataset,
        "template": arguments["data_args"].template,
        "cutoff_len": arguments["data_args"].cutoff_len,
    }


def refuse_data(settings: Any, data: Any) -> None:
    """Raise ValueError for data in which FLOW cannot find its samples again."""
    for key in ("packing", "streaming"):
        if settings.use_flow_loss and getattr(data, key):
            raise ValueError(
                f"use_flow_loss=true cannot go with {key}=true: every sample has a weight of its "
                f"own, known before training. Set {key}: false"
                f"{' and neat_packing: false' if key == 'packing' else ''}."
            )


def refuse_missing(folder: Path, found: list[bool]) -> None:
    if not all(found):
        raise ValueError(
            f"daa_anchor={folder}: ranks {[i for i, here in enumerate(found) if here]} see an "
            f"anchor there, ranks {[i for i, here in enumerate(found) if not here]} see none. Put "
            "it on a file system that all nodes share, or copy it to each."
        )


def check_reuse(folder: Path, manifest: Manifest, arguments: Arguments) -> None:
    """Say that an anchor is reused; refuse one that was built in another way than asked.

    Template and cutoff_len are the domain's, too, and may differ from domain to domain: said, not
    refused.
    """
    settings: DaaSettings = arguments["finetuning_args"]
    names = settings.daa_anchor_dataset
    asked = {
        "daa_rank": (settings.daa_rank, manifest.rank),
        "daa_anchor_beta": (settings.daa_anchor_beta, manifest.beta),
        "daa_anchor_dataset": (split(names) if names else manifest.datasets, manifest.datasets),
    }
    for key, (now, built) in asked.items():
        if now != built:
            raise ValueError(
                f"{key}={now}, but the anchor in daa_anchor={folder} was built with {built}. Name "
                "another folder, delete this one to build it anew, or give the value it has."
            )
    if arguments["data_args"].template != manifest.template:
        logger.warning(
            f"template={arguments['data_args'].template}, but the anchor's general data was read "
            f"with template {manifest.template}."
        )
    logger.warning(
        f"Reusing the anchor in {folder}: {manifest.samples} samples of {manifest.datasets}, "
        f"template {manifest.template}, cutoff_len {manifest.cutoff_len}."
    )


def anchor_pass(arguments: Arguments, callbacks: list[Any]) -> Arguments:
    """The arguments of stage auto's anchor pass: the general data, one epoch, nothing else.

    callbacks: the host's for a run that logs and does nothing more.
    """
    settings, training = arguments["finetuning_args"], arguments["training_args"]
    data = arguments["data_args"]
    if settings.daa_anchor_dataset is None:
        raise ValueError(
            f"daa_stage=auto: there is no anchor in daa_anchor={settings.daa_anchor} and "
            "daa_anchor_dataset is not set. Name the general data to build it from."
        )
    if data.streaming:
        raise ValueError(
            "streaming=true: stage auto cannot know where the general data ends. Build the anchor "
            "with daa_stage: anchor and max_steps, then run daa_stage: anneal."
        )
    output_dir = str(Path(training.output_dir) / "anchor_pass")
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    return {
        **arguments,
        "data_args": changed(
            data,
            dataset=split(settings.daa_anchor_dataset),
            eval_dataset=None,
            val_size=0.0,
            tokenized_path=None,
            mix_strategy="concat",
            interleave_probs=None,
            max_samples=settings.daa_anchor_max_samples or data.max_samples,
        ),
        "training_args": changed(
            training,
            output_dir=output_dir,
            num_train_epochs=1.0,
            max_steps=-1,
            eval_strategy=IntervalStrategy.NO,
            do_eval=False,
            do_predict=False,
            predict_with_generate=False,
            push_to_hub=False,
            load_best_model_at_end=False,
            report_to=[],
            resume_from_checkpoint=None if training.overwrite_output_dir else last,
        ),
        "finetuning_args": changed(
            settings,
            plot_loss=False,
            use_dft_loss=False,
            use_asft_loss=False,
            use_eaft_loss=False,
            **dict.fromkeys(METHODS, False),
        ),
        "callbacks": callbacks,
    }


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def changed(arguments: Any, **changes: Any) -> Any:
    changed = copy.copy(arguments)
    for name, value in changes.items():
        assert hasattr(changed, name), name
        setattr(changed, name, value)
    return changed
