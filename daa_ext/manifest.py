"""anchor.json: where an anchor comes from, what is in it, and whether it fits a model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from daa_ext.lowrank import AnchorTerm, LowRank

FORMAT_VERSION = 1
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Manifest:
    """What anchor.json says: where the anchor comes from and what is in it."""

    base_model: str
    base_fingerprint: str
    datasets: list[str]
    data_fingerprint: str
    template: str | None
    cutoff_len: int
    host_stage: str  # sft or pt
    steps: int  # s: optimizer steps in the moment
    skipped_steps: int  # steps left out for a NaN or infinite gradient
    samples: int
    tokens: int  # tokens with a label
    beta: float
    rank: int
    seed: int
    norm: float  # ||g_hat|| of the stored (compressed) anchor
    seconds: dict[str, float]  # estimate, factorize
    versions: dict[str, str]
    tensors: dict[str, dict[str, Any]]  # per parameter: shape, kind, rank, energy, norm
    format_version: int = FORMAT_VERSION
    files: dict[str, str] = field(default_factory=dict)  # name -> SHA-256

    @property
    def digest(self) -> str:
        """One SHA-256 for the anchor's content: what a checkpoint remembers it by."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def verify_model(folder: Path, manifest: Manifest, shapes: Shapes, fingerprint: str) -> None:
    """Raise ValueError unless the anchor was made for this very model.

    Args:
        shapes: of the parameters that train.
        fingerprint: `fingerprint.model_fingerprint` of the base weights.
    """
    made_for = f"daa_anchor={folder} was made for base model {manifest.base_model}"
    stored = {name: tuple(entry["shape"]) for name, entry in manifest.tensors.items()}
    for names, what in (
        (shapes.keys() - stored.keys(), "train but are not in the anchor"),
        (stored.keys() - shapes.keys(), "are in the anchor but do not train"),
    ):
        if names:
            raise ValueError(
                f"{made_for}: {len(names)} parameters {what}, such as {sorted(names)[0]}. "
                "Use the anchor of this model, or build one with the same trainable parameters."
            )
    for name, shape in shapes.items():
        if stored[name] != tuple(shape):
            raise ValueError(
                f"{made_for}: {name} has shape {stored[name]} there and {tuple(shape)} here. "
                "Use the anchor of this model (resize_vocab changes shapes, too)."
            )
    if manifest.base_fingerprint != fingerprint:
        raise ValueError(
            f"{made_for} with other weights: fingerprint {manifest.base_fingerprint[:12]} there, "
            f"{fingerprint[:12]} here. Start from the weights that the anchor was made for, or "
            "build an anchor for these."
        )


def describe(term: AnchorTerm, shape: tuple[int, ...], energy: float) -> dict[str, Any]:
    """One parameter's entry of `Manifest.tensors`."""
    kind = "factors" if isinstance(term, LowRank) else "dense"
    entry = {"shape": list(shape), "kind": kind, "rank": term.rank}
    return {**entry, "energy": energy, "norm": term.norm()}


def anchor_bytes(manifest: Manifest) -> int:
    """Bytes of all tensors of the anchor (fp32), without the files' headers."""
    total = 0
    for entry in manifest.tensors.values():
        if entry["kind"] == "factors":
            total += entry["rank"] * (sum(entry["shape"]) + 1)
        else:
            total += prod(entry["shape"])
    return 4 * total
