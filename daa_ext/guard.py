"""What ends a run: a model that DAA cannot train, too many steps without a finite gradient."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)


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


def refuse_unserved(
    asked: str, model: Any, named: Iterable[tuple[str, Tensor]], kind: DistributedType
) -> None:
    """Raise ValueError for FSDP, a quantized base, or weights in which small steps vanish.

    Args:
        asked: the key and value that the message begins with.
        named: the parameters that train.
        kind: how accelerate distributes the run.
    """
    if kind == DistributedType.FSDP:
        raise ValueError(
            f"{asked} does not serve FSDP: use DDP or DeepSpeed ZeRO "
            "(deepspeed: deepspeed_configs/ds_z3.json shards the weights as FSDP does)."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{asked} trains all weights and cannot train a quantized base. Use the "
            "unquantized model."
        )
    for name, parameter in named:
        # DeepSpeed keeps fp32 weights of its own where the model computes in bf16 or fp16.
        if parameter.dtype != torch.float32 and kind != DistributedType.DEEPSPEED:
            raise ValueError(
                f"{name} trains in {parameter.dtype}: a step of learning_rate=1e-7 vanishes "
                f"there. {asked} needs fp32 weights (bf16: true computes in bf16 and keeps them)."
            )
