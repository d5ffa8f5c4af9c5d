"""Resume on another number of ranks, as DeepSpeed's universal checkpoints allow it."""

import subprocess
import sys
from pathlib import Path

import pytest
from host import Host, steps
from zero_runs import Config, Jobs, error, tiny_host, zero

pytestmark = pytest.mark.distributed
SAVING: Config = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
STAGES = {"z1": zero(1), "z2": zero(2), "z3": zero(3)}
BOUND = 1e-3


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return tiny_host(tmp_path_factory.mktemp("universal"))


@pytest.fixture(scope="module")
def two(host: Host) -> Jobs:
    """Runs on two ranks whose first checkpoints are then converted."""
    jobs = Jobs(host, 2)
    for name, config in STAGES.items():
        jobs.add(name, config, **SAVING)
    jobs.run()
    for name in STAGES:
        convert(jobs.out(name) / "checkpoint-1")
    return jobs


def convert(checkpoint: Path) -> None:
    """The command of docs/zero.md."""
    source = checkpoint / "global_step1"
    target = checkpoint / "global_step1_universal"
    words = ["--inject_missing_state", "--input_folder", str(source)]
    words += ["--output_folder", str(target)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint / "latest_universal").write_text(target.name)


@pytest.fixture(scope="module", params=[1, 3], ids=lambda count: f"{count}-ranks")
def others(request: pytest.FixtureRequest, two: Jobs) -> Jobs:
    jobs = Jobs(two.host, request.param)
    for name, config in STAGES.items():
        checkpoint = str(two.out(name) / "checkpoint-1")
        universal = config | {"checkpoint": {"load_universal": True}}
        jobs.add(f"{name}-{jobs.count}", universal, resume_from_checkpoint=checkpoint)
        jobs.add(f"{name}-{jobs.count}-bare", config, resume_from_checkpoint=checkpoint)
    return jobs.run()


@pytest.mark.parametrize("name", STAGES)
def test_universal_checkpoint_resumes_on_other_ranks(two: Jobs, others: Jobs, name: str) -> None:
    out = others.out(f"{name}-{others.count}")
    assert error(two.host, out, two.out(name)) < BOUND
    assert [step["step"] for step in steps(out)] == [0, 1, 2]


@pytest.mark.parametrize("name", STAGES)
def test_other_ranks_without_it_are_refused_with_the_mend(others: Jobs, name: str) -> None:
    for text in others.errors[f"{name}-{others.count}-bare"]:
        assert text is not None
        assert f"written by ZeRO stage {name[1]} on 2 ranks" in text
        assert "ds_to_universal" in text
