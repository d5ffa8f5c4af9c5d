"""What both stages need of the host's Trainer, met at its public methods and callbacks."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from daa_ext.checkpoint import read_state, refuse_other_sharding, write_state
from daa_ext.engine import EngineSteps
from daa_ext.fragments import Fragment, Shape
from daa_ext.guard import NonFiniteGuard, refuse_unserved
from daa_ext.layout import Replicated
from daa_ext.mends import forget_modules, separate_step_counts
from daa_ext.passes import DaaRun
from daa_ext.ranks import Ranks
from daa_ext.report import peak_memory, versions
from daa_ext.weights import weights_fingerprint
from daa_ext.zero import full_shape, layout_of, own_share

if TYPE_CHECKING:
    from transformers import Trainer as HostTrainer
else:
    HostTrainer = object


class DaaTrainerMixin(HostTrainer):
    """Stands before a host trainer; the subclasses say what a stage does at each event."""

    daa_stage: str  # as the report and the checkpoints name it
    daa_asked = "finetuning_type=daa"  # the key that asked for the stage, in messages
    daa_run: DaaRun  # set on the class, which is made for one run
    optimizer: Any  # of the host: an Optimizer, wrapped by accelerate once training begins

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = Ranks.of_run(self.args.device)
        self.daa_guard = NonFiniteGuard(0)
        self.resumed: dict[str, Any] = {}  # state of the checkpoint that this run resumes from
        self._grad_norm: float | None = None
        refuse_unserved(
            self.daa_asked, self.model, self.trainable(), self.accelerator.distributed_type
        )
        if not self.is_deepspeed_enabled:
            self._host_clip = self.accelerator.clip_grad_norm_
            self.accelerator.clip_grad_norm_ = self._clip_and_remember  # type: ignore[method-assign]
        self.add_callback(_StageEvents(self))

    def begin(self) -> None:
        """Everything is in place (optimizer, checkpoint), the first step has not been taken."""
        self.daa_guard.total_steps = self.state.max_steps
        if self.is_deepspeed_enabled:
            size = (self.ranks.rank, self.ranks.size)
            self.layout = layout_of(self.deepspeed, self.trainable(), *size)
            self._engine_steps = EngineSteps(self.deepspeed, self.layout, self.ranks, self)
            self._engine_steps.install()
            if self.resumed:
                separate_step_counts(self.inner_optimizer())
        else:
            self.layout = Replicated(self.trainable())

    def end(self) -> None:
        """The last step has been taken; the model is what will be saved."""
        if self.is_deepspeed_enabled:
            self._engine_steps.uninstall()

    def release(self) -> None:
        """The run is over: let go of what would keep the engine and its memory alive."""
        if self.is_deepspeed_enabled:
            self.accelerator.free_memory()  # destroys the engine: its hooks hold the model
            forget_modules()

    def resume(self, checkpoint: str) -> None:
        """The run continues from this checkpoint, which the host has not loaded yet."""
        self.resumed = self.ranks.together(lambda: self._read_state(checkpoint))
        self.daa_guard.skipped = self.resumed["skipped"]

    def settings_to_resume(self) -> dict[str, Any]:
        """What must be the same in a run and in the one that resumes it, unless forced."""
        return {}

    def fixed_to_resume(self) -> dict[str, Any]:
        """What must be the same, because a mixture of two values would mean nothing."""
        return {}

    def sums(self, device: torch.device) -> Tensor:
        """[||g||^2, <g, g_hat>] of this rank's gradients as they are now, fp64, on `device`."""
        raise NotImplementedError

    def before_step(self, norm: float) -> None:
        """The gradient, clipped by the host, had this finite norm; the optimizer steps next."""

    def before_engine_step(self, norm: float, inner: float, factor: Callable[[], float]) -> None:
        """The same from a DeepSpeed engine, which has not clipped yet; see `engine.Stage`."""

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def step_skipped(self, expected: bool) -> None:
        """The gradients are gone: NaN or infinite. `expected` under loss scaling."""
        if not expected:
            self.daa_guard.count(self.state.global_step)

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
        """The optimizer itself, without the wrappers of accelerate and DeepSpeed."""
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def base_model_fingerprint(self) -> str:
        """`model_fingerprint` of the weights that train, each rank reading a part. Collective."""
        return weights_fingerprint(self.trainable(), self.ranks)

    def own_weights(self) -> Iterator[tuple[Fragment, Tensor]]:
        """(fragment, its weights, flat) of an equal part of every parameter that trains."""
        return own_share(self.trainable(), self.ranks.rank, self.ranks.size)

    def trainable_shapes(self) -> dict[str, Shape]:
        return {name: full_shape(parameter) for name, parameter in self.trainable()}

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        self.daa_started = time.perf_counter()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self.resume(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def prepare_step(self) -> None:
        """Between backward and optimizer step: hand over the norm, or skip what is not finite."""
        if self.is_deepspeed_enabled:
            return  # the engine has stepped inside backward
        if self._grad_norm is None:  # with max_grad_norm: 0 transformers 5.0 does not ask
            parameters = [parameter for _, parameter in self.trainable()]
            self._grad_norm = float(self._host_clip(parameters, math.inf))
        norm, self._grad_norm = self._grad_norm, None
        if math.isfinite(norm):
            self.before_step(norm)
            return
        self.optimizer.zero_grad()
        self.step_skipped(expected=self.accelerator.scaler is not None)

    def step_taken(self) -> None:
        """The host says that an optimizer step is over."""
        if not self.is_deepspeed_enabled:
            self.after_step()

    def common_report(self) -> dict[str, Any]:
        """The fields of daa_report.json that do not depend on the stage. Collective."""
        wall = time.perf_counter() - self.daa_started
        accelerators = self.args.world_size if self.args.device.type != "cpu" else 0
        return {
            "trainable_params": sum(map(math.prod, self.trainable_shapes().values())),
            "skipped_steps": self.daa_guard.skipped,
            "world_size": self.ranks.size,
            "zero_stage": self._sharding()["zero_stage"],
            "wall_seconds": wall,
            "gpu_hours": wall / 3600 * accelerators,
            "peak_memory_bytes_per_rank": self.ranks.gather(peak_memory()),
            "versions": versions(),
        }

    def save_checkpoint_state(self) -> None:
        content = {
            "total_steps": self.state.max_steps,
            "stage": self.daa_stage,
            "skipped": self.daa_guard.skipped,
            **self._sharding(),
            **self.fixed_to_resume(),
            **self.settings_to_resume(),
            **self.checkpoint_state(),
        }
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_state(folder, content)

    def _read_state(self, checkpoint: str) -> dict[str, Any]:
        expected = {"stage": self.daa_stage, **self.fixed_to_resume()}
        force = self.daa_run.settings.daa_force_resume
        state = read_state(checkpoint, expected, self.settings_to_resume(), force)
        universal = bool(self._ds_value("checkpoint.load_universal"))
        if universal and self._sharding()["zero_stage"] == 3 and self.args.weight_decay > 0.0:
            raise ValueError(
                f"weight_decay={self.args.weight_decay}: from a universal checkpoint ZeRO-3 gives "
                "all parameters the decay of the first group. Resume on the same number of ranks, "
                "with ZeRO 1 or 2, or set weight_decay: 0."
            )
        refuse_other_sharding(checkpoint, state, self._sharding(), universal)
        return state

    def _sharding(self) -> dict[str, Any]:
        """How DeepSpeed shards this run: its checkpoints can be read by the same alone."""
        stage = (
            (self._ds_value("zero_optimization.stage") or 0) if self.is_deepspeed_enabled else None
        )
        return {"zero_stage": stage, "world_size": self.ranks.size}

    def _ds_value(self, key: str) -> Any:
        if not self.is_deepspeed_enabled:
            return None
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.get_value(key)

    def _clip_and_remember(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = self._host_clip(parameters, self.clip_threshold(max_norm), norm_type=norm_type)
        self._grad_norm = float(norm)
        return norm


class _StageEvents(TrainerCallback):
    """Hands the host's events to the trainer. One object, so their order is the trainer's."""

    def __init__(self, trainer: DaaTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.prepare_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_taken()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_checkpoint_state()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end()
