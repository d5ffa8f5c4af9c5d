"""Changes to DAA that daa_ext does not have, each tried once beside the runs of a comparison.

    python examples/evidence/leads.py saves/compare/evidence saves/leads

Every lead is the comparison's run of DAA without correction on finance, through LLaMA-Factory, with
other keys and one thing changed in the optimizer's step. A lead that has its scores is not run
again. docs/evidence.md says what came out.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from llamafactory.train.tuner import run_exp
from torch import Tensor

from daa_ext import anchor_trainer, anneal_trainer
from daa_ext.anchored import AnchoredOptimizer
from daa_ext.blend import clip_factor
from daa_ext.compare.runs import slug
from daa_ext.correction import correction, similarity
from daa_ext.estimator import MomentEstimator
from daa_ext.parts import DensePart
from daa_ext.resident import ResidentAnchor

PATTERN = "runs/finance/daa_no_dc/lr-0.0001_seed-42"
SETS = ("finance", "finance_loss", "instructions", "endings", "manuals")
SECOND_SAMPLES = 200  # for the second moment of the general gradient
AGAIN_SAMPLES = 160  # for a second anchor
ANCHOR_STEPS = 100  # of the comparison's anchor
RANK = 16  # of a truncated anchor
RADIUS = 1.0  # of the trust region

second: dict[str, dict[str, Tensor]] = {}  # the second moment, "raw" and "clipped", by parameter


class Lead(AnchoredOptimizer):
    """Knows the names of what the optimizer steps, and where the weights came from."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.named = {b.parameter: b.fragments[0].name for b in self.layout.buffers()}
        self.start = {name: p.detach().clone() for p, name in self.named.items()}


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
        factor = clip_factor(
            (share**2 * self.anchor.norm**2 + 2 * share * (1 - share) * measured.inner
             + (1 - share) ** 2 * measured.domain_norm**2) ** 0.5,
            self.rule.max_norm,
        )  # fmt: skip
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
            parts[fragment.name] = values * (1 - variance / values.square()).clamp(
                min=0.0
            ).nan_to_num(0.0)
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

    @staticmethod
    def install() -> None:
        mixin = anneal_trainer.AnnealTrainerMixin

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == self.state.max_steps // 2:
                anchor_again(self)
            return super(mixin, self).training_step(*args, **kwargs)

        mixin.training_step = training_step


class SecondMoment(MomentEstimator):
    """Gathers E[g^2] of the general gradient beside the first moment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.squares: dict[str, dict[Tensor, Tensor]] = {"raw": {}, "clipped": {}}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        grads = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        norm = float(sum(g.square().sum(dtype=torch.float64) for _, g in grads)) ** 0.5
        for kind, factor in (("raw", 1.0), ("clipped", clip_factor(norm, 1.0))):
            for p, g in grads:
                total = self.squares[kind].setdefault(p, torch.zeros_like(p))
                total.addcmul_(g, g, value=factor**2)
        super().step()


def gather_second_moment(keys: dict[str, Any], file: Path) -> None:
    """Run the anchor stage over SECOND_SAMPLES general samples; write E[g^2] to `file`."""
    anchor_trainer.MomentEstimator = SecondMoment
    save = anchor_trainer.AnchorTrainerMixin.save_model

    def save_model(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
        save(self, output_dir, _internal_call)
        if not _internal_call:
            estimator = self.inner_optimizer()
            steps = estimator.good_steps
            found: dict[str, Any] = {
                kind: {name: squares[p] / steps for name, p in self.trainable()}
                for kind, squares in estimator.squares.items()
            }
            torch.save({**found, "tokens": self._total_seen()["tokens"] / steps}, file)

    anchor_trainer.AnchorTrainerMixin.save_model = save_model
    run_exp(keys)


def train(lead: type[Lead], keys: dict[str, Any], moment: Path) -> None:
    """Run the anneal stage with the lead's optimizer; its weights go to output_dir."""
    second.update(torch.load(moment))
    anneal_trainer.AnchoredOptimizer = lead
    if lead is Again:
        Again.install()
    run_exp(keys)


