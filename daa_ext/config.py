"""The daa_* settings: one dataclass, checked once, every error with its mend.

A field that the YAML leaves out is None until `resolve` puts the default in: so a key that was
set where it has no effect can be told from one that was not set, and refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from daa_ext import keys
from daa_ext.keys import is_count, is_name, is_number, is_positive, is_switch

Stage = Literal["anchor", "anneal", "auto"]
BUILDS, ANNEALS = ("anchor", "auto"), ("anneal", "auto")  # stages that build, that use an anchor
ALL: tuple[str, ...] = get_args(Stage)


def _is_folder(value: Any) -> bool:
    """A path whose last part is a name: the folder is made beside its place, then renamed."""
    return is_name(value) and Path(value).name not in ("", "..")


@dataclass(frozen=True)
class DaaRule(keys.Rule):
    """stages: where the key has an effect."""

    stages: tuple[str, ...]


RULES = {
    "daa_stage": DaaRule(
        "auto",
        "anchor: build the anchor from `dataset`; anneal: fine-tune with it; "
        "auto: build it from `daa_anchor_dataset` where the folder is missing, then fine-tune.",
        "anchor, anneal or auto",
        lambda v: v in ALL,
        ALL,
    ),
    "daa_anchor": DaaRule(
        None,
        "Folder of the anchor: written by `anchor`, read by `anneal`, both by `auto`.",
        "the path of a folder",
        _is_folder,
        ALL,
    ),
    "daa_anchor_dataset": DaaRule(
        None,
        "General data of the anchor, LLaMA-Factory data set names separated by commas.",
        "data set names from dataset_info.json",
        is_name,
        ("auto",),
    ),
    "daa_anchor_max_samples": DaaRule(
        None,
        "Read at most this many samples of each general data set (default: `max_samples`).",
        "a whole number >= 1",
        is_count,
        ("auto",),
    ),
    "daa_anchor_beta": DaaRule(
        0.999,
        "Decay beta of the anchor's first moment; bias-corrected.",
        "a number in [0, 1)",
        lambda v: is_number(v) and 0.0 <= v < 1.0,
        BUILDS,
    ),
    "daa_rank": DaaRule(
        512,
        "Ceiling of the rank of the anchor's factors.",
        "a whole number >= 1",
        is_count,
        BUILDS,
    ),
    "daa_k0": DaaRule(
        200.0,
        "Strength of the anchor in steps: gamma_t = min(1, daa_k0 / T (1 - t/T)).",
        "a number >= 0 (0 switches the anchor off)",
        lambda v: is_number(v) and v >= 0.0,
        ANNEALS,
    ),
    "daa_c0": DaaRule(
        0.01,
        "Floor of the correction: c_t = s_t + daa_c0. The step grows at most by 1/sqrt(daa_c0).",
        "a number > 0",
        is_positive,
        ANNEALS,
    ),
    "daa_boost_max": DaaRule(
        None,
        "Cap on what the correction multiplies a step by: c_t is not below 1 / daa_boost_max^2.",
        "a number >= 1 (1: no step is longer than the scheduler's)",
        lambda v: is_number(v) and v >= 1.0,
        ANNEALS,
    ),
    "daa_radius": DaaRule(
        None,
        "Keep the weights near the base model's: ||theta - theta_0|| <= daa_radius ||theta_0||.",
        "a number > 0",
        is_positive,
        ANNEALS,
    ),
    "daa_gga": DaaRule(
        True,
        "Anchor every gradient (general-gradient anchoring); false for the ablation.",
        "true or false",
        is_switch,
        ANNEALS,
    ),
    "daa_dc": DaaRule(
        True,
        "Correct every step by the similarity (dynamic correction); false for the ablation.",
        "true or false",
        is_switch,
        ANNEALS,
    ),
    "daa_force_resume": DaaRule(
        False,
        "Resume from a checkpoint although the anchor or a daa_* value is another one now.",
        "true or false",
        is_switch,
        ALL,
    ),
    "daa_retention_dataset": DaaRule(
        None,
        "Held-out general data: its loss is measured before, during and after the run.",
        "data set names from dataset_info.json",
        is_name,
        ANNEALS,
    ),
}


def _unset(name: str) -> Any:
    """A field that is None while the YAML does not set it (the host's parser shows the help)."""
    return field(default=None, metadata={"help": RULES[name].text})


@dataclass
class DaaSettings:
    """What a YAML says about DAA. Raises ValueError (from `resolve`) for what cannot be meant."""

    daa_stage: Stage = _unset("daa_stage")
    daa_anchor: str = _unset("daa_anchor")
    daa_anchor_dataset: str = _unset("daa_anchor_dataset")
    daa_anchor_max_samples: int = _unset("daa_anchor_max_samples")
    daa_anchor_beta: float = _unset("daa_anchor_beta")
    daa_rank: int = _unset("daa_rank")
    daa_k0: float = _unset("daa_k0")
    daa_c0: float = _unset("daa_c0")
    daa_boost_max: float = _unset("daa_boost_max")
    daa_radius: float = _unset("daa_radius")
    daa_gga: bool = _unset("daa_gga")
    daa_dc: bool = _unset("daa_dc")
    daa_force_resume: bool = _unset("daa_force_resume")
    daa_retention_dataset: str = _unset("daa_retention_dataset")

    def given(self) -> list[str]:
        """Names of the settings that the YAML sets."""
        return [name for name in RULES if getattr(self, name) is not None]

    def refuse(self, finetuning_type: str) -> None:
        """Raise ValueError if a daa_* key is set although another method was chosen."""
        for name in self.given():
            raise ValueError(
                f"{name}={getattr(self, name)}: daa_* keys need finetuning_type: daa, but "
                f"finetuning_type={finetuning_type}. Set finetuning_type: daa or remove the key."
            )

    def resolve(self) -> "DaaSettings":
        """Check every value and combination, then fill in the defaults; returns self."""
        given = self.given()
        for name in given:
            RULES[name].check(name, getattr(self, name))
        self._check_together(given)
        for name, rule in RULES.items():
            if name not in given:
                setattr(self, name, rule.default)
        return self

    def _check_together(self, given: list[str]) -> None:
        if self.daa_anchor is None:
            raise ValueError(
                "daa_anchor is not set: name the anchor's folder, for example "
                "daa_anchor: anchors/my-model (stage anchor writes it, anneal reads it)."
            )
        stage = self.daa_stage or RULES["daa_stage"].default
        for name in given:
            if stage not in RULES[name].stages:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with daa_stage={stage}: it "
                    f"belongs to daa_stage {' or '.join(RULES[name].stages)}. Remove the key or "
                    "change daa_stage."
                )
        needs = (("daa_k0", "daa_gga"), ("daa_c0", "daa_dc"), ("daa_boost_max", "daa_dc"))
        for name, switch in needs:
            if name in given and getattr(self, switch) is False:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with {switch}=false: "
                    f"remove one of the two."
                )


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise ValueError for the first key that starts like a DAA setting and is none."""
    keys.refuse_unknown(names, lambda name: name.startswith("daa"), RULES, "DAA setting")
