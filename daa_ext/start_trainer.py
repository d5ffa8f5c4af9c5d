"""What stages need that compare the weights with those that the run started from."""

from typing import Any

from torch import Tensor

from daa_ext.layout import Replicated
from daa_ext.start import Start, starting_weights
from daa_ext.steered_trainer import SteeredTrainerMixin
from daa_ext.zero import layout_of


class StartTrainerMixin(SteeredTrainerMixin):
    """Keeps theta0 where `keeps_start` says so; from `begin` on it is `start`."""

    start: Start
    _theta0: dict[str, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.keeps_start() and not self.is_deepspeed_enabled:  # else `create_scheduler`
            self._theta0 = starting_weights(Replicated(self.trainable()))

    def keeps_start(self) -> bool:
        raise NotImplementedError

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The host calls this when the engine is there and a checkpoint has not been loaded."""
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if self.keeps_start() and self.is_deepspeed_enabled and wrapped is not None:
            size = (self.ranks.rank, self.ranks.size)
            self._theta0 = starting_weights(layout_of(wrapped.engine, self.trainable(), *size))
        return super().create_scheduler(*args, **kwargs)

    def begin(self) -> None:
        super().begin()
        if self.keeps_start():
            self.start = Start(self.layout, self._theta0)

    def distance(self) -> float:
        """||theta - theta0|| of the whole model. Collective."""
        return self._whole(self.start.squared_distance(self.ranks.device))

    def start_norm(self) -> float:
        """||theta0|| of the whole model. Collective."""
        return self._whole(self.start.squared_norm(self.ranks.device))

    def _whole(self, squared: Tensor) -> float:
        return float(self.ranks.add_up(squared) if self.layout.sharded else squared) ** 0.5
