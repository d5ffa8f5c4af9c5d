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
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from daa_ext.lowrank import AnchorTerm, Dense, LowRank
from daa_ext.manifest import FORMAT_VERSION, Manifest

CPU = torch.device("cpu")
MANIFEST = "anchor.json"
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


def write_anchor(folder: Path, terms: Mapping[str, AnchorTerm], manifest: Manifest) -> None:
    """Write the folder under a temporary name, then rename: a folder that exists is whole.

    An anchor that is there already is replaced; until the new one is in place, the old one is
    kept. Fills in `manifest.files`.
    """
    _sweep(folder)
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_torch_state_dict(
            _state_dict(terms), temporary, filename_pattern="anchor{suffix}.safetensors"
        )
        manifest.files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        _swap_in(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise ValueError if a tensor file is missing, truncated or changed (SHA-256)."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"daa_anchor={folder}: {name} is missing. {REBUILD}")
        if _sha256(path) != expected:
            raise ValueError(
                f"daa_anchor={folder}: {name} is not the file that was written (SHA-256 "
                f"differs): truncated or tampered with. {REBUILD}"
            )


def read_terms(
    folder: Path, manifest: Manifest, device: torch.device = CPU
) -> dict[str, AnchorTerm]:
    """The anchor of every parameter, fp32, on `device`. Call `verify_files` first.

    Raises:
        ValueError: a tensor that the manifest promises is not in the files.
    """
    where = str(device) if device.type != "cpu" else "cpu"  # accelerate's ranks say cpu:0
    tensors: dict[str, Tensor] = {}
    for name in manifest.files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt", device=where) as file:
                    tensors.update({key: file.get_tensor(key) for key in list(file.keys())})
            except SafetensorError as error:
                raise ValueError(f"daa_anchor={folder}: {name}: {error}. {REBUILD}") from error
    terms: dict[str, AnchorTerm] = {}
    for name, entry in manifest.tensors.items():
        try:
            if entry["kind"] == "factors":
                terms[name] = LowRank(*(tensors[f"{name}.{part}"] for part in ("U", "S", "Vt")))
            else:
                terms[name] = Dense(tensors[name])
        except KeyError as error:
            raise ValueError(f"daa_anchor={folder}: no tensor {error}. {REBUILD}") from error
    return terms


def _state_dict(terms: Mapping[str, AnchorTerm]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, term in terms.items():
        if isinstance(term, LowRank):
            parts = {"U": term.U_MR, "S": term.S_R, "Vt": term.Vt_RN}
            tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in parts.items()}
        else:
            tensors[name] = term.values.cpu()
    return tensors


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
