"""Steps whose gradient is NaN or infinite: a few are skipped and reported, many end the run."""

from dataclasses import dataclass, field

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
