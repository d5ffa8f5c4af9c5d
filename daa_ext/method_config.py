"""The keys of the methods beside DAA: each method has a switch, and keys that need the switch.

As in config.py, a field that the YAML leaves out is None until it is resolved.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from daa_ext import keys
from daa_ext.keys import is_count, is_name, is_number, is_positive, is_switch

PREFIXES = ("talr", "flow", "l2", "osft")  # with or without use_: a key like this is ours


@dataclass(frozen=True)
class Method:
    """Where a method can be switched on, and beside which keys it cannot."""

    finetuning_types: tuple[str, ...]
    stages: tuple[str, ...]  # of the host
    never: Mapping[str, str]  # a key that cannot be set to true beside it -> the mend


@dataclass(frozen=True)
class MethodRule(keys.Rule):
    """switch: the key that must be on for this one to act (a switch needs itself)."""

    switch: str


_OTHER_TRAINERS = dict.fromkeys(
    ("use_hyper_parallel", "use_mca"), "that backend has its own trainer, which is not reached"
)
_OTHER_LOSSES = {
    **dict.fromkeys(
        ("use_talr_loss", "use_flow_loss", "use_dft_loss", "use_asft_loss", "use_eaft_loss"),
        "each replaces the loss; keep one of them",
    ),
    **_OTHER_TRAINERS,
}
_OTHER_UPDATES = {
    "pure_bf16": "small steps vanish in bf16 weights; use bf16: true",
    **dict.fromkeys(
        ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"),
        "it needs the whole gradient in an ordinary optimizer; use optim: adamw_torch",
    ),
    **_OTHER_TRAINERS,
}
METHODS = {
    "use_talr_loss": Method(("full", "lora", "freeze", "daa"), ("sft",), _OTHER_LOSSES),
    "use_flow_loss": Method(("full", "lora", "freeze", "daa"), ("sft",), _OTHER_LOSSES),
    "use_l2_init": Method(("full",), ("sft", "pt"), {"use_osft": "keep one", **_OTHER_UPDATES}),
    "use_osft": Method(("full",), ("sft", "pt"), {"use_l2_init": "keep one", **_OTHER_UPDATES}),
}


def _switch(name: str, text: str) -> dict[str, MethodRule]:
    return {name: MethodRule(False, text, "true or false", is_switch, name)}


def _is_share_or_count(value: Any) -> bool:
    return is_count(value) or (isinstance(value, float) and 0.0 < value < 1.0)


METHOD_RULES = {
    **_switch(
        "use_talr_loss",
        "TALR: every token's loss is weighted by max(p^(1/tau), talr_w_min), p its probability.",
    ),
    "talr_tau": MethodRule(
        None,
        "tau of TALR. Not set: the median over the batch of the sequences' mean token losses.",
        "a number > 0",
        is_positive,
        "use_talr_loss",
    ),
    "talr_w_min": MethodRule(
        0.01,
        "The smallest weight of a token in TALR; 1 is the plain loss.",
        "a number in [0, 1]",
        lambda v: is_number(v) and 0.0 <= v <= 1.0,
        "use_talr_loss",
    ),
    **_switch(
        "use_flow_loss",
        "FLOW: every sample's loss is weighted by exp(-f / tau), f its mean token loss under the "
        "base model.",
    ),
    "flow_tau": MethodRule(
        None,
        "tau of FLOW. Not set: the median of f over the training set.",
        "a number > 0",
        is_positive,
        "use_flow_loss",
    ),
    "flow_cache": MethodRule(
        None,
        "Folder in which f of every sample is kept (default: `output_dir`).",
        "the path of a folder",
        is_name,
        "use_flow_loss",
    ),
    **_switch("use_l2_init", "Pull all weights back to where they started: an L2 penalty."),
    "l2_init_lambda": MethodRule(
        1e-3,
        "Strength: l2_init_lambda times the mean of (theta - theta_0)^2 is added to the loss.",
        "a number > 0",
        is_positive,
        "use_l2_init",
    ),
    **_switch(
        "use_osft",
        "OSFT: the leading singular directions of every linear layer stay as they are.",
    ),
    "osft_preserved": MethodRule(
        0.5,
        "The leading singular directions of each matrix that are kept, a share or a count.",
        "a number between 0 and 1 (a share), or a whole number >= 1 (a count)",
        _is_share_or_count,
        "use_osft",
    ),
}


def _unset(name: str) -> Any:
    return field(default=None, metadata={"help": METHOD_RULES[name].text})


@dataclass
class MethodSettings:
    """What a YAML says about these methods. Raises ValueError for what cannot be meant."""

    use_talr_loss: bool = _unset("use_talr_loss")
    talr_tau: float = _unset("talr_tau")
    talr_w_min: float = _unset("talr_w_min")
    use_flow_loss: bool = _unset("use_flow_loss")
    flow_tau: float = _unset("flow_tau")
    flow_cache: str = _unset("flow_cache")
    use_l2_init: bool = _unset("use_l2_init")
    l2_init_lambda: float = _unset("l2_init_lambda")
    use_osft: bool = _unset("use_osft")
    osft_preserved: float = _unset("osft_preserved")

    def methods(self) -> list[str]:
        """The switches that are on."""
        return [name for name in METHODS if getattr(self, name)]

    def resolve_methods(self, chosen: Mapping[str, Any]) -> None:
        """Check every value and combination; switches become true or false, and the keys of
        those that are on get their defaults.

        Args:
            chosen: the run's other settings; finetuning_type as the YAML has it, stage.
        """
        for name, rule in METHOD_RULES.items():
            value = getattr(self, name)
            if value is None:
                continue
            rule.check(name, value)
            if name != rule.switch and not getattr(self, rule.switch):
                raise ValueError(
                    f"{name}={value} has no effect without {rule.switch}: set "
                    f"{rule.switch}: true or remove the key."
                )
        for switch in self.methods():
            _refuse(switch, METHODS[switch], {**chosen, **vars(self)})
        for name, rule in METHOD_RULES.items():
            needed = name == rule.switch or getattr(self, rule.switch)
            if needed and getattr(self, name) is None:
                setattr(self, name, rule.default)


def _refuse(switch: str, method: Method, chosen: Mapping[str, Any]) -> None:
    """Raise ValueError if the method cannot be switched on beside the other settings."""
    served = {"finetuning_type": method.finetuning_types, "stage": method.stages}
    for key, values in served.items():
        if chosen[key] not in values:
            raise ValueError(
                f"{switch}=true cannot go with {key}={chosen[key]}: it serves {key} "
                f"{' or '.join(values)}."
            )
    for key, mend in method.never.items():
        if key != switch and chosen.get(key):
            raise ValueError(f"{switch}=true cannot go with {key}=true: {mend}.")
    if chosen["finetuning_type"] == "daa" and chosen.get("daa_stage") == "anchor":
        raise ValueError(
            f"{switch}=true has no effect with daa_stage=anchor: the anchor is the gradient of "
            "the plain loss. Remove the key; set it where daa_stage is anneal or auto."
        )


def refuse_unknown_methods(names: Iterable[str]) -> None:
    """Raise ValueError for the first key that starts like one of these methods' and is none."""
    keys.refuse_unknown(
        names, lambda name: name.removeprefix("use_").startswith(PREFIXES), METHOD_RULES, "setting"
    )
