"""Every launcher of docs/zero.md: on one node, and on two nodes that are network namespaces.

A namespace has its own address and sees the other only over the wire between them, so ranks that
find each other here do it as on two machines. Where namespaces are not permitted the two-node
tests skip.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from host import CLI, Host, report, same, steps, weights
from zero_runs import BOUND, Config, alone, error, sharded, tiny_host, zero

from daa_ext.artifact import read_manifest, verify_files

ADDRESSES = ("10.211.87.1", "10.211.87.2")
BIN = CLI.parent
TIMEOUT = 240


def launcher() -> str:
    """LLaMA-Factory's launcher.py, which torchrun is given by hand."""
    import llamafactory

    return str(Path(llamafactory.__file__ or "").with_name("launcher.py"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return tiny_host(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="module")
def reference(host: Host) -> Path:
    return alone(host, "one")


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Names of two network namespaces, joined by a wire."""
    names = [f"daa{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip(f"netns add {name}")
        wires = [f"w{os.getpid() % 10**6}{side}" for side in "ab"]
        ip(f"link add {wires[0]} type veth peer name {wires[1]}")
        for name, wire, address in zip(names, wires, ADDRESSES, strict=True):
            ip(f"link set {wire} netns {name} name wire")
            for words in (f"addr add {address}/24 dev wire", "link set wire up", "link set lo up"):
                ip(f"-n {name} {words}")
    except (OSError, subprocess.CalledProcessError) as failed:
        words = getattr(failed, "stderr", None) or failed
        remove(names)
        pytest.skip(f"network namespaces are not permitted here: {words!r}")
    yield names
    remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def environment(**more: str) -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def write_yaml(host: Host, arguments: Config, name: str) -> str:
    path = host.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(arguments))
    return str(path)


def start(host: Host, command: list[str], log: str, **more: str) -> "subprocess.Popen[str]":
    with (host.folder / log).open("w") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=host.folder,
            env=environment(**more), start_new_session=True,
        )  # fmt: skip


def finish(host: Host, processes: dict[str, "subprocess.Popen[str]"]) -> dict[str, int]:
    """Wait for all; exit codes by log file. Whatever is left after TIMEOUT is killed: -9."""
    deadline = time.monotonic() + TIMEOUT
    codes = {}
    for log, process in processes.items():
        try:
            codes[log] = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            codes[log] = -9
        finally:
            kill_all(process)
    return codes


def kill_all(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a launcher and all below it (ranks have sessions of their own)."""
    try:
        top = psutil.Process(process.pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def words(host: Host, *logs: str) -> str:
    return "\n".join((host.folder / log).read_text()[-4000:] for log in logs)


def on_both(
    host: Host, nodes: list[str], commands: list[list[str]], **more: str
) -> dict[str, "subprocess.Popen[str]"]:
    """Start one command in each namespace."""
    started = {}
    for rank, (node, command) in enumerate(zip(nodes, commands, strict=True)):
        log = f"{node}.log"
        node_words = {"NODE_RANK": str(rank), "GLOO_SOCKET_IFNAME": "wire", **more}
        started[log] = start(host, ["ip", "netns", "exec", node, *command], log, **node_words)
    return started


def run_on_both(host: Host, nodes: list[str], commands: list[list[str]], **more: str) -> None:
    started = on_both(host, nodes, commands, **more)
    codes = finish(host, started)
    assert set(codes.values()) == {0}, words(host, *codes)


CLUSTER = {"FORCE_TORCHRUN": "1", "NNODES": "2", "NPROC_PER_NODE": "1",
           "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511"}  # fmt: skip


# one node


@pytest.mark.distributed
def test_deepspeed_launcher_on_one_node(host: Host, reference: Path) -> None:
    path = write_yaml(host, sharded(host, "ds-one", 2, zero(2)), "ds-one")
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--no_local_rank"]
    command += ["--module", "llamafactory.launcher", path]
    codes = finish(host, {"ds-one.log": start(host, command, "ds-one.log")})
    assert set(codes.values()) == {0}, words(host, *codes)
    assert report(host.folder / "ds-one")["world_size"] == 2
    assert error(host, host.folder / "ds-one", reference) < BOUND


@pytest.mark.distributed
def test_llamafactory_cli_on_one_node(host: Host, reference: Path) -> None:
    arguments = sharded(host, "cli-one", 2, zero(3))
    host.command(arguments, FORCE_TORCHRUN="1", NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert report(host.folder / "cli-one")["world_size"] == 2
    assert error(host, host.folder / "cli-one", reference) < BOUND


# two nodes


def test_llamafactory_cli_on_two_nodes(host: Host, nodes: list[str], reference: Path) -> None:
    path = write_yaml(host, sharded(host, "cli-two", 2, zero(2)), "cli-two")
    run_on_both(host, nodes, [[str(CLI), "train", path]] * 2, **CLUSTER)
    assert report(host.folder / "cli-two")["world_size"] == 2
    assert error(host, host.folder / "cli-two", reference) < BOUND


@pytest.mark.distributed
def test_torchrun_on_two_nodes(host: Host, nodes: list[str], reference: Path) -> None:
    path = write_yaml(host, sharded(host, "torchrun-two", 2, zero(3)), "torchrun-two")
    commands = [
        [
            str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
            str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29512", launcher(), path,
        ]
        for rank in (0, 1)
    ]  # fmt: skip
    run_on_both(host, nodes, commands)
    assert error(host, host.folder / "torchrun-two", reference) < BOUND


@pytest.mark.distributed
def test_deepspeed_launcher_on_two_nodes(host: Host, nodes: list[str], reference: Path) -> None:
    path = write_yaml(host, sharded(host, "ds-two", 2, zero(2)), "ds-two")
    hostfile = host.folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    commands = [
        [
            str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--node_rank",
            str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29513",
            "--no_local_rank", "--module", "llamafactory.launcher", path,
        ]
        for rank in (0, 1)
    ]  # fmt: skip
    run_on_both(host, nodes, commands)
    assert report(host.folder / "ds-two")["world_size"] == 2
    assert error(host, host.folder / "ds-two", reference) < BOUND


@pytest.mark.distributed
def test_nodes_with_other_settings_are_refused(host: Host, nodes: list[str]) -> None:
    paths = [
        write_yaml(host, sharded(host, "differ", 2, zero(2), daa_k0=k0), f"differ-{k0:g}")
        for k0 in (3.0, 1.0)
    ]
    commands = [[str(CLI), "train", path] for path in paths]
    codes = finish(host, on_both(host, nodes, commands, **CLUSTER))
    for log, code in codes.items():
        assert code not in (0, -9), words(host, log)
        assert "daa_k0=3.0 on rank 0, but daa_k0=1.0 on rank 1" in words(host, log)


def test_anchor_on_one_node_only_is_refused(host: Host, nodes: list[str]) -> None:
    """Node 1 has an empty disk where node 0 has the anchor."""
    path = write_yaml(host, sharded(host, "bare", 2, zero(2)), "bare")
    train = [str(CLI), "train", path]
    hide = f"mount -t tmpfs none {host.folder / 'anchor'} && exec {' '.join(train)}"
    commands = [train, ["unshare", "-m", "sh", "-c", hide]]
    codes = finish(host, on_both(host, nodes, commands, **CLUSTER))
    for log, code in codes.items():
        assert code not in (0, -9), words(host, log)
        assert "1 of 2 ranks cannot go on. rank 1: daa_anchor=" in words(host, log)
        assert "no anchor there" in words(host, log)


# a rank dies


def long_run(host: Host, name: str) -> Config:
    """Many steps, a checkpoint at each: time to die in the middle of one."""
    return sharded(
        host, name, 2, zero(2), save_strategy="steps", save_steps=2, num_train_epochs=15.0,
        daa_k0=20.0, disable_shuffling=False,
    )  # fmt: skip


def workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The ranks under a launcher: the Python processes that run the launcher's script."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any("launcher.py" in word for word in child.cmdline())
            and "torchrun" not in " ".join(child.cmdline())]  # fmt: skip


def wait_for_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not (folder / "checkpoint-4" / "daa_state.json").exists():
        assert time.monotonic() < deadline, "the run has not begun"
        time.sleep(0.05)


def assert_resumes(host: Host, name: str, whole: str) -> None:
    """What is left after the death is whole: a resume gives the weights of an undisturbed run."""
    folder = host.folder / name
    verify_files(host.folder / "anchor", read_manifest(host.folder / "anchor"))
    done = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()
            and (path / "daa_state.json").exists()]  # fmt: skip
    last = max(done, key=lambda path: int(path.name.split("-")[1]))
    resumed = long_run(host, f"{name}-resumed") | {"resume_from_checkpoint": str(last)}
    undisturbed = long_run(host, whole)
    host.ranks([undisturbed, resumed], 2)
    found, wanted = host.folder / f"{name}-resumed", host.folder / whole
    assert same(weights(found), weights(wanted))
    assert [s["step"] for s in steps(found)] == [s["step"] for s in steps(wanted)]


def test_killed_rank_ends_the_run_and_a_resume_gives_the_same_weights(host: Host) -> None:
    path = write_yaml(host, long_run(host, "killed"), "killed")
    more = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    process = start(host, [str(CLI), "train", path], "killed.log", **more)
    wait_for_checkpoint(host.folder / "killed")
    ranks = workers(process)
    assert len(ranks) == 2, [rank.cmdline() for rank in ranks]
    ranks[1].send_signal(signal.SIGKILL)
    codes = finish(host, {"killed.log": process})
    assert codes["killed.log"] not in (0, -9), words(host, "killed.log")
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)
    assert_resumes(host, "killed", "undisturbed")


@pytest.mark.distributed
def test_killed_node_ends_the_other(host: Host, nodes: list[str]) -> None:
    path = write_yaml(host, long_run(host, "killed-node"), "killed-node")
    started = on_both(host, nodes, [[str(CLI), "train", path]] * 2, **CLUSTER)
    wait_for_checkpoint(host.folder / "killed-node")
    kill_all(list(started.values())[1])
    codes = finish(host, started)
    assert next(iter(codes.values())) not in (0, -9), words(host, *codes)
    folder = host.folder / "killed-node"
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoint-*/daa_state.json")]
    assert states
    assert all(state["anchor"] == states[0]["anchor"] for state in states)
