"""EngineSteps around an engine that does DeepSpeed's arithmetic on one parameter.

A stand-in, because DeepSpeed has no fp16 on CPUs without fp16 units: the loss scale, its change
between measuring and stepping, and the steps that overflow can only be played here. The real
engines in fp32 and bf16 are in test_sharded and test_matrix.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from daa_ext.anchored import AnchoredOptimizer, AnnealRule, Measured
from daa_ext.engine import EngineSteps
from daa_ext.layout import Replicated, squared_norm
from daa_ext.parts import DensePart
from daa_ext.ranks import Ranks
from daa_ext.resident import ResidentAnchor

ONE = Ranks(0, 1, torch.device("cpu"))
CLIP = 1.0


class Scaled(Replicated):
    """Gradients times a loss scale that the engine may change."""

    scale = 1.0

    def loss_scale(self) -> float:
        return self.scale


class Wrapper:
    """Stands for ZeRO's optimizer: not a torch Optimizer, so it looks for overflow itself."""


class Engine:
    """Unscales, clips and steps SGD; skips what is not finite; doubles the scale if told to."""

    def __init__(self, parameter: Parameter, layout: Scaled, doubles: bool = False) -> None:
        self.parameter, self.layout, self.doubles = parameter, layout, doubles
        self.inner = torch.optim.SGD([parameter], lr=1.0)
        self.optimizer: Any = Wrapper()
        self.at_boundary, self.applied, self.calls = True, False, 0

    def step(self) -> None:
        self.calls += 1
        grad = self.parameter.grad
        assert grad is not None
        norm = float(grad.norm())
        self.applied = norm < float("inf")
        if self.applied:
            self.layout.scale *= 2.0 if self.doubles else 1.0
            scale = self.layout.scale
            grad.mul_(1.0 / (max(1.0, (norm / scale + 1e-6) / CLIP) * scale))
            self.inner.step()
        self.parameter.grad = None

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.at_boundary

    def was_step_applied(self) -> bool:
        return self.applied

    def gradient_clipping(self) -> float:
        return CLIP

    def fp16_enabled(self) -> bool:
        return self.layout.scale != 1.0


class Stage:
    """Anneals with one parameter; notes what it was told."""

    def __init__(self, engine: Engine, g_hat: Tensor) -> None:
        rule = AnnealRule(total_steps=4, k0=2.0, c0=0.01, gga=True, dc=False, max_norm=CLIP)
        anchor = ResidentAnchor({"w": DensePart(g_hat)}, float(g_hat.norm()))
        self.anchored = AnchoredOptimizer(engine.inner, engine.layout, anchor, rule)
        self.heard: list[Any] = []

    def sums(self, device: torch.device) -> Tensor:
        return self.anchored.sums(device)

    def before_engine_step(self, norm: float, inner: float, factor: Callable[[], float]) -> None:
        self.heard.append(("norm", norm))
        self.anchored.arm(0, Measured(norm, inner), factor)

    def after_step(self) -> None:
        self.anchored.finish()
        self.heard.append("stepped")

    def step_skipped(self, expected: bool) -> None:
        self.anchored.skip()
        self.heard.append(("skipped", expected))


def vector(seed: int) -> Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(seed))


def stepped(grad: Tensor, scale: float, doubles: bool = False) -> tuple[Engine, Stage]:
    parameter = Parameter(torch.zeros(50))
    layout = Scaled([("w", parameter)])
    layout.scale = scale
    engine = Engine(parameter, layout, doubles)
    stage = Stage(engine, vector(9))
    EngineSteps(engine, layout, ONE, stage).install()
    parameter.grad = grad * scale
    engine.step()
    return engine, stage


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("size", [0.01, 10.0])
def test_loss_scale_cancels_even_if_it_changes_at_the_step(
    size: float, scale: float, doubles: bool
) -> None:
    """The blend is half anchor, half domain gradient, then clipped, whatever the scale did."""
    grad, g_hat = size * vector(1), vector(9)
    engine, stage = stepped(grad, scale, doubles)
    blend = 0.5 * g_hat + 0.5 * grad
    blend *= min(1.0, CLIP / (float(blend.norm()) + 1e-6))
    torch.testing.assert_close(engine.parameter.detach(), -blend, rtol=1e-4, atol=1e-7)
    assert stage.heard[0] == ("norm", pytest.approx(float(grad.norm()), rel=1e-5))
    assert stage.heard[1] == "stepped"


@pytest.mark.parametrize(("scale", "expected"), [(1.0, False), (2.0**16, True)])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_is_skipped_by_the_engine_and_told(
    scale: float, expected: bool, bad: float
) -> None:
    grad = vector(1)
    grad[3] = bad
    engine, stage = stepped(grad, scale)
    assert stage.heard == [("skipped", expected)]
    assert not engine.parameter.detach().any()
    assert stage.anchored.last is None
    engine.parameter.grad = vector(2) * scale
    engine.step()
    assert stage.heard[1:] == [("norm", pytest.approx(float(vector(2).norm()))), "stepped"]
    assert engine.parameter.detach().all()


def test_without_a_wrapper_the_gradient_is_thrown_away_here() -> None:
    """ZeRO-0 in fp32 steps the optimizer itself, which would step on NaN."""
    parameter = Parameter(torch.zeros(50))
    layout = Scaled([("w", parameter)])
    engine = Engine(parameter, layout)
    engine.optimizer = engine.inner
    stage = Stage(engine, vector(9))
    seen: list[Any] = []
    engine.step = lambda: seen.append(parameter.grad)  # type: ignore[method-assign]
    engine.applied = True
    EngineSteps(engine, layout, ONE, stage).install()
    parameter.grad = torch.full((50,), float("nan"))
    engine.step()
    assert seen == [None]
    assert stage.heard == [("skipped", False)]


def test_micro_batches_are_the_engines_alone_and_uninstall_gives_it_back() -> None:
    parameter = Parameter(torch.zeros(50))
    layout = Scaled([("w", parameter)])
    engine = Engine(parameter, layout)
    stage = Stage(engine, vector(9))
    steps = EngineSteps(engine, layout, ONE, stage)
    steps.install()
    engine.at_boundary = False
    stage.anchored.rule = None  # type: ignore[assignment]  # nothing of ours may be asked
    parameter.grad = torch.full((50,), float("inf"))
    engine.step()
    assert (engine.calls, stage.heard) == (1, [])
    steps.uninstall()
    assert engine.step.__func__ is Engine.step  # type: ignore[attr-defined]


def test_squared_norm_is_one_of_flat_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daa_ext.layout.CHUNK_ELEMENTS", 7)
    found = squared_norm([vector(1), vector(2).bfloat16()], torch.device("cpu"))
    wanted = vector(1).double().square().sum() + vector(2).bfloat16().double().square().sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
