"""The stages of a DAA run, each one run of LLaMA-Factory's own workflow (run_sft or run_pt).

    llamafactory.train.{sft,pt}.workflow.run_{sft,pt}            runs the stages of a DAA run
    llamafactory.train.{sft,pt}.workflow.Custom...Trainer        gets our mixin for one stage

Both are patched when a YAML first says finetuning_type: daa, and hand every other run of the
process to the host unchanged. Only this module and plugin.py import the host.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.train.callbacks import LogCallback
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint
from transformers.utils import logging

from daa_ext.anchor_trainer import AnchorTrainerMixin
from daa_ext.anneal_trainer import AnnealTrainerMixin
from daa_ext.artifact import is_anchor, read_manifest
from daa_ext.config import DaaSettings
from daa_ext.manifest import Manifest
from daa_ext.trainer import DaaRun

logger = logging.get_logger(__name__)

Arguments = dict[str, Any]  # of a workflow: model_args, data_args, training_args, ...


TRAINERS = {"sft": "CustomSeq2SeqTrainer", "pt": "CustomTrainer"}
_installed: dict[str, "Workflow"] = {}


@dataclass(frozen=True)
class Workflow:
    """One of the host's workflows, its module, and the trainer that it builds by that name."""

    function: Callable[..., None]
    module: ModuleType
    trainer_name: str
    trainer: type

    def run(self, mixin: type, arguments: Arguments) -> None:
        """Run the workflow with `mixin` in front of its trainer."""
        daa_class = type(f"Daa{self.trainer_name}", (mixin, self.trainer), {})
        factory = functools.partial(daa_class, daa_run=_describe(arguments))
        with _replaced(self.module, self.trainer_name, factory):
            self.function(**arguments)


def install(stage: str) -> None:
    """Let the host's workflow of `stage` (sft or pt) run the stages of a DAA run. Idempotent.

    Raises:
        AttributeError, ImportError: the host has moved what this module needs.
    """
    if stage in _installed:
        return
    function_name, trainer_name = f"run_{stage}", TRAINERS[stage]
    module = importlib.import_module(f"llamafactory.train.{stage}.workflow")
    workflow = Workflow(
        getattr(module, function_name), module, trainer_name, getattr(module, trainer_name)
    )

    @functools.wraps(workflow.function)
    def run(*positional: Any, **named: Any) -> None:
        arguments = inspect.signature(workflow.function).bind(*positional, **named).arguments
        if arguments["finetuning_args"].use_daa and arguments["training_args"].do_train:
            run_stages(workflow, dict(arguments))
        else:
            workflow.function(*positional, **named)

    def trainer(*positional: Any, **named: Any) -> Any:
        if named["finetuning_args"].use_daa and named["args"].do_train:
            raise RuntimeError(
                f"{function_name} was called in a way that does not pass through daa_ext "
                "(imported before torch was): DAA would not act. Import torch first."
            )
        return workflow.trainer(*positional, **named)

    _installed[stage] = workflow
    module.__dict__[trainer_name] = trainer
    for name in (module.__name__, f"llamafactory.train.{stage}", "llamafactory.train.tuner"):
        if name in sys.modules:
            setattr(sys.modules[name], function_name, run)


def run_stages(workflow: Workflow, arguments: Arguments) -> None:
    """Anchor, anneal, or both, in this process and on all its ranks.

    Raises:
        ValueError: the YAML asks for what this version does not serve, or an anchor that was
            built otherwise than the YAML says.
    """
    settings, training = arguments["finetuning_args"], arguments["training_args"]
    if training.deepspeed:
        raise ValueError(
            f"deepspeed={training.deepspeed}: this version of daa_ext runs on one process or DDP "
            "and does not act under DeepSpeed. Remove the key."
        )
    if settings.daa_stage == "anchor":
        workflow.run(AnchorTrainerMixin, arguments)
        return
    if settings.daa_stage == "auto":
        folder = Path(settings.daa_anchor)
        if is_anchor(folder):
            _check_reuse(folder, read_manifest(folder), arguments)
        else:
            workflow.run(AnchorTrainerMixin, _anchor_pass(arguments))
            transformers.set_seed(training.seed)  # as if the pass had not been
    workflow.run(AnnealTrainerMixin, arguments)


def _describe(arguments: Arguments) -> DaaRun:
    data = arguments["data_args"]
    return DaaRun(
        settings=arguments["finetuning_args"],
        base_model=str(arguments["model_args"].model_name_or_path),
        datasets=list(data.dataset),
        template=data.template,
        cutoff_len=data.cutoff_len,
        host_stage=arguments["finetuning_args"].stage,
        load_eval=functools.partial(_load_eval, arguments),
    )


def _load_eval(arguments: Arguments, names: str, tokenizer: Any) -> dict[str, Any]:
    """Data sets by LLaMA-Factory name, read as the host reads evaluation sets: {name: set}."""
    data = _changed(
        arguments["data_args"],
        dataset=None,
        eval_dataset=_split(names),
        eval_on_each_dataset=True,
        val_size=0.0,
        tokenized_path=None,
    )
    template = get_template_and_fix_tokenizer(tokenizer, data)
    stage = arguments["finetuning_args"].stage
    loaded = get_dataset(
        template, arguments["model_args"], data, arguments["training_args"], stage, tokenizer
    )
    return loaded["eval_dataset"]


def _check_reuse(folder: Path, manifest: Manifest, arguments: Arguments) -> None:
    """Say that an anchor is reused; refuse one that was built in another way than asked.

    Template and cutoff_len are the domain's, too, and may differ from domain to domain: said, not
    refused.
    """
    settings: DaaSettings = arguments["finetuning_args"]
    names = settings.daa_anchor_dataset
    asked = {
        "daa_rank": (settings.daa_rank, manifest.rank),
        "daa_anchor_beta": (settings.daa_anchor_beta, manifest.beta),
        "daa_anchor_dataset": (_split(names) if names else manifest.datasets, manifest.datasets),
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


def _anchor_pass(arguments: Arguments) -> Arguments:
    """The arguments of stage auto's anchor pass: the general data, one epoch, nothing else."""
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
        "data_args": _changed(
            data,
            dataset=_split(settings.daa_anchor_dataset),
            eval_dataset=None,
            val_size=0.0,
            tokenized_path=None,
            mix_strategy="concat",
            interleave_probs=None,
            max_samples=settings.daa_anchor_max_samples or data.max_samples,
        ),
        "training_args": _changed(
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
        "finetuning_args": _changed(
            settings, plot_loss=False, use_dft_loss=False, use_asft_loss=False, use_eaft_loss=False
        ),
        "callbacks": [LogCallback()],
    }


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _changed(arguments: Any, **changes: Any) -> Any:
    changed = copy.copy(arguments)
    for name, value in changes.items():
        assert hasattr(changed, name), name
        setattr(changed, name, value)
    return changed


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
