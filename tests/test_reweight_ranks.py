"""TALR and FLOW on several ranks, DDP and ZeRO: the run of one process. See test_sharded."""

import json
from pathlib import Path

import pytest
from host import Host
from zero_runs import BOUND, OFFLOAD, Config, Jobs, alone, error, tiny_host, zero

FULL: Config = {"finetuning_type": "full"}
TALR: Config = {**FULL, "use_talr_loss": True, "talr_tau": 2.0}
MEDIAN: Config = {**FULL, "use_talr_loss": True}
FLOW: Config = {**FULL, "use_flow_loss": True}
METHODS: dict[str, Config] = {
    "talr": TALR,
    "median": MEDIAN,
    "flow": FLOW,
    "daa": {"use_talr_loss": True, "talr_tau": 2.0},
}
CONFIGS: dict[str, Config | None] = {
    "ddp": None,
    "z0": zero(0),
    "z2": zero(2),
    "z2-offload": zero(2, **OFFLOAD),
    "z3": zero(3),
}
X4: Config = {"gradient_accumulation_steps": 4}
# A median over one micro-batch of all ranks is that of the whole batch; over four it is another.
FAST = (
    "ddp-talr-x1", "ddp-talr-x4", "ddp-median-x1", "ddp-flow-x1", "z2-talr-x1", "z2-talr-x4",
    "z3-talr-x1", "z3-median-x1", "z3-flow-x4", "z3-daa-x1",
)  # fmt: skip
ALL = tuple(
    f"{config}-{method}-{x}"
    for config in CONFIGS
    for method in METHODS
    for x in ("x1", "x4")
    if (method, x) != ("median", "x4")
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return tiny_host(tmp_path_factory.mktemp("reweight"))


@pytest.fixture(scope="module")
def references(host: Host) -> dict[str, Path]:
    """One process, by method; and the same without the method."""
    runs = {name: alone(host, f"one-{name}", **changes) for name, changes in METHODS.items()}
    return {**runs, "plain": alone(host, "one-plain", **FULL)}


def jobs_of(host: Host, count: int, names: tuple[str, ...]) -> Jobs:
    jobs = Jobs(host, count)
    for name in names:
        config, method, x = name.rsplit("-", 2)
        accumulated = X4 if x == "x4" else {}
        jobs.add(f"{count}-{name}", CONFIGS[config], **METHODS[method], **accumulated)
    return jobs


REFUSED: dict[str, Config] = {
    "other-floor": {**TALR, "on_rank": {"1": {"talr_w_min": 0.5}}},
    "other-tau": {**FLOW, "on_rank": {"1": {"flow_tau": 3.0}}},
    "other-data": {**FLOW, "on_rank": {"1": {"max_samples": 20}}},
}


@pytest.fixture(scope="module")
def two(host: Host) -> Jobs:
    jobs = jobs_of(host, 2, FAST)
    for name, changes in REFUSED.items():
        jobs.add(name, None, **changes)
    return jobs.run()


@pytest.mark.parametrize("name", FAST)
def test_two_ranks_equal_one_process(two: Jobs, references: dict[str, Path], name: str) -> None:
    method = name.split("-")[-2]
    assert error(two.host, two.out(f"2-{name}"), references[method]) < BOUND


@pytest.mark.parametrize("method", ["talr", "median", "flow"])
def test_bound_tells_runs_apart(host: Host, references: dict[str, Path], method: str) -> None:
    assert error(host, references[method], references["plain"]) > 100 * BOUND


@pytest.mark.parametrize("name", ["z2-talr-x4", "z3-flow-x4", "ddp-median-x1"])
def test_what_is_logged_is_of_all_ranks(two: Jobs, references: dict[str, Path], name: str) -> None:
    def history(out: Path) -> list[dict[str, float]]:
        return json.loads((out / "trainer_state.json").read_text())["log_history"][:-1]

    method = name.split("-")[1]
    prefix = "flow" if method == "flow" else "talr"
    for found, wanted in zip(
        history(two.out(f"2-{name}")), history(references[method]), strict=True
    ):
        for key in (f"{prefix}/tau", f"{prefix}/weight_mean", "loss"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other-floor", "talr_w_min=0.01 on rank 0, but talr_w_min=0.5 on rank 1"),
        ("other-tau", "flow_tau=None on rank 0, but flow_tau=3.0 on rank 1"),
        ("other-data", "samples of the training set=144 on rank 0, but .*=20 on rank 1"),
    ],
)
def test_ranks_that_differ_are_refused_on_all(two: Jobs, name: str, words: str) -> None:
    import re

    assert len(two.errors[name]) == 2
    for found in two.errors[name]:
        assert found is not None
        assert re.search(words, found)


@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, 4])
def test_all_of_zero_equals_one_process(
    host: Host, references: dict[str, Path], count: int
) -> None:
    jobs = jobs_of(host, count, ALL).run()
    errors = {
        name: error(host, jobs.out(f"{count}-{name}"), references[name.split("-")[-2]])
        for name in ALL
    }
    assert max(errors.values()) < BOUND, errors
