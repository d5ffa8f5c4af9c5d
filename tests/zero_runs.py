"""DeepSpeed runs for tests: configurations, YAMLs, and the one process that they must equal."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host import Host, distance, weights
from tiny import make_data, make_model

BOUND = 1e-5  # see test_sharded
SAMPLES = 48  # of an optimizer step: 1 to 4 ranks with 1 or 4 micro-batches each
Config = dict[str, Any]
OFFLOAD: Config = {"offload_optimizer": {"device": "cpu"}}


def tiny_host(folder: Path, num_hidden_layers: int = 4) -> Host:
    """A deeper tiny model, tied, so that matrices are many and partitions cut them anywhere."""
    model = make_model(
        folder / "model", num_hidden_layers=num_hidden_layers, tie_word_embeddings=True
    )
    host = Host(folder, model, make_data(folder / "data", domain_rows=3 * SAMPLES))
    host.anchor(daa_rank=8)
    return host


def zero(stage: int, **zero_optimization: Any) -> Config:
    """A DeepSpeed configuration as the project ships them."""
    zero_optimization |= {"stage": stage}
    if stage == 3:
        zero_optimization["stage3_gather_16bit_weights_on_model_save"] = True
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(auto, "auto") | {
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_optimization,
    }


def sharded(host: Host, name: str, ranks: int, config: Config | None, **changes: Any) -> Config:
    """The YAML of a DAA run on several ranks, SAMPLES per optimizer step; without config: DDP."""
    path = host.folder / f"{name}.json"
    path.write_text(json.dumps(config))
    accumulation = changes.get("gradient_accumulation_steps", 1)
    settings: Config = {
        "per_device_train_batch_size": SAMPLES // ranks // accumulation,
        "adam_epsilon": 1e-5,
        "deepspeed": str(path) if config else None,
        "use_cpu": None if config else True,
        "ddp_backend": "gloo" if ranks > 1 else None,
        **changes,
    }
    stage = settings.pop("daa_stage", "anneal")
    if settings.get("finetuning_type") == "full":
        return host.arguments(name, **settings)
    return host.daa(name, stage, **settings)


def alone(host: Host, name: str, **changes: Any) -> Path:
    """The same in one process without DeepSpeed."""
    return host.run(sharded(host, name, 1, None, **changes))


def error(host: Host, out: Path, reference: Path) -> float:
    """||w - w_ref|| / ||w_ref - w_0||"""
    return distance(weights(out), weights(reference), weights(host.model))


def matrix() -> dict[str, tuple[Config, Config]]:
    """{name: (DeepSpeed configuration, changes to the YAML)} of all that DeepSpeed offers.

    ZeRO stage x offload x round robin x accumulation {1, 4} x clipping {on, off}.
    """
    configs = {"z0": zero(0), "z3": zero(3), "z3-offload": zero(3, **OFFLOAD)}
    for stage, offload, turns in itertools.product((1, 2), (False, True), (False, True)):
        name = f"z{stage}{'-offload' * offload}{'-robin' * turns}"
        configs[name] = zero(stage, round_robin_gradients=turns, **(OFFLOAD if offload else {}))
    accumulation = {"x1": {}, "x4": {"gradient_accumulation_steps": 4}}
    return {
        f"{name}-{x}-{clip}": (config, {**accumulated, **clipping})
        for name, config in configs.items()
        for x, accumulated in accumulation.items()
        for clip, clipping in CLIPPING.items()
    }


CLIPPING: dict[str, Config] = {
    "clipped": {"max_grad_norm": 0.3},
    "unclipped": {"max_grad_norm": 0.0},
}


STAGES = {
    "ddp": None, "z0": zero(0), "z1": zero(1), "z2": zero(2, round_robin_gradients=True),
    "z3": zero(3), "z2-offload": zero(2, **OFFLOAD), "z3-offload": zero(3, **OFFLOAD),
}  # fmt: skip
RESUMED = ("z2", "z3")  # of these stages
SAVING: Config = {"save_strategy": "steps", "save_steps": 1}


@dataclass
class Jobs:
    """Runs that share one start of `count` ranks."""

    host: Host
    count: int
    arguments: dict[str, Config] = field(default_factory=dict)
    errors: dict[str, list[str | None]] = field(default_factory=dict)  # job -> by rank

    def add(self, name: str, config: Config | None, **changes: Any) -> None:
        self.arguments[name] = sharded(self.host, name, self.count, config, **changes)

    def add_stages(self, resume_at: int, **changes: Any) -> None:
        """A run of each of STAGES; of RESUMED ones a second, NAME-again, from that step on.

        DDP comes first: accelerate does not forget DeepSpeed.
        """
        for name, config in STAGES.items():
            own: Config = {**changes, **SAVING}
            if name in ("z1", "z3"):
                own["gradient_accumulation_steps"] = 4
            self.add(name, config, **own)
            if name in RESUMED:
                checkpoint = self.host.folder / name / f"checkpoint-{resume_at}"
                self.add(f"{name}-again", config, resume_from_checkpoint=str(checkpoint), **own)

    def run(self, **environment: str) -> "Jobs":
        """Run them all; a job may fail, see `out`."""
        jobs = list(self.arguments.values())
        found = self.host.ranks(jobs, self.count, check=False, **environment)
        for index, name in enumerate(self.arguments):
            self.errors[name] = [errors.get(index) for errors in found]
        return self

    def out(self, name: str) -> Path:
        """The output folder of a job that went well on all ranks."""
        assert not any(self.errors[name]), self.errors[name]
        return Path(self.arguments[name]["output_dir"])
