"""DeepSpeed configurations: what DAA refuses, and what a stage changes in its own copy."""

import copy
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from daa_ext.ds_config import REFUSALS, Config, for_stage, refuse

SHIPPED = sorted((Path(__file__).parents[1] / "deepspeed_configs").glob("*.json"))


def config(**settings: Any) -> Config:
    """The shipped ZeRO-2 with other settings, by dotted path; __ for a dot."""
    content: Config = json.loads(SHIPPED[2].read_text())
    for path, value in settings.items():
        *parents, last = path.split("__")
        node = content
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return content


def refusal(content: Config) -> str:
    """What `refuse` says, or nothing."""
    try:
        refuse(content)
    except ValueError as error:
        return str(error)
    return ""


# Of each key: settings that are refused, and settings that are not.
UNIVERSAL = {"checkpoint__load_universal": True}
CASES: dict[str, tuple[list[Config], list[Config]]] = {
    "zero_optimization.offload_optimizer.device": (
        [{"zero_optimization__offload_optimizer__device": "nvme"}],
        [{"zero_optimization__offload_optimizer__device": device} for device in ("cpu", "none")],
    ),
    "zero_optimization.offload_param.device": (
        [{"zero_optimization__offload_param__device": "nvme"}],
        [{"zero_optimization__offload_param__device": device} for device in ("cpu", "none")],
    ),
    "zero_optimization.offload_optimizer.ratio": (
        [{"zero_optimization__offload_optimizer__ratio": ratio} for ratio in (0.99, 0.3, 0, 0.0)],
        [{"zero_optimization__offload_optimizer__ratio": ratio} for ratio in (1, 1.0)],
    ),
    "optimizer.type": (
        [
            *({"optimizer__type": kind} for kind in ("SGD", "Lamb", "OneBitAdam", "Lion", "Muon")),
            {"optimizer__type": "Adam", "optimizer__params__adam_w_mode": False},
        ],
        [
            {"optimizer__type": "AdamW"},
            {"optimizer__type": "Adam"},
            {"optimizer__type": "Adam", "optimizer__params__adam_w_mode": True},
            {"optimizer__params__lr": 1e-5},
            {"optimizer": None},
        ],
    ),
    "zero_optimization.zenflow": (
        # DeepSpeed takes {} for ZenFlow with all its defaults.
        [{"zero_optimization__zenflow": value} for value in ({"topk_ratio": 0.1}, {})],
        [{"zero_optimization__zenflow": None}],
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        [{"zero_optimization__offload_optimizer__super_offload": True}],
        [{"zero_optimization__offload_optimizer__super_offload": False}],
    ),
    "zero_optimization.mics_shard_size": (
        [{"zero_optimization__mics_shard_size": 2}],
        [{"zero_optimization__mics_shard_size": size} for size in (-1, 1)],
    ),
    "zero_optimization.zero_hpz_partition_size": (
        [{"zero_optimization__zero_hpz_partition_size": 8}],
        [{"zero_optimization__zero_hpz_partition_size": 1}],
    ),
    "zero_optimization.compute_grad_norm": (
        [{"zero_optimization__compute_grad_norm": False}],
        [{"zero_optimization__compute_grad_norm": True}],
    ),
    "tensor_parallel.autotp_size": (
        [{"tensor_parallel__autotp_size": 2}],
        [{"tensor_parallel__autotp_size": size} for size in (0, 1)],
    ),
    "sequence_parallel_size": ([{"sequence_parallel_size": 2}], [{"sequence_parallel_size": 1}]),
    "bf16.bf16_master_weights_and_grads": (
        [{"bf16__bf16_master_weights_and_grads": True}],
        [{"bf16__bf16_master_weights_and_grads": False}],
    ),
    "fp16.fp16_master_weights_and_grads": (
        [{"fp16__fp16_master_weights_and_grads": True}],
        [{"fp16__fp16_master_weights_and_grads": False}],
    ),
    "torch_autocast.enabled": (
        [{"torch_autocast__enabled": True}],
        [{"torch_autocast__enabled": False}, {"torch_autocast": {}}],
    ),
    "sparse_gradients": ([{"sparse_gradients": True}], [{"sparse_gradients": False}]),
    "managed_gradient_accumulation": (
        [{"managed_gradient_accumulation": False}],
        [{"managed_gradient_accumulation": True}],
    ),
    "compression_training": (
        [{"compression_training": {"weight_quantization": {}}}],
        [{"compression_training": {}}],
    ),
    "checkpoint.load_universal": (
        [{**UNIVERSAL, "zero_optimization__stage": 0}],
        [
            *({**UNIVERSAL, "zero_optimization__stage": stage} for stage in (1, 2, 3)),
            {"checkpoint__load_universal": False, "zero_optimization__stage": 0},
        ],
    ),
    "data_types.grad_accum_dtype": (
        [
            {
                "data_types__grad_accum_dtype": "fp32",
                "zero_optimization__stage": 1,
                "bf16__enabled": enabled,
                **offload,
            }
            for enabled in (True, "auto")
            for offload in ({}, {"zero_optimization__offload_optimizer__device": "none"})
        ],
        [],  # see test_bf16_optimizer_is_refused_only_where_deepspeed_runs_it
    ),
}
REFUSED = [(key, settings) for key, (refused, _) in CASES.items() for settings in refused]
ALLOWED = [(key, settings) for key, (_, allowed) in CASES.items() for settings in allowed]


