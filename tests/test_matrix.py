"""Law 4 and law 8 over everything DeepSpeed offers on 1, 2, 3 and 4 ranks: make test-distributed.

Every run is compared with one process without DeepSpeed; see test_sharded for the bound.
"""

from pathlib import Path

import pytest
from host import Host, report
from zero_runs import BOUND, CLIPPING, Jobs, alone, error, matrix, tiny_host, zero

pytestmark = pytest.mark.distributed
DEEP = 16  # layers; law 8 is of models with many matrices


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return tiny_host(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def references(host: Host) -> dict[str, Path]:
    return {clip: alone(host, f"one-{clip}", **changes) for clip, changes in CLIPPING.items()}


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda count: f"{count}-ranks")
def runs(request: pytest.FixtureRequest, host: Host) -> Jobs:
    jobs = Jobs(host, request.param)
    for name, (config, changes) in matrix().items():
        jobs.add(f"{name}-{request.param}", config, **changes)
    jobs.add(f"ddp-x1-clipped-{request.param}", None, **CLIPPING["clipped"])
    return jobs.run(DAA_TEST_BUCKET_BYTES="20000")


@pytest.mark.parametrize("name", [*matrix(), "ddp-x1-clipped"])
def test_law_4(runs: Jobs, references: dict[str, Path], name: str) -> None:
    out = runs.out(f"{name}-{runs.count}")
    assert error(runs.host, out, references[name.split("-")[-1]]) < BOUND
    content = report(out)
    assert content["world_size"] == runs.count
    assert content["anchored_params"] == content["trainable_params"]


def test_anchor_of_four_ranks_is_read_by_one_process_and_by_other_stages(
    host: Host, references: dict[str, Path]
) -> None:
    """Written under ZeRO-3 on 4 ranks; the other way round is every other test of this file."""
    folder = str(host.folder / "four")
    four = Jobs(host, 4)
    four.add("four-anchor", zero(3), daa_stage="anchor", daa_anchor=folder, daa_rank=8,
             per_device_train_batch_size=2)  # fmt: skip
    four.run().out("four-anchor")
    one = alone(host, "one-of-four", daa_anchor=folder, max_grad_norm=0.3)
    assert error(host, one, references["clipped"]) < 1e-3
    two = Jobs(host, 2)
    two.add("two-of-four", zero(2), daa_anchor=folder, max_grad_norm=0.3)
    assert error(host, two.run().out("two-of-four"), one) < BOUND


@pytest.mark.parametrize("count", [2, 4])
def test_law_8(tmp_path: Path, count: int) -> None:
    host = tiny_host(tmp_path, num_hidden_layers=DEEP)
    jobs = Jobs(host, count)
    stages = {f"z{stage}": zero(stage) for stage in (1, 2, 3)}
    stages["z2-robin"] = zero(2, round_robin_gradients=True)
    for name, config in stages.items():
        jobs.add(name, config)
    jobs.run()
    for name in stages:
        content = report(jobs.out(name))
        held, whole = content["anchor_bytes_per_rank"], content["anchor_bytes_total"]
        assert 0.95 * whole < sum(held) <= 1.05 * whole, name
        assert max(held) < 1.5 * whole / count, name
