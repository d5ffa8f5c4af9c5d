"""A model folder's tensors read from its safetensors files piece by piece, headers first.

A file is 8 bytes of length (little endian), a JSON header of that length, and the tensors' bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

PIECE = 1 << 21  # elements that are in memory at a time
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What belongs to a model beside its weights; logs and reports of the tuning run do not.
KEPT = (
    "config.json", "generation_config.json", INDEX, "*token*", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "*.jinja", "*chat_template*", "*processor*.json", "*.py", "LICENSE*",
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its elements, row-major, are the bytes [start, end)."""

    name: str
    file: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int
    end: int

    def pieces(self) -> Iterator[bytearray]:
        """The bytes in order, PIECE elements at a time.

        Raises:
            ValueError: the file has become shorter than its header says.
        """
        step = PIECE * max(1, (self.end - self.start) // max(1, prod(self.shape)))
        with self.file.open("rb") as file:
            file.seek(self.start)
            for first in range(self.start, self.end, step):
                piece = bytearray(min(step, self.end - first))
                if file.readinto(piece) < len(piece):
                    raise ValueError(f"{self.file}: ends within {self.name}. Copy it anew.")
                yield piece

    def equals(self, other: "Stored") -> bool:
        """Whether dtype, shape and every byte are the same."""
        return (self.dtype, self.shape) == (other.dtype, other.shape) and all(
            mine == theirs for mine, theirs in zip(self.pieces(), other.pieces(), strict=True)
        )


def tensors_of(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder, file by file, in the order of their bytes. Reads headers only.

    Raises:
        ValueError: no safetensors weights there, a shard missing, a damaged file.
    """
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt"):  # checks the header against the file's length
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: cannot be read ({error}). Copy the model anew.") from error
        size, text = header_of(file)
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = [
            Stored(
                name, file, entry["dtype"], tuple(entry["shape"]),
                *(8 + size + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        ]  # fmt: skip
        tensors |= {stored.name: stored for stored in sorted(found, key=lambda s: s.start)}
    return tensors


def header_of(file: Path) -> tuple[int, bytes]:
    """Length and text of a safetensors file's JSON header, which follows 8 bytes of length."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return size, stream.read(size)


def resolve(model: str) -> Path:
    """The folder of a model named by a folder, or by its name on the hub (HF_HUB_OFFLINE holds).

    Raises:
        ValueError: neither a folder nor to be had from the hub or its cache.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", *KEPT]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{model}: no such folder, and not to be had from the hub ({type(error).__name__}). "
            "Give a folder with safetensors weights, or a name that the hub or its cache knows."
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} is a LoRA adapter, not a whole model. Merge it first: llamafactory-cli "
            f"export with adapter_name_or_path: {folder} and an export_dir."
        )
    if (folder / WEIGHTS).exists():  # before the index, as transformers does
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        others = sorted(path.name for path in folder.glob("*.bin") if "training" not in path.name)
        found = f"only {others[0]}, a pickle" if others else f"neither {WEIGHTS} nor {INDEX}"
        raise ValueError(
            f"{folder}: {found}. A model folder with safetensors weights is needed; "
            "llamafactory-cli export writes one."
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX}: damaged ({error!r}). Copy the model anew.") from error
    return [folder / name for name in names]
