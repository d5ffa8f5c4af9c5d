"""What both stages need of the host's Trainer, met at its public methods and callbacks."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from daa_ext.config import DaaSettings
from daa_ext.report import peak_memory, versions

if TYPE_CHECKING:
    from transformers import Trainer as HostTrainer
else:
    HostTrainer = object

logger = logging.get_logger(__name__)

CHECKPOINT_STATE = "daa_state.json"


@dataclass(frozen=True)
class DaaRun:
    """What the YAML says beyond the arguments that the host hands to its trainers."""

    settings: DaaSettings
    base_model: str
    datasets: list[str]
    template: str | None
    cutoff_len: int
    host_stage: str
    load_eval: Callable[[str, Any], dict[str, Any]]  # (names, tokenizer) -> {name: data set}


@dataclass
class NonFiniteGuard:
    """Counts steps whose gradient is NaN or infinite; a run with too many is stopped."""

    total_steps: int
    skipped: list[int] = field(default_factory=list)

    @property
    def limit(self) -> int:
        """Steps that may be skipped: 5 % of the run, at least 3."""
        return max(3, self.total_steps // 20)

    def count(self, step: int) -> None:
        self.skipped.append(step)
        logger.warning(f"Step {step}: the gradient is NaN or infinite; the step is skipped.")
        if len(self.skipped) > self.limit:
            raise ValueError(
                f"{len(self.skipped)} steps had a NaN or infinite gradient (steps "
                f"{self.skipped}), more than the {self.limit} allowed in {self.total_steps}. "
                "Look for NaN in the base model and for broken samples; lower learning_rate or "
                "set bf16: true instead of fp16."
            )


class DaaTrainerMixin(HostTrainer):
    """Stands before a host trainer; the subclasses say what a stage does at each event."""

    optimizer: Any  # of the host: an Optimizer, wrapped by accelerate once training begins

    def __init__(self, *args: Any, daa_run: DaaRun, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.daa_run = daa_run
        self.daa_guard = NonFiniteGuard(0)
        self._grad_norm: float | None = None
        self._refuse_unserved()
        self._host_clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_and_remember  # type: ignore[method-assign]
        self.add_callback(_StageEvents(self))

    def begin(self) -> None:
        """Everything is in place (optimizer, checkpoint), the first step has not been taken."""
        raise NotImplementedError

    def end(self) -> None:
        """The last step has been taken; the model is what will be saved."""

    def resume(self, checkpoint: str) -> None:
        """The run continues from this checkpoint, which the host has not loaded yet."""
        raise NotImplementedError

    def before_step(self, grad_norm: float) -> None:
        """The whole-batch gradient has this finite norm; the optimizer steps next."""

    def step_skipped(self) -> None:
        """The gradients are gone; the optimizer steps next and does nothing."""

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint must remember of the stage (JSON). Collective."""
        raise NotImplementedError

    def clip_threshold(self, asked: float) -> float:
        """The norm to clip at when the host asks for `asked`."""
        return asked

    def trainable(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) of all that trains, by the names of the unwrapped model."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def inner_optimizer(self) -> Optimizer:
        """The optimizer itself, without the wrappers of accelerate."""
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        self.daa_started = time.perf_counter()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self.resume(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def prepare_step(self) -> None:
        """Between backward and optimizer step: hand over the norm, or skip what is not finite."""
        if self._grad_norm is None:  # with max_grad_norm: 0 transformers 5.0 does not ask
            parameters = [parameter for _, parameter in self.trainable()]
            self._grad_norm = float(self._host_clip(parameters, math.inf))
        norm, self._grad_norm = self._grad_norm, None
        if math.isfinite(norm):
            self.before_step(norm)
            return
        if self.accelerator.scaler is None:  # with one, infinite gradients are its daily work
            self.daa_guard.count(self.state.global_step)
        self.optimizer.zero_grad()
        self.step_skipped()

    def common_report(self) -> dict[str, Any]:
        """The fields of daa_report.json that do not depend on the stage. Collective."""
        wall = time.perf_counter() - self.daa_started
        accelerators = self.args.world_size if self.args.device.type != "cpu" else 0
        return {
            "trainable_params": sum(p.numel() for _, p in self.trainable()),
            "skipped_steps": self.daa_guard.skipped,
            "world_size": self.args.world_size,
            "wall_seconds": wall,
            "gpu_hours": wall / 3600 * accelerators,
            "peak_memory_bytes_per_rank": gather_object([peak_memory()]),
            "versions": versions(),
        }

    def save_checkpoint_state(self) -> None:
        content = {"total_steps": self.state.max_steps, **self.checkpoint_state()}
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / CHECKPOINT_STATE).write_text(json.dumps(content))

    def _clip_and_remember(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = self._host_clip(parameters, self.clip_threshold(max_norm), norm_type=norm_type)
        self._grad_norm = float(norm)
        return norm

    def _refuse_unserved(self) -> None:
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                f"finetuning_type=daa does not serve {kind.value} yet: this version runs on one "
                "process or DDP. Remove deepspeed/fsdp from the YAML."
            )
        if getattr(self.model, "is_quantized", False):
            raise ValueError(
                "finetuning_type=daa trains all weights and cannot train a quantized base "
                f"({self.daa_run.base_model}). Use the unquantized model."
            )
        for name, parameter in self.trainable():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name} trains in {parameter.dtype}: a step of learning_rate=1e-7 vanishes "
                    "there. DAA needs fp32 weights (bf16: true computes in bf16 and keeps them)."
                )


def read_checkpoint_state(checkpoint: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What `save_checkpoint_state` wrote.

    Args:
        checkpoint: the folder that the run resumes from.
        expected: entries that must be what they were, by name.

    Raises:
        ValueError: not a checkpoint of this method, or an entry differs.
    """
    path = Path(checkpoint) / CHECKPOINT_STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint}: {CHECKPOINT_STATE} is missing or damaged "
            f"({error}): not a whole checkpoint of a DAA run. Resume from another checkpoint, or "
            "start anew with overwrite_output_dir: true."
        ) from error
    for name, value in expected.items():
        if state.get(name) != value:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: {name}={value} now, but the run that is "
                f"to be resumed had {name}={state.get(name)}. Resume with the same value, or "
                "start anew with overwrite_output_dir: true."
            )
    return state


class _StageEvents(TrainerCallback):
    """Hands the host's events to the trainer. One object, so their order is the trainer's."""

    def __init__(self, trainer: DaaTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.daa_guard.total_steps = state.max_steps
        self.trainer.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.prepare_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_checkpoint_state()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end()
