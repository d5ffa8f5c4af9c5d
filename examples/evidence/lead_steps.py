"""What the leads of leads.py change in the optimizer's step, each a class; prototypes, one process.

They hang on the optimizer as DAA does (`daa_ext.anchored`), and differ from it in one thing.
"""

from typing import Any

import torch
from torch import Tensor

from daa_ext import anneal_trainer
from daa_ext.anchored import AnchoredOptimizer
from daa_ext.blend import clip_factor, combined_norm
from daa_ext.correction import correction, similarity
from daa_ext.parts import DensePart
from daa_ext.resident import ResidentAnchor

ANCHOR_STEPS = 100  # of the comparison's anchor
AGAIN_SAMPLES = 160  # for a second anchor
RANK = 16  # of a truncated anchor
RADIUS = 1.0  # of the trust region

second: dict[str, Any] = {}  # the second moment, "raw" and "clipped", by parameter; "tokens"


class Lead(AnchoredOptimizer):
    """Knows the names of what the optimizer steps, and where the weights came from."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.named = {b.parameter: b.fragments[0].name for b in self.layout.buffers()}
        self.start = {name: p.detach().clone() for p, name in self.named.items()}

    @classmethod
    def install(cls) -> None:
        """Let the anneal stage of this process make this optimizer in the place of DAA's."""
        anneal_trainer.AnchoredOptimizer = cls


class OwnAdam(Lead):
    """AdamW written out, without decay; the host's finds no gradients and does nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.named}

    def under_root(self, name: str, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.last.step + 1
        for group in optimizer.param_groups:
            assert group["weight_decay"] == 0.0
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m, v = self.moments[p]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = self.under_root(self.named[p], v / (1 - beta2**step)).sqrt_()
                p.addcdiv_(
                    m, root.add_(group["eps"]), value=-float(group["lr"]) / (1 - beta1**step)
                )
                p.grad = None


class Curved(OwnAdam):
    """sqrt(c v + lambda v_G), lambda = 1; v_G of general gradients clipped like the domain's."""

    def under_root(self, name: str, v: Tensor) -> Tensor:
        return v.mul_(self.last.correction).add_(second["clipped"][name])


class PerTensor(OwnAdam):
    """c_t of every tensor from its own similarity."""

    def sums(self, device: torch.device) -> Tensor:
        self.c = {}
        for fragment, gradient in self.layout.raw():
            part = self.anchor.parts[fragment.name]
            anchor = torch.zeros_like(gradient)
            part.blend_(anchor, 0.0, 1.0)
            norms = float(gradient.norm()), float(anchor.norm())
            self.c[fragment.name] = correction(
                similarity(float(part.inner(gradient)), *norms), self.rule.c0
            )
        return super().sums(device)

    def under_root(self, name: str, v: Tensor) -> Tensor:
        return v.mul_(self.c[name])


class Elastic(Lead):
    """The anchor follows the weights: g_G + H (theta - theta0), H a diagonal Gauss-Newton matrix.

    The per-token second moment stands for the curvature; from batches it is E[g^2] times the
    tokens of a batch.
    """

    def _change(self) -> Any:
        blend_in = super()._change()
        if blend_in is None:
            return None
        measured, share, _ = self._armed
        norm = combined_norm(
            share, 1.0 - share, domain_norm=measured.domain_norm, anchor_norm=self.anchor.norm,
            inner=measured.inner,
        )  # fmt: skip
        factor = clip_factor(norm, self.rule.max_norm)
        weights = {name: p for p, name in self.named.items()}

        def change(piece: Any, gradient: Tensor) -> None:
            blend_in(piece, gradient)
            moved = (weights[piece.name] - self.start[piece.name]).view(-1)
            gradient.addcmul_(
                second["raw"][piece.name].view(-1), moved,
                value=factor * share * second["tokens"],
            )  # fmt: skip

        return change

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.named), self.rule.max_norm)
        super()._prepare(optimizer)


class Shrunk(Lead):
    """An anchor without the coordinates that are noise: g_G (1 - sigma^2 / g_G^2)_+.

    sigma^2 is the variance of the mean over the anchor's steps, from the second moment of single
    batches. Adam makes a full step of every coordinate, however small its gradient is, and the
    anchor has the same noise in every step, so what averages out elsewhere adds up here.
    """

    def __init__(self, optimizer: Any, layout: Any, anchor: ResidentAnchor, rule: Any) -> None:
        parts = {}
        for fragment in layout.fragments_of(0):
            values = flat(anchor, fragment)
            variance = second["raw"][fragment.name].view(-1) / ANCHOR_STEPS
            kept = (1 - variance / values.square()).clamp(min=0.0).nan_to_num(0.0)
            parts[fragment.name] = values * kept
        super().__init__(optimizer, layout, dense(parts), rule)


class Truncated(Lead):
    """An anchor of a small rank, which is another way to leave noise out."""

    def __init__(self, optimizer: Any, layout: Any, anchor: ResidentAnchor, rule: Any) -> None:
        parts = {}
        for fragment in layout.fragments_of(0):
            values = flat(anchor, fragment)
            if len(fragment.shape) == 2:
                U, S, V = torch.svd_lowrank(values.view(fragment.shape), RANK, niter=2)
                values = ((U * S) @ V.T).reshape(-1)
            parts[fragment.name] = values
        super().__init__(optimizer, layout, dense(parts), rule)


def flat(anchor: ResidentAnchor, fragment: Any) -> Tensor:
    """The elements of the anchor in a fragment."""
    values = torch.zeros(fragment.numel)
    anchor.parts[fragment.name].blend_(values, 0.0, 1.0)
    return values


def dense(parts: dict[str, Tensor]) -> ResidentAnchor:
    squares = sum(values.square().sum(dtype=torch.float64) for values in parts.values())
    kept = sum(int(values.count_nonzero()) for values in parts.values())
    total = sum(values.numel() for values in parts.values())
    norm = float(squares) ** 0.5
    print(f"anchor: norm {norm:.4g}, {kept / total:.3f} of its elements are not 0", flush=True)
    return ResidentAnchor({name: DensePart(values) for name, values in parts.items()}, norm)


class TrustRegion(Lead):
    """No step leaves the ball of RADIUS around the starting weights."""

    def _after_step(self, *args: Any) -> None:
        super()._after_step(*args)
        moved = {p: p.detach() - self.start[name] for p, name in self.named.items()}
        distance = float(sum(m.square().sum(dtype=torch.float64) for m in moved.values())) ** 0.5
        if distance > RADIUS:
            for p, m in moved.items():
                p.data.sub_(m, alpha=1 - RADIUS / distance)


def anchor_again(trainer: Any) -> None:
    """Replace the anchor by the mean general gradient at the weights as they are now."""
    loaded = trainer.daa_run.load_eval("general_800", trainer.processing_class)
    rows = next(iter(loaded.values())).select(range(AGAIN_SAMPLES))
    batches = torch.utils.data.DataLoader(rows, 8, collate_fn=trainer.data_collator)
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = trainer.model(**trainer._prepare_inputs(batch)).loss
        (loss / len(batches)).backward()
    gradients = {name: p.grad.reshape(-1).clone() for name, p in trainer.trainable()}
    trainer.anchored.anchor = dense(gradients)
    trainer.model.zero_grad()


class Again(Lead):
    """A new anchor after half of the run."""

    @classmethod
    def install(cls) -> None:
        super().install()
        mixin = anneal_trainer.AnnealTrainerMixin

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == self.state.max_steps // 2:
                anchor_again(self)
            return super(mixin, self).training_step(*args, **kwargs)

        mixin.training_step = training_step