def test_every_refusal_is_tried() -> None:
    assert sorted(CASES) == sorted(refusal.key for refusal in REFUSALS)
    assert len({refusal.key for refusal in REFUSALS}) == len(REFUSALS)


@pytest.mark.parametrize(("key", "settings"), REFUSED)
def test_what_cannot_go_with_daa_is_refused_by_its_key(key: str, settings: Config) -> None:
    content = config(**settings)
    before = copy.deepcopy(content)
    words = refusal(content)
    value: Any = content
    for name in key.split("."):
        value = value[name]
    assert words.startswith(f"deepspeed: {key}={value!r} cannot go with finetuning_type=daa: ")
    assert words.endswith(". (docs/zero.md)")
    assert content == before


@pytest.mark.parametrize(("key", "settings"), ALLOWED)
def test_the_same_key_with_another_value_passes(key: str, settings: Config) -> None:
    assert refusal(config(**settings)) == ""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_not_refused(path: Path) -> None:
    refuse(str(path))
    refuse(json.loads(path.read_text()))


def test_all_stages_are_shipped() -> None:
    names = ["ds_z0", "ds_z1", "ds_z2", "ds_z2_offload", "ds_z3", "ds_z3_offload"]
    assert [path.stem for path in SHIPPED] == names
    stages = [json.loads(path.read_text())["zero_optimization"]["stage"] for path in SHIPPED]
    assert stages == [0, 1, 2, 2, 3, 3]


BF16_OPTIMIZER: Config = {
    "data_types__grad_accum_dtype": "fp32", "zero_optimization__stage": 1, "bf16__enabled": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"zero_optimization__stage": 0},
        {"zero_optimization__stage": 2},
        {"zero_optimization__stage": 3},
        {"bf16__enabled": False},
        {"bf16": {}},
        {"data_types__grad_accum_dtype": "bf16"},
        {"data_types__grad_accum_dtype": None},
        {"zero_optimization__offload_optimizer__device": "cpu"},
    ],
)
def test_bf16_optimizer_is_refused_only_where_deepspeed_runs_it(change: Config) -> None:
    assert "BF16_Optimizer" in refusal(config(**BF16_OPTIMIZER))
    assert refusal(config(**BF16_OPTIMIZER | change)) == ""


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"{'stage': 2}", b"\xff\xfe"], ids=lambda c: repr(c)
)
def test_a_file_that_is_no_json_is_an_error_that_names_it(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as JSON") as caught:
        refuse(str(path))
    assert str(caught.value).startswith(f"deepspeed={path}: ")
    with pytest.raises(ValueError, match=r"deepspeed=.*cannot be read as JSON"):
        refuse(str(tmp_path))


# what a stage changes


BLOCKS: Config = {
    "gradient_clipping": "auto",
    "zero_optimization__offload_optimizer__device": "cpu",
    "optimizer__type": "AdamW",
    "optimizer__params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    "scheduler__type": "WarmupLR",
    "scheduler__params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"},
}
Found = dict[str, Any]


