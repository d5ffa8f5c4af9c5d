"""Law 4: ZeRO-0 = 1 = 2 = 3 = offload = one process, through stock LLaMA-Factory and DeepSpeed.

Ranks are real processes over gloo on the CPU. The error is that of the update,
||w - w_ref|| / ||w_ref - w_0||, against one process without DeepSpeed, both in fp32.

Bound 1e-5: sums over samples and parameters are taken in another order, which fp32 answers with
relative errors of 1e-7 per step; Adam divides by sqrt(v) + eps, and eps = 1e-5 keeps it from
making whole steps of rounding noise where a gradient is (nearly) zero.
"""

import json
from pathlib import Path

import pytest
from host import Host, anchor_of, distance, report, same, steps, weights
from zero_runs import BOUND, CLIPPING, Config, Jobs, alone, error, matrix, tiny_host, zero

from daa_ext.artifact import read_manifest

FAST = (
    "z0-x1-clipped", "z1-x4-clipped", "z1-x1-unclipped", "z2-x1-clipped", "z2-x4-unclipped",
    "z2-robin-x4-clipped", "z1-robin-x1-clipped", "z3-x1-clipped", "z3-x4-unclipped",
    "z2-offload-x4-clipped", "z2-offload-robin-x1-clipped", "z3-offload-x4-clipped",
)  # fmt: skip
SHIPPED = sorted((Path(__file__).parents[1] / "deepspeed_configs").glob("*.json"))
SAVING: Config = {"save_strategy": "steps", "save_steps": 1}
STAGES = {"z0": zero(0), "z1": zero(1), "z2": zero(2, round_robin_gradients=True), "z3": zero(3)}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return tiny_host(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def references(host: Host) -> dict[str, Path]:
    """One process, clipped and not."""
    return {clip: alone(host, f"one-{clip}", **changes) for clip, changes in CLIPPING.items()}


@pytest.fixture(scope="module")
def two(host: Host) -> Jobs:
    """All that these tests need of two ranks, in one start of them."""
    jobs = Jobs(host, 2)
    for name in FAST:
        config, changes = matrix()[name]
        jobs.add(name, config, **changes)
    for stage, config in STAGES.items():
        off: Config = {"daa_k0": 0.0, "daa_dc": False}
        jobs.add(f"{stage}-plain", config, finetuning_type="full")
        jobs.add(f"{stage}-off", config, **off)
        jobs.add(f"{stage}-whole", config, disable_shuffling=False, **SAVING)
        for step in (1, 2):
            checkpoint = str(host.folder / f"{stage}-whole" / f"checkpoint-{step}")
            jobs.add(
                f"{stage}-resumed-{step}", config, disable_shuffling=False,
                resume_from_checkpoint=checkpoint, **SAVING,
            )  # fmt: skip
        anchor: Config = {"daa_stage": "anchor", "per_device_train_batch_size": 4}
        jobs.add(f"{stage}-anchor", config, daa_anchor=str(host.folder / f"{stage}-a"),
                 daa_rank=8, **anchor, **SAVING)  # fmt: skip
        jobs.add(
            f"{stage}-anchor-resumed", config, daa_anchor=str(host.folder / f"{stage}-b"),
            resume_from_checkpoint=str(host.folder / f"{stage}-anchor" / "checkpoint-2"),
            daa_rank=8, **anchor, **SAVING,
        )  # fmt: skip
    for name, (config, changes) in REFUSED.items():
        jobs.add(name, config, **changes)
    whole_z2 = str(host.folder / "z2-whole" / "checkpoint-1")
    jobs.add("resume-as-z3", zero(3), resume_from_checkpoint=whole_z2)
    jobs.add("resume-other-k0", STAGES["z2"], resume_from_checkpoint=whole_z2, daa_k0=1.0)
    jobs.add("resume-forced", STAGES["z2"], resume_from_checkpoint=whole_z2, daa_k0=1.0,
             daa_force_resume=True)  # fmt: skip
    jobs.add("auto-z3", zero(3), daa_stage="auto", daa_anchor=str(host.folder / "auto-z3-a"),
             daa_anchor_dataset="general", daa_rank=8,
             daa_retention_dataset="general_test")  # fmt: skip
    for stage in ("z1", "z2", "z3"):
        jobs.add(f"{stage}-decay", STAGES[stage], weight_decay=0.3)
    jobs.add("scattered", zero(2, reduce_scatter=False))
    jobs.add("bf16-z2", zero(2), bf16=True, use_cpu=True)
    jobs.add("bf16-z3", zero(3), bf16=True, use_cpu=True)
    jobs.add("bf16-z0", zero(0), bf16=True, use_cpu=True)
    jobs.add("bf16-z1", zero(1), bf16=True, use_cpu=True)
    jobs.add("adam-of-the-file", adamw(zero(2)))
    for path in SHIPPED:
        jobs.add(path.stem, json.loads(path.read_text()), max_grad_norm=0.3)
    return jobs.run(DAA_TEST_BUCKET_BYTES="20000")


def adamw(config: Config) -> Config:
    """The configuration with an optimizer block, as DeepSpeed's own examples have it."""
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    return config | {"optimizer": {"type": "AdamW", "params": {**params, "torch_adam": True}}}


REFUSED: dict[str, tuple[Config, Config]] = {
    "other-k0": (zero(2), {"on_rank": {"1": {"daa_k0": 1.0}}}),
    "other-rate": (zero(2), {"on_rank": {"1": {"learning_rate": 2e-3}}}),
    "anchor-on-one-node": (zero(2), {"on_rank": {"1": {"daa_anchor": "nowhere"}}}),
    "nvme": (zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), {}),
    "ratio": (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), {}),
}


