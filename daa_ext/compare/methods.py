"""The methods that `daa compare` knows, as keys of LLaMA-Factory YAMLs.

A kind is a way to make a model from the base; a preset is a row that many will want, by name.
Each has its YAML in examples/yaml.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """keys: of the training YAML. derived: made from another method's runs, `of`.

    evaluates: whether the host can evaluate while it trains this way.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    anchored: bool = False
    derived: bool = False
    evaluates: bool = True


FULL = {"finetuning_type": "full"}
LORA = {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all"}
PROJECTED = {**FULL, "optim": "adamw_torch"}  # the fused default is refused with GaLore and APOLLO
DAA = {"finetuning_type": "daa", "daa_stage": "anneal"}

KINDS = {
    "direct": Kind(FULL),
    "lora": Kind(LORA),
    "dora": Kind({**LORA, "use_dora": True}),
    "galore": Kind({**PROJECTED, "use_galore": True, "galore_target": "all"}),
    "apollo": Kind({**PROJECTED, "use_apollo": True, "apollo_target": "all"}),
    "freeze": Kind({"finetuning_type": "freeze", "freeze_trainable_layers": 2}),
    "dft": Kind({**FULL, "use_dft_loss": True}),
    "asft": Kind({**FULL, "use_asft_loss": True}, evaluates=False),  # 0.9.5 fails on it
    "eaft": Kind({**FULL, "use_eaft_loss": True}),
    "talr": Kind({**FULL, "use_talr_loss": True}),
    "flow": Kind({**FULL, "use_flow_loss": True}),
    "l2_init": Kind({**FULL, "use_l2_init": True}),
    "osft": Kind({**FULL, "use_osft": True}),
    "daa": Kind(DAA, anchored=True),
    "wise": Kind(derived=True),
    "control": Kind(FULL, derived=True),
}

PRESETS: dict[str, dict[str, Any]] = {
    **{name: {"kind": name} for name in KINDS},
    "small_lr": {"kind": "direct"},
    "replay_1": {"kind": "direct", "general_share": 0.01},
    "replay_5": {"kind": "direct", "general_share": 0.05},
    "replay_10": {"kind": "direct", "general_share": 0.10},
    "mix_1_1": {"kind": "direct", "general_share": 1.0},
    "mix_1_3": {"kind": "direct", "general_share": 3.0},
    "mix_1_5": {"kind": "direct", "general_share": 5.0},
    "daa_talr": {"kind": "daa", "keys": {"use_talr_loss": True}},
    "daa_no_dc": {"kind": "daa", "keys": {"daa_dc": False}},
    "daa_no_gga": {"kind": "daa", "keys": {"daa_gga": False}},
    "daa_boost_cap": {"kind": "daa", "keys": {"daa_boost_max": 2.0}},
    "daa_radius": {"kind": "daa", "keys": {"daa_radius": 5e-4}},
    "daa_replay_1": {"kind": "daa", "general_share": 0.01},
    "wise": {"kind": "wise", "of": "direct", "alpha": [0.1, 0.3, 0.5, 0.7, 0.9]},
    "control": {"kind": "control", "of": "daa"},
}
