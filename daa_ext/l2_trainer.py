"""use_l2_init in the host's trainer: theta0, the pull in every step, the report."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daa_ext.artifact import check_writable
from daa_ext.l2_init import PulledOptimizer, pull_factor, starting_weights
from daa_ext.layout import Replicated
from daa_ext.report import write_report
from daa_ext.steered_trainer import SteeredTrainerMixin
from daa_ext.zero import layout_of


class L2InitTrainerMixin(SteeredTrainerMixin):
    """Full fine-tuning with a penalty on the distance from the base model."""

    daa_stage = "l2_init"
    daa_asked = "use_l2_init=true"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks.together(lambda: check_writable(Path(self.args.output_dir), "output_dir"))
        self.base_fingerprint = self.base_model_fingerprint()
        self.last_distance = 0.0  # before the latest step
        if not self.is_deepspeed_enabled:  # else `create_scheduler`
            self.start = starting_weights(Replicated(self.trainable()))

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The host calls this when the engine is there and a checkpoint has not been loaded."""
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if self.is_deepspeed_enabled and wrapped is not None:
            size = (self.ranks.rank, self.ranks.size)
            self.start = starting_weights(layout_of(wrapped.engine, self.trainable(), *size))
        return super().create_scheduler(*args, **kwargs)

    def begin(self) -> None:
        super().begin()
        self.trained = sum(math.prod(shape) for shape in self.trainable_shapes().values())
        kappa = pull_factor(self.daa_run.settings.l2_init_lambda, self.trained)
        optimizer, limit = self.inner_optimizer(), self.max_norm()
        self.pulled = PulledOptimizer(optimizer, self.layout, self.start, kappa, limit)
        self.steered = self.pulled

    def fixed_to_resume(self) -> dict[str, Any]:
        return {
            "base_fingerprint": self.base_fingerprint,
            "l2_init_lambda": self.daa_run.settings.l2_init_lambda,
        }

    def sums(self, device: torch.device) -> Tensor:
        return self.pulled.sums(device)

    def before_engine_step(self, norm: float, inner: float, factor: Callable[[], float]) -> None:
        self.last_distance = self.distance()
        self.pulled.arm(self.state.global_step, norm, inner, self.last_distance, factor)

    def distance(self) -> float:
        """||theta - theta0|| of the whole model. Collective."""
        squared = self.pulled.squared_distance(self.ranks.device)
        return float(self.ranks.add_up(squared) if self.layout.sharded else squared) ** 0.5

    def checkpoint_state(self) -> dict[str, Any]:
        return {}  # theta0 is the base model, which a resumed run loads before the checkpoint

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["l2_init/distance"] = self.last_distance
        super().log(logs, *args, **kwargs)

    def end(self) -> None:
        super().end()
        touched = self.touched_params()
        if touched == 0:
            raise ValueError(
                "use_l2_init=true did not act: no optimizer step was taken. Check the data and "
                "max_steps, and, when resuming, that the checkpoint is not of a finished run (a "
                "finished run in output_dir is resumed unless overwrite_output_dir: true)."
            )
        assert touched == self.trained, f"{touched} of {self.trained} weights were pulled"
        report = self._report()
        if self.is_world_process_zero():
            write_report(Path(self.args.output_dir), report)

    def _report(self) -> dict[str, Any]:
        distance = self.distance()
        strength = self.daa_run.settings.l2_init_lambda
        start_bytes = sum(tensor.nbytes for tensor in self.start.values())
        return {
            "stage": "l2_init",
            "total_steps": self.state.max_steps,
            "datasets": self.daa_run.datasets,
            "l2_init_lambda": strength,
            "distance": distance,
            "penalty": strength * distance**2 / self.trained,
            "start_bytes_per_rank": self.ranks.gather(start_bytes),
            **self.common_report(),
        }
