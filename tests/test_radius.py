"""daa_radius on several ranks: DDP and ZeRO, offload, bf16, resume. One process: test_laws.py."""

from pathlib import Path
from typing import Any

import pytest
from host import report, same, steps, weights
from zero_runs import BOUND, RESUMED, SAVING, STAGES, Config, Jobs, error, sharded, tiny_host

pytestmark = pytest.mark.distributed
HELD: Config = {"daa_radius": 3e-3, "max_grad_norm": 0.3}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = Jobs(tiny_host(tmp_path_factory.mktemp("radius"), num_hidden_layers=2), 2)
    jobs.add_stages(2, **HELD)
    jobs.add("z3-bf16", STAGES["z3"], **HELD, bf16=True, use_cpu=True)
    changes = {**HELD, **SAVING, "daa_radius": 1e-2}
    changes["resume_from_checkpoint"] = str(jobs.host.folder / "z2" / "checkpoint-2")
    jobs.add("other", STAGES["z2"], **changes)
    return jobs.run()


@pytest.fixture(scope="module")
def alone(jobs: Jobs) -> Path:
    return jobs.host.run(sharded(jobs.host, "alone", 1, None, **HELD))


def test_the_radius_matters_here(jobs: Jobs, alone: Path) -> None:
    free = jobs.host.run(sharded(jobs.host, "free", 1, None, max_grad_norm=0.3))
    assert error(jobs.host, free, alone) > 1000 * BOUND
    assert report(alone)["steps_held"] > 0


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_equal_one_process(jobs: Jobs, alone: Path, name: str) -> None:
    out = jobs.out(name)
    assert error(jobs.host, out, alone) < BOUND
    found, wanted = report(out), report(alone)
    assert found["steps_held"] == wanted["steps_held"]
    for key in ("radius", "distance"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-4)
    gone: list[list[Any]] = [[step["distance"] for step in steps(each)] for each in (out, alone)]
    assert gone[0] == pytest.approx(gone[1], rel=1e-4)


def test_under_bf16_the_run_is_near_the_exact_one(jobs: Jobs, alone: Path) -> None:
    found, wanted = report(jobs.out("z3-bf16")), report(alone)
    assert found["distance"] == pytest.approx(wanted["distance"], rel=0.02)


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise(jobs: Jobs, name: str) -> None:
    """theta0 is the base model again, not the checkpoint."""
    assert same(weights(jobs.out(name)), weights(jobs.out(f"{name}-again")))


def test_resume_with_another_radius_is_refused(jobs: Jobs) -> None:
    for words in jobs.errors["other"]:
        assert words is not None
        assert (
            "daa_radius=0.01 now, but the run that is to be resumed had daa_radius=0.003" in words
        )
