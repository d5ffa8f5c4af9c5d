"""Writing the anchor folder: replacing one, being killed at any point, no room, no permission."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from test_artifact import SMALL, assert_holds, files, make_manifest, make_terms, write

from daa_ext import artifact
from daa_ext.artifact import check_writable, is_anchor, read_manifest, write_anchor

REAL_SAVE, REAL_RENAME, REAL_WRITE = artifact.save_file, os.rename, Path.write_text


def die(*args: Any, **kwargs: Any) -> NoReturn:
    """What the kernel's memory killer does to a writer."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def save_half(tensors: Any, path: Path) -> NoReturn:
    REAL_SAVE(tensors, path)
    os.truncate(path, 500)
    die()


def save_one(tensors: Any, path: Path) -> None:
    if any(path.parent.iterdir()):
        die()
    REAL_SAVE(tensors, path)


def write_half(path: Path, text: str) -> NoReturn:
    path.write_bytes(text[: len(text) // 2].encode())
    die()


def at_manifest(replacement: Callable[[Path, str], Any]) -> Callable[[Path, str], Any]:
    """A write_text that writes the index of the tensors' files, but not the manifest."""
    return lambda path, text: (
        replacement(path, text) if path.name == "anchor.json" else REAL_WRITE(path, text)
    )


def die_at_rename(target: str, after: bool) -> Callable[[Any, Any], None]:
    """An os.rename that dies before or after the rename to a path ending in `target`."""

    def rename(source: Any, destination: Any) -> None:
        hit = str(destination).endswith(target)
        if hit and not after:
            die()
        REAL_RENAME(source, destination)
        if hit:
            die()

    return rename


POINTS: dict[str, tuple[Any, str, Any]] = {  # name -> what is replaced by what
    "before the tensors": (artifact, "save_file", die),
    "half a file of tensors": (artifact, "save_file", save_half),
    "between two files": (artifact, "save_file", save_one),
    "before the index": (Path, "write_text", die),
    "half the index": (Path, "write_text", write_half),
    "before the hashes": (artifact, "_sha256", die),
    "before the manifest": (Path, "write_text", at_manifest(die)),
    "half the manifest": (Path, "write_text", at_manifest(write_half)),
    "before the swap": (artifact, "_swap_in", die),
    "before the old one moves": (os, "rename", die_at_rename(".old", after=False)),
    "after the old one moved": (os, "rename", die_at_rename(".old", after=True)),
    "before the new one moves": (os, "rename", die_at_rename("/anchor", after=False)),
    "after the new one moved": (os, "rename", die_at_rename("/anchor", after=True)),
}
COMPLETE = "after the new one moved"
NEVER_REACHED_WITHOUT_OLD = ("before the old one moves", "after the old one moved")


def killed_writers(root: Path) -> None:
    """For every point, in a child that dies there: write anchor 1 over anchor 0, and over none."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    artifact.MAX_FILE = SMALL
    for i, (owner, name, replacement) in enumerate(POINTS.values()):
        for old in (True, False):
            folder = root / f"{i}-{old}" / "anchor"
            if old:
                write(folder, seed=0)
            if (child := os.fork()) == 0:
                signal.alarm(30)
                setattr(owner, name, replacement)
                write(folder, seed=1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            (root / f"{i}-{old}.json").write_text(json.dumps(died))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that `killed_writers` leaves, made in a process of its own."""
    root = tmp_path_factory.mktemp("killed")
    code = f"import pathlib, test_artifact_writers as t; t.killed_writers(pathlib.Path('{root}'))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=60)
    return root


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_killed_writer_leaves_the_old_anchor_or_the_new_one(
    killed: Path, point: str, old: bool
) -> None:
    case = f"{list(POINTS).index(point)}-{old}"
    folder = killed / case / "anchor"
    reached = old or point not in NEVER_REACHED_WITHOUT_OLD
    assert json.loads((killed / f"{case}.json").read_text()) == reached, "the writer must have died"
    if point == COMPLETE or not reached:
        assert_holds(folder, 1)
    elif old:
        assert is_anchor(folder)
        assert_holds(folder, 0)
    else:
        assert not is_anchor(folder)
        assert not folder.exists()
        with pytest.raises(ValueError, match="no anchor there"):
            read_manifest(folder)
    write(folder, seed=2)
    assert_holds(folder, 2)
    assert [path.name for path in folder.parent.iterdir()] == ["anchor"], "leftovers are swept"


def test_replacing_takes_every_file_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "anchor"
    write(folder, seed=0)
    (folder / "anchor-00001-of-00002.safetensors").write_text("of an older writer")
    write(folder, seed=1)
    assert_holds(folder, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["anchor.json", "anchor.safetensors"]


def test_failed_write_keeps_the_old_anchor_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "anchor"
    write(folder, seed=0)
    for owner, name in ((artifact, "save_file"), (Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full_disk)
            with pytest.raises(OSError, match="No space"):
                write(folder, seed=1)
    assert_holds(folder, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["anchor"]


def test_files_that_stop_coming_keep_the_old_anchor_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from other ranks, one after another; here the second does not."""
    folder, terms = tmp_path / "anchor", make_terms(1)
    manifest = make_manifest(terms, seed=1)
    write(folder, seed=0)
    monkeypatch.setattr(artifact, "MAX_FILE", SMALL)

    def lost_peer() -> Iterator[Any]:
        yield next(files(terms, manifest))
        assert len(list(tmp_path.glob(".anchor.tmp-*/*.safetensors"))) == 1, "the first is there"
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        write_anchor(folder, lost_peer(), manifest)
    assert_holds(folder, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["anchor"]


def leftover(folder: Path, process: int, machine: str | None = None) -> Path:
    machine = machine or socket.gethostname()
    path = folder.with_name(f".{folder.name}.tmp-{machine}-{process}")
    path.mkdir(parents=True)
    (path / "anchor.safetensors").write_text("half")
    return path


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_only_leftovers_of_the_dead_are_swept(tmp_path: Path) -> None:
    folder = tmp_path / "anchor"
    dead = leftover(folder, dead_process())
    alive = [
        leftover(folder, os.getppid()),
        leftover(folder, dead_process(), machine="elsewhere"),
        leftover(tmp_path / "anchor2", dead_process()),
    ]
    write(folder)
    assert not dead.exists()
    assert all(path.exists() for path in alive)
    assert_holds(folder, 0)


@pytest.mark.parametrize("name", ["llama[8b]", "a*", "a b"])
def test_leftovers_of_oddly_named_folders_are_swept(tmp_path: Path, name: str) -> None:
    dead = leftover(tmp_path / name, dead_process())
    write(tmp_path / name)
    assert not dead.exists()


def test_leftover_of_a_dead_writer_with_our_process_id_is_no_obstacle(tmp_path: Path) -> None:
    """In a container process ids and the host name come again: 1 is killed, 1 starts anew."""
    folder = tmp_path / "anchor"
    leftover(folder, os.getpid())
    check_writable(folder, "daa_anchor")
    write(folder)
    assert_holds(folder, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["anchor"]


# before a run


@pytest.mark.parametrize("below", ["x", "x/y"])
def test_check_writable_names_the_key(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^daa_anchor=.*cannot write there") as caught:
        check_writable(tmp_path / "file" / below, "daa_anchor")
    assert str(tmp_path / "file" / below) in str(caught.value)


def test_check_writable_refuses_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "anchor").write_text("the user's")
    with pytest.raises(ValueError, match=r"^daa_anchor="):
        check_writable(tmp_path / "anchor", "daa_anchor")


def test_check_writable_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "anchor", "daa_anchor")
    assert not is_anchor(tmp_path / "new" / "anchor")
    assert list((tmp_path / "new").iterdir()) == []


def test_is_anchor_needs_the_manifest(tmp_path: Path) -> None:
    assert not is_anchor(tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "anchor.safetensors").write_text("")
    assert not is_anchor(tmp_path / "a")
    write(tmp_path / "a")
    assert is_anchor(tmp_path / "a")