@pytest.mark.parametrize("name", FAST)
def test_law_4_two_ranks_equal_one_process(
    two: Jobs, references: dict[str, Path], name: str
) -> None:
    reference = references[name.split("-")[-1]]
    assert error(two.host, two.out(name), reference) < BOUND
    for found, wanted in zip(steps(two.out(name)), steps(reference), strict=True):
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_law_4_bound_tells_runs_apart(references: dict[str, Path], host: Host) -> None:
    """Clipping alone moves the update by a thousand bounds: equality is no accident."""
    assert error(host, references["clipped"], references["unclipped"]) > 1000 * BOUND


@pytest.mark.parametrize("stage", STAGES)
def test_law_1_no_effect_under_zero_when_switched_off(two: Jobs, stage: str) -> None:
    plain, off = (weights(two.out(f"{stage}-{kind}")) for kind in ("plain", "off"))
    assert same(plain, off)
    assert not same(plain, weights(two.out(f"{stage}-whole")))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_law_7_resume_under_zero_is_bitwise(two: Jobs, stage: str, step: int) -> None:
    whole, resumed = two.out(f"{stage}-whole"), two.out(f"{stage}-resumed-{step}")
    assert same(weights(whole), weights(resumed))
    assert steps(whole) == steps(resumed)


@pytest.mark.parametrize("stage", STAGES)
def test_law_7_resume_of_the_anchor_under_zero_is_bitwise(two: Jobs, stage: str) -> None:
    for kind in ("anchor", "anchor-resumed"):
        two.out(f"{stage}-{kind}")
    assert same(weights(two.host.folder / f"{stage}-a"), weights(two.host.folder / f"{stage}-b"))


@pytest.mark.parametrize("stage", STAGES)
def test_law_5_the_anchor_under_zero_is_the_one_of_one_process(two: Jobs, stage: str) -> None:
    two.out(f"{stage}-anchor")
    one, found = (anchor_of(two.host.folder / name) for name in ("anchor", f"{stage}-a"))
    zeros = {name: tensor * 0 for name, tensor in one.items()}
    # Rank 8 cuts the spectrum where singular values are close: 1e-7 in the gradient becomes more.
    assert distance(found, one, zeros) < 1e-3
    assert report(two.host.folder / f"{stage}-anchor")["world_size"] == 2


@pytest.mark.parametrize("name", ["z1-x1-unclipped", "z2-x1-clipped", "z3-x1-clipped"])
def test_law_8_the_ranks_share_the_anchor(two: Jobs, name: str) -> None:
    content = report(two.out(name))
    held, whole = content["anchor_bytes_per_rank"], content["anchor_bytes_total"]
    assert 0.95 * whole < sum(held) <= 1.05 * whole
    assert max(held) < 0.6 * whole


@pytest.mark.parametrize("stage", ["z1", "z2", "z3"])
def test_law_4_two_groups_with_decay_in_one(two: Jobs, host: Host, stage: str) -> None:
    """The host decays matrices and not vectors: two groups, two inner steps, one s_t."""
    one = alone(host, f"one-decay-{stage}", weight_decay=0.3)
    assert error(host, two.out(f"{stage}-decay"), one) < BOUND
    assert error(host, two.out("scattered"), one) > 10 * BOUND, "decay has an effect"


