"""The anchor folder: written whole or not at all, verified by SHA-256, no pickle.

    anchor.safetensors      `<param>.U` (M, R), `<param>.S` (R), `<param>.Vt` (R, N), or `<param>`;
                            above 5 GB the usual shards and anchor.safetensors.index.json
    anchor.json             the Manifest

`<param>` is the name in `model.named_parameters()` of the unwrapped model. A folder does not
depend on how many ranks wrote it.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from daa_ext.fragments import Fragment, Shape
from daa_ext.lowrank import AnchorTerm, Dense, LowRank
from daa_ext.manifest import FORMAT_VERSION, Manifest

MANIFEST, INDEX = "anchor.json", "anchor.safetensors.index.json"
PATTERN, MAX_FILE = "anchor{suffix}.safetensors", "5GB"
REBUILD = "Delete the folder and build the anchor anew (daa_stage: anchor or auto)."


def is_anchor(folder: Path) -> bool:
    """Whether `folder` holds an anchor; puts back one that a killed writer had moved aside."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)  # its writer was killed after the last rename
    elif aside.exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.rename(aside, folder)
    return (folder / MANIFEST).is_file()


def check_writable(folder: Path, key: str) -> None:
    """Raise ValueError, naming `key`, if `folder` cannot be created with files in it."""
    probe = _temporary(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        shutil.rmtree(probe, ignore_errors=True)  # of a dead process that had our number
        probe.mkdir(parents=True)
        probe.rmdir()
    except OSError as error:
        raise ValueError(
            f"{key}={folder}: cannot write there ({error}). Choose a folder that this user can "
            "create, on a file system with room."
        ) from error


def plan_files(manifest: Manifest) -> dict[str, dict[str, Shape]]:
    """{file name: {tensor name: shape}} of an anchor, the same whoever computed its tensors."""
    tensors: dict[str, Tensor] = {}
    for name, entry in manifest.tensors.items():
        shapes = {name: entry["shape"]}
        if entry["kind"] == "factors":
            (rows, columns), rank = entry["shape"], entry["rank"]
            factors = {"U": (rows, rank), "S": (rank,), "Vt": (rank, columns)}
            shapes = {f"{name}.{part}": shape for part, shape in factors.items()}
        tensors |= {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=PATTERN, max_shard_size=MAX_FILE
    )
    return {
        file: {key: tuple(tensors[key].shape) for key in keys}
        for file, keys in split.filename_to_tensors.items()
    }


def write_anchor(
    folder: Path, files: Iterable[tuple[str, Mapping[str, Tensor]]], manifest: Manifest
) -> None:
    """Write the folder under a temporary name, then rename: a folder that exists is whole.

    An anchor that is there already is replaced; until the new one is in place, the old one is
    kept. Fills in `manifest.files`.

    Args:
        files: (name, tensors) of each file of `plan_files`; asked for one after another, so that
            no more than one file's tensors need be in memory.
    """
    _sweep(folder)
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    places: dict[str, str] = {}
    try:
        for name, tensors in files:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / name
            )
            places |= dict.fromkeys(tensors, name)
            del tensors  # before the next file's come
        if len(set(places.values())) > 1:
            index = {"metadata": {}, "weight_map": places}
            (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        manifest.files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        _swap_in(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def tensors_of(name: str, term: AnchorTerm) -> dict[str, Tensor]:
    """The tensors of one parameter's anchor by the names that they have in the files."""
    if isinstance(term, LowRank):
        return {f"{name}.U": term.U_MR, f"{name}.S": term.S_R, f"{name}.Vt": term.Vt_RN}
    return {name: term.values}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ValueError: no anchor there, a damaged manifest, or a format of another version.
    """
    if not is_anchor(folder):
        raise ValueError(
            f"daa_anchor={folder}: no anchor there ({MANIFEST} is missing). Build it first with "
            "daa_stage: anchor, or let daa_stage: auto do both."
        )
    try:
        content = json.loads((folder / MANIFEST).read_text())
        version = content.get("format_version")
        if version == FORMAT_VERSION:
            return Manifest(**{item.name: content[item.name] for item in fields(Manifest)})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"daa_anchor={folder}: {MANIFEST} is damaged ({error!r}). {REBUILD}"
        ) from error
    raise ValueError(
        f"daa_anchor={folder}: format_version={version}, this daa_ext reads {FORMAT_VERSION}. "
        f"{REBUILD}"
    )


def verify_files(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Raise ValueError if a tensor file is missing, truncated or changed (SHA-256).

    Ranks that share a disk can share the work: each verifies the files of one of `parts`.
    """
    for name, expected in list(manifest.files.items())[part::parts]:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"daa_anchor={folder}: {name} is missing. {REBUILD}")
        if _sha256(path) != expected:
            raise ValueError(
                f"daa_anchor={folder}: {name} is not the file that was written (SHA-256 "
                f"differs): truncated or tampered with. {REBUILD}"
            )


class AnchorReader:
    """Reads parts of an anchor's tensors: no more than asked for comes into memory.

    Call `verify_files` first.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files: dict[str, Any] = {}  # tensor name -> the open file that holds it
        for name in manifest.files:
            if name.endswith(".safetensors"):
                file = self._opened(name)
                self._files |= dict.fromkeys(file.keys(), file)

    def flat(self, tensor: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a stored tensor in row-major order, fp32, CPU.

        Raises:
            ValueError: the files have no such tensor, although the manifest promises it.
        """
        file = self._file_of(tensor)
        stored = file.get_slice(tensor)
        shape = tuple(stored.get_shape())
        if not shape:
            return file.get_tensor(tensor).reshape(-1)[start : start + numel]
        piece = Fragment(tensor, shape, start, numel)
        if piece.numel == 0:
            return torch.empty(0)
        first, last = piece.rows
        return stored[first:last].reshape(-1)[piece.skipped : piece.skipped + numel].clone()

    def whole(self, tensor: str) -> Tensor:
        """A stored tensor, fp32, CPU."""
        return self._file_of(tensor).get_tensor(tensor)

    def is_factorized(self, name: str) -> bool:
        return self.manifest.tensors[name]["kind"] == "factors"

    def term(self, name: str) -> AnchorTerm:
        """The whole anchor of one parameter."""
        if self.is_factorized(name):
            return LowRank(*(self.whole(f"{name}.{part}") for part in ("U", "S", "Vt")))
        return Dense(self.whole(name))

    def _file_of(self, tensor: str) -> Any:
        if tensor not in self._files:
            raise ValueError(f"daa_anchor={self.folder}: no tensor {tensor}. {REBUILD}")
        return self._files[tensor]

    def _opened(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(f"daa_anchor={self.folder}: {name}: {error}. {REBUILD}") from error


def _swap_in(temporary: Path, folder: Path) -> None:
    for path in (*temporary.iterdir(), temporary):  # on the disk before the name says so
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(temporary, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def _sweep(folder: Path) -> None:
    """Remove what writers of this folder left that were killed on this machine."""
    prefix = f".{folder.name}.tmp-{socket.gethostname()}-"
    for path in folder.parent.glob(glob.escape(prefix) + "*"):
        process = path.name.removeprefix(prefix)
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
