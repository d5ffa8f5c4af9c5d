"""use_l2_init in the host's trainer: theta0, the pull in every step, the report."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daa_ext.artifact import check_writable
from daa_ext.l2_init import PulledOptimizer, pull_factor
from daa_ext.report import write_report
from daa_ext.start_trainer import StartTrainerMixin


class L2InitTrainerMixin(StartTrainerMixin):
    """Full fine-tuning with a penalty on the distance from the base model."""

    daa_stage = "l2_init"
    daa_asked = "use_l2_init=true"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks.together(lambda: check_writable(Path(self.args.output_dir), "output_dir"))
        self.base_fingerprint = self.base_model_fingerprint()
        self.last_distance = 0.0  # before the latest step

    def keeps_start(self) -> bool:
        return True

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
        return {
            "stage": "l2_init",
            "total_steps": self.state.max_steps,
            "datasets": self.daa_run.datasets,
            "l2_init_lambda": strength,
            "distance": distance,
            "penalty": strength * distance**2 / self.trained,
            "start_bytes_per_rank": self.ranks.gather(self.start.nbytes),
            **self.common_report(),
        }