def test_stage_auto_under_zero_3(two: Jobs, host: Host) -> None:
    one = alone(host, "one-auto", daa_stage="auto", daa_anchor=str(host.folder / "one-auto-a"),
                daa_anchor_dataset="general", daa_rank=8)  # fmt: skip
    out = two.out("auto-z3")
    assert error(host, out, one) < 1e-3
    card = report(out)["retention"]
    assert card["weights"]["total"] == report(out)["trainable_params"]
    assert card["sets"]["general"]["loss"]["base"] > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_steps_fp32_weights(two: Jobs, references: dict[str, Path], stage: int) -> None:
    """bf16 computes the gradient, so the run is near the fp32 one, not equal to it."""
    content = report(two.out(f"bf16-z{stage}"))
    assert content["anchored_params"] == content["trainable_params"]
    assert len(steps(two.out(f"bf16-z{stage}"))) == 3
    assert error(two.host, two.out(f"bf16-z{stage}"), references["clipped"]) < 0.5


def test_an_optimizer_of_the_deepspeed_file(two: Jobs, host: Host) -> None:
    assert error(host, two.out("adam-of-the-file"), alone(host, "one-adam")) < BOUND


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_deepspeed_files(two: Jobs, references: dict[str, Path], path: Path) -> None:
    assert error(two.host, two.out(path.stem), references["clipped"]) < BOUND


# bad input


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other-k0", "daa_k0=3.0 on rank 0, but daa_k0=1.0 on rank 1"),
        ("other-rate", "learning_rate=0.001 on rank 0"),
        ("anchor-on-one-node", "no anchor there"),
        ("nvme", "zero_optimization.offload_optimizer.device='nvme'"),
        ("ratio", "zero_optimization.offload_optimizer.ratio=0.5"),
        ("resume-as-z3", "written by ZeRO stage 2 on 2 ranks"),
        ("resume-other-k0", "daa_k0=1.0 now"),
    ],
)
def test_all_ranks_refuse_with_a_word(two: Jobs, name: str, words: str) -> None:
    for text in two.errors[name]:
        assert text is not None
        assert text.startswith("ValueError")
        assert words in text


def test_a_forced_resume_goes_on_with_the_new_value(two: Jobs) -> None:
    gammas = [step["gamma"] for step in steps(two.out("resume-forced"))]
    whole = [step["gamma"] for step in steps(two.out("z2-whole"))]
    assert gammas[0] == whole[0]
    assert gammas[1:] == pytest.approx([gamma / 3 for gamma in whole[1:]])


# The bugs that DeepSpeed shipped in its own matrix-wise optimizer (Muon), as regressions here.


def test_muon_applied_per_micro_batch(two: Jobs, references: dict[str, Path]) -> None:
    """Four micro-batches are one step of DAA: one record, one gamma, one blend."""
    out = two.out("z2-robin-x4-clipped")
    assert [step["gamma"] for step in steps(out)] == [
        step["gamma"] for step in steps(references["clipped"])
    ]
    assert error(two.host, out, references["clipped"]) < BOUND


def test_muon_wrong_under_reduce_scatter(two: Jobs) -> None:
    assert error(two.host, two.out("scattered"), alone(two.host, "one-scattered")) < BOUND


def test_muon_shape_lost_under_zero_init(two: Jobs) -> None:
    """ZeRO-3 shows parameters of shape (0,); the anchor has their real ones, as factors."""
    two.out("z3-anchor")
    one, three = (read_manifest(two.host.folder / name).tensors for name in ("anchor", "z3-a"))
    assert {name: entry["shape"] for name, entry in three.items()} == {
        name: entry["shape"] for name, entry in one.items()
    }
    assert {entry["kind"] for entry in three.values()} == {"factors", "dense"}


@pytest.mark.parametrize("name", ["z2-offload-x4-clipped", "z3-offload-x4-clipped"])
def test_muon_lost_or_doubled_under_offload(
    two: Jobs, references: dict[str, Path], name: str
) -> None:
    content = report(two.out(name))
    assert content["anchored_params"] == content["trainable_params"]
    assert error(two.host, two.out(name), references["clipped"]) < BOUND


def test_muon_unbounded_gather_buffer(two: Jobs) -> None:
    """Vt of all matrices is more than the buffer may hold: it is gathered in buckets."""
    buffers = report(two.out("z3-x1-clipped"))["anchor_buffer_bytes_per_rank"]
    entries = read_manifest(two.host.folder / "anchor").tensors.values()
    whole = sum(4 * e["rank"] * e["shape"][1] for e in entries if e["kind"] == "factors")
    assert max(buffers) <= 20000 < whole
    assert report(two.out("z2-x1-clipped"))["anchor_buffer_bytes_per_rank"] == [0, 0]