def in_a_fresh_process(folder: Path) -> None:
    """Make a run's arguments, then those of its stages; write down what each one has.

    TrainingArguments with `deepspeed` set variables of the process for good.
    """
    from transformers import TrainingArguments
    from transformers.integrations import deepspeed as integration

    def content(arguments: Any) -> Found:
        return copy.deepcopy(
            {
                "max_grad_norm": arguments.max_grad_norm,
                "deepspeed": arguments.deepspeed,
                "config": arguments.hf_deepspeed_config.config,
                "mismatches": arguments.hf_deepspeed_config.mismatches,
                "plugin": arguments.deepspeed_plugin.deepspeed_config,
                "all": arguments.to_dict(),
            }
        )

    found: dict[str, Any] = {}
    path = folder / "ds.json"
    for name, source in {"file": str(path), "dict": config(**BLOCKS)}.items():
        first = TrainingArguments(
            output_dir=str(folder), deepspeed=source, report_to="none", use_cpu=True,
            max_grad_norm=0.7, learning_rate=3e-5, per_device_train_batch_size=5,
        )  # fmt: skip
        stages, before = {}, content(first)
        for stage in ("anchor", "anneal"):
            stages[stage] = for_stage(first, stage)
            own = stages[stage].hf_deepspeed_config
            assert own is integration._hf_deepspeed_config_weak_ref(), "what a model load asks"
            assert stages[stage].deepspeed_plugin.hf_ds_config is own
            own.config["train_batch_size"] = "filled in by the stage"
            own.config["zero_optimization"]["stage"] = 77
        again = for_stage(first, "anneal")
        found[name] = {
            "before": before,
            "after": content(first),
            "again": content(again),
            **{stage: content(arguments) for stage, arguments in stages.items()},
        }
    plain = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    found["plain is itself"] = [for_stage(plain, stage) is plain for stage in ("anchor", "anneal")]
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("ds_config")
    (folder / "ds.json").write_text(json.dumps(config(**BLOCKS)))
    process = multiprocessing.get_context("spawn").Process(
        target=in_a_fresh_process, args=(folder,)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    text = (folder / "ds.json").read_text()
    return json.loads((folder / "found.json").read_text()) | {"text": text}


SOURCES = pytest.mark.parametrize("source", ["file", "dict"])


@SOURCES
def test_the_anchor_stage_neither_clips_nor_has_an_optimizer_of_deepspeed(
    found: Found, source: str
) -> None:
    anchor, anneal = found[source]["anchor"], found[source]["anneal"]
    for settings in (anchor["config"], anchor["plugin"]):
        assert settings["gradient_clipping"] == 0.0
        assert settings["zero_force_ds_cpu_optimizer"] is False
        assert not {"optimizer", "scheduler"} & settings.keys()
    assert anchor["max_grad_norm"] == 0.0
    assert anneal["config"]["gradient_clipping"] == anneal["max_grad_norm"] == 0.7
    assert anneal["config"]["optimizer"]["params"]["lr"] == 3e-5
    assert anneal["config"]["scheduler"]["params"]["warmup_max_lr"] == 3e-5
    assert "zero_force_ds_cpu_optimizer" not in anneal["config"]
    assert anchor["mismatches"] == anneal["mismatches"] == []


@SOURCES
def test_a_stage_leaves_the_run_s_own_arguments_alone(found: Found, source: str) -> None:
    assert found[source]["before"] == found[source]["after"]
    assert json.loads(found["text"]) == config(**BLOCKS), "the user's file"
    assert found["dict"]["after"]["deepspeed"] == config(**BLOCKS), "the user's dict"
    assert found[source]["before"]["config"] != config(**BLOCKS), "the host fills in auto"


@SOURCES
def test_every_stage_starts_from_what_the_user_wrote(found: Found, source: str) -> None:
    first, again = (found[source][name]["config"] for name in ("before", "again"))
    assert again["train_batch_size"] == first["train_batch_size"] == 5
    assert again["zero_optimization"]["stage"] == 2
    assert found[source]["anneal"]["config"]["zero_optimization"]["stage"] == 77, "it was changed"
    del again["steps_per_print"], first["steps_per_print"]  # accelerate's
    assert again == first


def test_without_deepspeed_nothing_is_copied(found: Found) -> None:
    assert found["plain is itself"] == [True, True]
