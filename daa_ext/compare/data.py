"""The data folder of a comparison: one dataset_info.json that all its YAMLs share.

Subsets and shares of general data are LLaMA-Factory's own `num_samples`, so nothing of the user's
data is copied; only the thinned sets of the curves are files of their own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]  # of dataset_info.json
HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url")


class DataFolder:
    """Entries of the user's dataset_info.json, by the names that the comparison gives them.

    Raises:
        ValueError: the folder, the data set or its file does not exist.
    """

    def __init__(self, dataset_dir: str) -> None:
        self.source = Path(dataset_dir)
        self.entries: dict[str, Entry] = {}
        try:
            self.known: dict[str, Entry] = json.loads(
                (self.source / "dataset_info.json").read_text()
            )
        except FileNotFoundError:
            raise ValueError(
                f"dataset_dir={dataset_dir} holds no dataset_info.json: name the folder that "
                "LLaMA-Factory would read."
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.source}/dataset_info.json is not JSON: {error}") from error

    def add(self, name: str, dataset: str, samples: int | None) -> None:
        """`name` stands for `samples` rows of the user's `dataset` (None: all)."""
        entry = dict(self._entry(dataset))
        if "file_name" in entry:
            entry["file_name"] = str(self._path(dataset).absolute())
        if samples is not None:
            entry["num_samples"] = samples
        self.entries[name] = entry

    def add_file(self, name: str, path: Path) -> None:
        self.entries[name] = {"file_name": str(path.absolute())}

    def rows(self, dataset: str, ceiling: int | None, place: str) -> int:
        """How many rows `dataset` gives, at most `ceiling`."""
        entry = self._entry(dataset)
        if "file_name" not in entry:
            if ceiling is None:
                raise ValueError(
                    f"{place}.max_samples is not set: {dataset} is not a local file, so its rows "
                    "cannot be counted. Set it."
                )
            return ceiling
        path = self._path(dataset)
        count = sum(1 for _ in _rows_of(path)) if path.is_file() else ceiling
        if not count:
            raise ValueError(f"{place}.dataset={dataset}: {path} has no rows that can be counted.")
        return min(count, ceiling or count)

    def files(self, datasets: Sequence[str]) -> list[Path]:
        """The local files behind the user's data sets."""
        local = (name for name in datasets if "file_name" in self._entry(name))
        return [self._path(name) for name in local]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset_info.json").write_text(json.dumps(self.entries, indent=1) + "\n")

    def _entry(self, dataset: str) -> Entry:
        if dataset not in self.known:
            raise ValueError(
                f"dataset={dataset} is not in {self.source}/dataset_info.json: one of "
                f"{', '.join(sorted(self.known))}."
            )
        entry = self.known[dataset]
        if "file_name" not in entry and not any(key in entry for key in HUB_KEYS):
            raise ValueError(f"dataset={dataset}: its entry names neither a file nor a hub.")
        return entry

    def _path(self, dataset: str) -> Path:
        path = self.source / self.known[dataset]["file_name"]
        if not path.exists():
            raise ValueError(f"dataset={dataset}: {path} does not exist.")
        return path


def _rows_of(path: Path) -> Sequence[Any]:
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":  # str.splitlines would also cut at U+2028 inside a string
        return [line for line in text.split("\n") if line.strip()]
    return ()


def evenly(rows: Sequence[Any], count: int | None) -> list[Any]:
    """At most `count` of the rows, evenly spaced, the same ones every time."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def write_thinned(source: Path, count: int | None, target: Path) -> None:
    """Write `count` evenly spaced rows of a jsonl file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(evenly(_rows_of(source), count)) + "\n")


def fingerprint_files(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file, by path."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def fingerprint_model(model: str) -> Mapping[str, Any]:
    """What tells a model folder from another one, cheap: its config, its weights' sizes and ends.

    A hub name is its own fingerprint.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    found: dict[str, Any] = {"name": model}
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest = hashlib.sha256(head + file.read()).hexdigest()
        found[path.name] = [path.stat().st_size, digest]
    return found
