"""What stages need whose optimizer steps with another gradient than the host's (`steered`)."""

from daa_ext.steered import SteeredOptimizer
from daa_ext.trainer import DaaTrainerMixin


class SteeredTrainerMixin(DaaTrainerMixin):
    """Measures each step alike with and without DeepSpeed; `begin` sets `steered`."""

    steered: SteeredOptimizer

    def before_step(self, norm: float) -> None:
        squared, inner = self.sums(self.args.device).tolist()
        factor = squared**0.5 / norm if norm > 0.0 and squared > 0.0 else 1.0
        self.before_engine_step(norm, inner / factor, lambda: factor)

    def step_skipped(self, expected: bool) -> None:
        self.steered.skip()
        super().step_skipped(expected)

    def after_step(self) -> None:
        self.steered.finish()

    def max_norm(self) -> float:
        """The host's clipping threshold; DeepSpeed has one of its own (0: it does not clip)."""
        if not self.is_deepspeed_enabled:
            return self.args.max_grad_norm or 0.0
        return float(self.deepspeed.gradient_clipping())

    def touched_params(self) -> int:
        """Weights of the model that the method acted on at the first step. Collective."""
        touched = sum(self.ranks.gather(self.steered.touched_elements))
        return touched if self.layout.sharded else touched // self.ranks.size
