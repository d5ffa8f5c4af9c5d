"""A change of the gradients between the host's clipping and the step of the user's optimizer.

The hooks that torch offers (`register_step_pre_hook`, `register_step_post_hook`) survive every
wrapper of the hosts, so the user keeps the optimizer. What is changed, and into what, is a
subclass's: `anchored` brings the anchor, `l2_init` the pull to the starting weights.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from daa_ext.fragments import Fragment
from daa_ext.layout import Layout

Change = Callable[[Fragment, Tensor], None]  # in place, on the flat gradient of a fragment


class SteeredOptimizer:
    """Hangs on `optimizer`, whose buffers and their fragments `layout` knows.

    Per step: the subclass's `arm` says what was measured (it calls `_expect_step`), then the host
    calls `optimizer.step()`, once or once per buffer. A step that was not armed is an error, so a
    host that changes its order of calls cannot turn the method off unseen; so is a buffer that
    is stepped twice, or not at all (`finish`).
    """

    method = ""  # as messages name it

    def __init__(self, optimizer: Optimizer, layout: Layout) -> None:
        self.layout = layout
        self.touched_elements = 0  # on this rank, at the first step that was not skipped
        self._first_step: int | None = None
        self._step: int | None = None  # armed for this one
        self._optimizer = optimizer
        self._buffers = {id(buffer.parameter): buffer for buffer in layout.buffers()}
        self._waiting: set[int] = set()  # buffers that this step has yet to reach
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def skip(self) -> None:
        """Announce that the host throws this step's gradients away."""
        if self.touched_elements == 0:
            self._first_step = None
        self._step = None
        self._waiting = set()

    def finish(self) -> None:
        """The host says that the step is done: every buffer must have been reached."""
        assert not self._waiting, "the host stepped only a part of the parameters"
        self._step = None

    def _expect_step(self, step: int) -> None:
        assert not self._waiting, "the last step did not reach every buffer"
        self._first_step = step if self._first_step is None else self._first_step
        self._step = step
        self._waiting = set(self._buffers)

    def _change(self) -> Change | None:
        """What this inner step does to gradients; None leaves them as they are."""
        raise NotImplementedError

    def _prepare(self, optimizer: Optimizer) -> None:
        """The gradients are what they will be; the optimizer steps next."""

    def pieces_in(self, stepped: Iterable[Tensor]) -> Iterator[Fragment]:
        """The fragments that lie in these tensors of the optimizer."""
        return (piece for p in stepped for piece in self._buffers[id(p)].fragments)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        reached = [p for p in stepped if p.grad is not None]
        if not reached and self._step is None:
            return
        assert self._step is not None, (
            f"optimizer.step() without arm(): {self.method} would not run"
        )
        if not reached:
            raise ValueError(
                f"Step {self._step}: no parameter has a gradient, so {self.method} would not act. "
                "Do not hand the gradients to another optimizer."
            )
        keys = {id(parameter) for parameter in stepped}
        assert keys <= self._waiting, "a buffer is stepped twice, or is not in the layout"
        self._waiting -= keys
        change = self._change()
        if change is not None:
            for parameter in stepped:
                if parameter.grad is None:  # the batch did not reach it: its gradient is 0
                    parameter.grad = torch.zeros_like(parameter)
                flat = parameter.grad.view(-1)
                for piece in self._buffers[id(parameter)].fragments:
                    change(piece, flat[piece.offset : piece.offset + piece.numel])
        self._prepare(optimizer)
        if self._step == self._first_step:
            touched = reached if change is None else stepped
            self.touched_elements += sum(piece.numel for piece in self.pieces_in(touched))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The weights of these buffers have moved."""
