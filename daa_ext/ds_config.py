"""The DeepSpeed configuration of a DAA stage: what it may hold, and what a stage changes in it."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

Config = dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A setting that cannot go with DAA: where it stands, when it matters, why, what to do."""

    key: str  # dotted path
    matters: Callable[[Any, Config], bool]  # (its value, the whole configuration)
    why: str


def _is_set(value: Any, config: Config) -> bool:
    return value not in (None, False, {}, "auto")


def _is_there(value: Any, config: Config) -> bool:
    return value not in (None, False)  # {} switches it on, too


def _is_nvme(value: Any, config: Config) -> bool:
    return value == "nvme"


def _is_many(value: Any, config: Config) -> bool:
    return isinstance(value, int) and value > 1


FP32_NAMES = ("fp32", "float32", "float", "torch.float32")


def _is_bf16_optimizer(value: Any, config: Config) -> bool:
    """DeepSpeed then runs its BF16_Optimizer, which keeps gradients in a third way."""
    offload = _get(config, "zero_optimization.offload_optimizer.device") not in (None, "none")
    stage = _get(config, "zero_optimization.stage")
    is_bf16 = _is_on(config, "bf16") or _is_on(config, "bfloat16")
    return value in FP32_NAMES and stage == 1 and not offload and is_bf16


def _is_other_adam(value: Any, config: Config) -> bool:
    if value is None or str(value).lower() == "adamw":
        return False
    return str(value).lower() != "adam" or not _get(config, "optimizer.params.adam_w_mode", True)


REFUSALS = (
    Refusal(
        "zero_optimization.offload_optimizer.device",
        _is_nvme,
        "gradients swapped to NVMe are not in reach at the step: offload to device: cpu",
    ),
    Refusal(
        "zero_optimization.offload_param.device",
        _is_nvme,
        "weights swapped to NVMe are not in reach: offload to device: cpu",
    ),
    Refusal(
        "zero_optimization.offload_optimizer.ratio",
        lambda value, config: isinstance(value, (int, float)) and value < 1.0,
        "partial offload steps some weights with a second optimizer, without the anchor: "
        "remove the key",
    ),
    Refusal(
        "data_types.grad_accum_dtype",
        _is_bf16_optimizer,
        "ZeRO-1 in bf16 then runs BF16_Optimizer: use stage 2, or remove the key",
    ),
    Refusal(
        "optimizer.type",
        _is_other_adam,
        "eq. 9 needs AdamW: use AdamW, or remove the optimizer block and set optim: adamw_torch",
    ),
    Refusal("zero_optimization.zenflow", _is_there, "ZenFlow steps weights on its own: remove it"),
    Refusal(
        "zero_optimization.offload_optimizer.super_offload",
        _is_set,
        "SuperOffload steps weights on its own: remove it",
    ),
    Refusal(
        "zero_optimization.mics_shard_size",
        _is_many,
        "MiCS keeps several copies of a partition: remove it",
    ),
    Refusal(
        "zero_optimization.zero_hpz_partition_size",
        _is_many,
        "hierarchical partitions are not tested with DAA: remove it",
    ),
    Refusal(
        "zero_optimization.compute_grad_norm",
        lambda value, config: value is False,
        "the blend is clipped by its norm: remove the key",
    ),
    Refusal("tensor_parallel.autotp_size", _is_many, "DAA shards over data-parallel ranks alone"),
    Refusal("sequence_parallel_size", _is_many, "DAA shards over data-parallel ranks alone"),
    Refusal(
        "bf16.bf16_master_weights_and_grads",
        _is_set,
        "a step of learning_rate=1e-7 vanishes in bf16 weights: remove the key",
    ),
    Refusal(
        "fp16.fp16_master_weights_and_grads",
        _is_set,
        "a step of learning_rate=1e-7 vanishes in fp16 weights: remove the key",
    ),
    Refusal(
        "torch_autocast.enabled",
        _is_set,
        "its gradient scaler stands before the optimizer: set bf16: true in the YAML",
    ),
    Refusal("sparse_gradients", _is_set, "the anchor is dense: remove the key"),
    Refusal(
        "managed_gradient_accumulation",
        lambda value, config: value is False,
        "the host no longer says where a step ends: remove the key",
    ),
    Refusal("compression_training", _is_set, "compressed weights are not what the anchor was for"),
    Refusal(
        "checkpoint.load_universal",
        lambda value, config: (
            _is_set(value, config) and _get(config, "zero_optimization.stage") == 0
        ),
        "a universal checkpoint needs ZeRO stage 1, 2 or 3",
    ),
)


def refuse(deepspeed: str | Config) -> None:
    """Raise ValueError, naming the key, for a configuration under which DAA would not act."""
    config = _read(deepspeed)
    for refusal in REFUSALS:
        value = _get(config, refusal.key)
        if refusal.matters(value, config):
            raise ValueError(
                f"deepspeed: {refusal.key}={value!r} cannot go with finetuning_type=daa: "
                f"{refusal.why}. (docs/zero.md)"
            )


def for_stage(training: Any, daa_stage: str) -> Any:
    """`training` with a DeepSpeed configuration of its own, fit for the stage.

    The host fills "auto" values of its configuration in place, and a second engine in one
    process must not see those of the first; so every stage gets a fresh one, made the way
    transformers makes one for each trial of a hyperparameter search.

    The anchor stage counts gradients as they are: no clipping. Its estimator takes the place of
    the optimizer, also where DeepSpeed would insist on its own Adam for offload.
    """
    if not training.deepspeed:
        return training
    config = _read(training.deepspeed)
    stage_training = copy.copy(training)
    if daa_stage == "anchor":
        config |= {"zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0}
        config.pop("optimizer", None)
        config.pop("scheduler", None)
        stage_training.max_grad_norm = 0.0
    hf_config = HfTrainerDeepSpeedConfig(config)
    hf_config.trainer_config_process(stage_training)
    stage_training.hf_deepspeed_config = hf_config
    stage_training.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=hf_config)
    AcceleratorState._reset_state()
    return stage_training


def _read(deepspeed: str | Config) -> Config:
    if isinstance(deepspeed, Mapping):
        return copy.deepcopy(dict(deepspeed))
    try:
        return json.loads(Path(deepspeed).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed={deepspeed}: cannot be read as JSON ({error}).") from error


def _get(config: Config, key: str, default: Any = None) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return default if value is None else value


def _is_on(config: Config, name: str) -> bool:
    return _get(config, f"{name}.enabled") in (True, "auto")