PLAIN = {"daa_gga": False, "daa_dc": False}
PAPER = {"daa_dc": True}
LONG = {  # 100 steps, as in docs/evidence.md's comparison with an earlier prototype
    "dataset_dir": "saves/evidence_data",
    "dataset": "finance_train",
    "max_samples": 800,
    "daa_k0": 50,
    "eval_dataset": None,
    "eval_strategy": "no",
    "eval_on_start": False,
    "eval_on_each_dataset": False,
}
LEADS: dict[str, tuple[type[Lead], dict[str, Any]]] = {
    "anchoring 1e-4, H (theta - theta0)": (Elastic, {"learning_rate": 1e-4}),
    "anchoring 1e-4, new anchor at T/2": (Again, {"learning_rate": 1e-4}),
    "anchoring 1e-4, anchor without noise": (Shrunk, {"learning_rate": 1e-4}),
    "anchoring 1e-4, anchor of rank 16": (Truncated, {"learning_rate": 1e-4}),
    "plain 5e-4, lambda v_G": (Curved, {"learning_rate": 5e-4, **PLAIN}),
    "anchoring 1e-4, lambda v_G": (Curved, {"learning_rate": 1e-4}),
    "DAA 1e-5, similarity per tensor": (PerTensor, {"learning_rate": 1e-5, **PAPER}),
    "DAA 5e-5, trust region": (TrustRegion, {"learning_rate": 5e-5, **PAPER}),
    "DAA 1e-5, 100 steps": (Lead, {"learning_rate": 1e-5, **PAPER, **LONG}),
}


def table(out: Path) -> str:
    """Markdown: every lead that has scores."""
    rows = ["| lead | accuracy | " + " | ".join(SETS[1:]) + " |", "| --- " * (len(SETS) + 1) + "|"]
    for name in LEADS:
        path = out / slug(name) / "score.json"
        if path.exists():
            sets = json.loads(path.read_text())["sets"]
            values = [sets["finance"]["accuracy"], *(sets[each]["loss"] for each in SETS[1:])]
            rows.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(rows)


def main(comparison: Path, out: Path) -> None:
    pattern = yaml.safe_load((comparison / PATTERN / "train.yaml").read_text())
    job = json.loads((comparison / PATTERN / "score_job.json").read_text())
    job["sets"] = [each for each in job["sets"] if each["name"] in SETS]
    anchor = yaml.safe_load((comparison / "runs/anchors/general_800/train.yaml").read_text())
    moment = out / "second_moment.pt"
    if not moment.exists():
        keys = {**anchor, "max_samples": SECOND_SAMPLES, "daa_rank": 1}
        keys |= {"daa_anchor": str(out / "unused"), "output_dir": str(out / "second_moment")}
        child("moment", keys, moment)
    for name, (_, changed) in LEADS.items():
        folder = out / slug(name)
        if not (folder / "score.json").exists():
            print(name, flush=True)
            child(name, {**pattern, **changed, "output_dir": str(folder)}, moment)
            job |= {"model": str(folder), "out": str(folder / "score.json")}
            (folder / "job.json").write_text(json.dumps(job))
            scorer = [sys.executable, "-m", "daa_ext.compare.score", str(folder / "job.json")]
            subprocess.run(scorer, check=True)
            (folder / "model.safetensors").unlink()
    print(table(out))


def child(name: str, keys: dict[str, Any], moment: Path) -> None:
    """Each in a process of its own: what is patched ends with it."""
    moment.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["--child", name, json.dumps(keys), str(moment)]
    subprocess.run([sys.executable, __file__, *arguments], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    elif len(sys.argv) == 5 and sys.argv[1] == "--child":
        keys, file = json.loads(sys.argv[3]), Path(sys.argv[4])
        if sys.argv[2] == "moment":
            gather_second_moment(keys, file)
        else:
            train(LEADS[sys.argv[2]][0], keys, file)
    else:
        sys.exit(__doc__)
