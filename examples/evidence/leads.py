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
from lead_steps import (
    Again,
    Curved,
    Elastic,
    Lead,
    PerTensor,
    Shrunk,
    Truncated,
    TrustRegion,
    second,
)
from llamafactory.train.tuner import run_exp
from torch import Tensor

from daa_ext import anchor_trainer
from daa_ext.blend import clip_factor
from daa_ext.compare.runs import slug
from daa_ext.estimator import MomentEstimator

PATTERN = "runs/finance/daa_no_dc/lr-0.0001_seed-42"
SETS = ("finance", "finance_loss", "instructions", "endings", "manuals")
SECOND_SAMPLES = 200  # for the second moment of the general gradient


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
    lead.install()
    run_exp(keys)


PLAIN = {"daa_gga": False, "daa_dc": False, "daa_k0": None}
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
    "plain 2.16e-4, trust region": (TrustRegion, {"learning_rate": 2.16e-4, **PLAIN}),
    "DAA 1e-5, 100 steps": (Lead, {"learning_rate": 1e-5, **PAPER, **LONG}),
}


def table(out: Path) -> str:
    """Markdown: every lead that has scores."""
    rows = ["| lead | accuracy | " + " | ".join(SETS[1:]) + " |", "| --- " * (len(SETS) + 1) + "|"]
    for name in LEADS:
        path = out / slug(name) / "score.json"
        if path.exists():
            sets = json.loads(path.read_text())["sets"]
            values = [sets["finance"]["metrics"]["accuracy"]]
            values += [sets[each]["metrics"]["loss"] for each in SETS[1:]]
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
