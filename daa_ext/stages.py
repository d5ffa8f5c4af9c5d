"""The stages of a DAA run, each one run of LLaMA-Factory's own workflow (run_sft or run_pt).

    llamafactory.train.{sft,pt}.workflow.run_{sft,pt}            runs the stages of a DAA run
    llamafactory.train.{sft,pt}.workflow.Custom...Trainer        gets our mixins for one stage

A run that switches one of our other methods on has one stage. Both names are patched when a YAML
first asks for us, and hand every other run of the process to the host unchanged. Only this module
and plugin.py import the host.
"""

import contextlib
import functools
import gc
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

from daa_ext import ds_config
from daa_ext.anchor_trainer import AnchorTrainerMixin
from daa_ext.anneal_trainer import AnnealTrainerMixin
from daa_ext.artifact import is_anchor, read_manifest
from daa_ext.methods import mixins
from daa_ext.passes import (
    Arguments,
    DaaRun,
    anchor_pass,
    changed,
    check_reuse,
    refuse_data,
    refuse_missing,
    settings_of_all_ranks,
    split,
)
from daa_ext.ranks import Ranks
from daa_ext.trainer import DaaTrainerMixin

TRAINERS = {"sft": "CustomSeq2SeqTrainer", "pt": "CustomTrainer"}
_installed: dict[str, "Workflow"] = {}


@dataclass(frozen=True)
class Workflow:
    """One of the host's workflows, its module, and the trainer that it builds by that name."""

    function: Callable[..., None]
    module: ModuleType
    trainer_name: str
    trainer: type

    def run(self, mixins: tuple[type, ...], arguments: Arguments) -> None:
        """Run the workflow with `mixins` in front of its trainer, as its attribute `daa_run` the
        description of the run."""
        described = {"daa_run": _describe(arguments)}
        trainer_class = type(f"Daa{self.trainer_name}", (*mixins, self.trainer), described)
        built: list[Any] = []

        def factory(*positional: Any, **named: Any) -> Any:
            built.append(trainer_class(*positional, **named))
            return built[-1]

        with _replaced(self.module, self.trainer_name, factory):
            self.function(**arguments)
        trainer = built.pop()
        if isinstance(trainer, DaaTrainerMixin):
            trainer.release()
        del trainer
        gc.collect()  # model and trainer hold each other; the next stage needs their memory


def install(stage: str) -> None:
    """Let the host's workflow of `stage` (sft or pt) run our stages and methods. Idempotent.

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
        if arguments["finetuning_args"].needs_daa_ext() and arguments["training_args"].do_train:
            run_stages(workflow, dict(arguments))
        else:
            workflow.function(*positional, **named)

    def trainer(*positional: Any, **named: Any) -> Any:
        if named["finetuning_args"].needs_daa_ext() and named["args"].do_train:
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
    """Anchor, anneal, both, or the one stage of another method; on all ranks of this process.

    Raises:
        ValueError: the YAML asks for what this version does not serve, or an anchor that was
            built otherwise than the YAML says.
    """
    settings, training = arguments["finetuning_args"], arguments["training_args"]
    ranks = Ranks.of_run(training.device)
    ranks.refuse_differences(
        settings_of_all_ranks(arguments), "Start every node with the same YAML."
    )
    refuse_data(settings, arguments["data_args"])
    methods = mixins(settings)
    reads_engine = settings.use_daa or any(issubclass(m, DaaTrainerMixin) for m in methods)
    if training.deepspeed and reads_engine:
        ds_config.refuse(training.deepspeed)
    if not settings.use_daa:
        workflow.run(methods, arguments)
        return
    if settings.daa_stage == "anchor":
        workflow.run((AnchorTrainerMixin,), _for_stage("anchor", arguments))
        return
    if settings.daa_stage == "auto":
        folder = Path(settings.daa_anchor)
        found = ranks.gather(is_anchor(folder))
        if any(found):
            refuse_missing(folder, found)
            check_reuse(folder, read_manifest(folder), arguments)
        else:
            general = anchor_pass(arguments, [LogCallback()])
            workflow.run((AnchorTrainerMixin,), _for_stage("anchor", general))
            transformers.set_seed(training.seed)  # as if the pass had not been
    workflow.run((*methods, AnnealTrainerMixin), _for_stage("anneal", arguments))


def _for_stage(daa_stage: str, arguments: Arguments) -> Arguments:
    training = ds_config.for_stage(arguments["training_args"], daa_stage)
    return {**arguments, "training_args": training}


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
    data = changed(
        arguments["data_args"],
        dataset=None,
        eval_dataset=split(names),
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


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
