"""The journal of a build: one JSON line per finished article, on the disk as soon as it is.

    {"generation": {...}}                                      what the answers depend on
    {"digest": ..., "id": ..., "questions": [...], "attempts": [...]}   then one of these each

A line that a killed build has not finished is cut off and its article asked about again.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daa_ext.newsqa.questions import Question

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What came of an article: questions, or none and why."""

    id: str
    digest: str
    questions: list[Question]
    attempts: list[dict[str, str]]  # those that failed: answer, problem


class Journal:
    """The outcomes of a folder's build so far. Holds a lock on the file until closed.

    Args:
        generation: all that the answers depend on beside the articles.

    Raises:
        ValueError: made with another `generation` (shows the difference); damaged; in use; a
            folder with other files in it.
    """

    def __init__(self, folder: Path, generation: Mapping[str, Any]) -> None:
        path = folder / JOURNAL
        if not path.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"out={folder} exists and has no {JOURNAL}. Name a new folder, or one that an "
                "earlier build has begun."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.outcomes: dict[str, Outcome] = {}  # by the article's digest
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read(dict(generation))
        except BaseException:
            self._file.close()
            raise

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.digest] = outcome
        self._append(asdict(outcome))

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: another build is writing it. Wait for it.") from error

    def _read(self, generation: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        before = generation
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                if number == 1:
                    before = dict(row["generation"])
                    continue
                questions = [Question(**question) for question in row.pop("questions")]
                outcome = Outcome(questions=questions, **row)
            except (ValueError, TypeError, LookupError) as error:
                mend = "Remove that line; its article is asked about again."
                raise ValueError(
                    f"{self.path}:{number}: damaged ({error!r}). "
                    f"{mend if number > 1 else 'Name a new folder.'}"
                ) from error
            self.outcomes[outcome.digest] = outcome
        _compare(self.path.parent, before, generation)
        self._file.truncate(whole)
        if not whole:
            self._append({"generation": generation})

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        lines = (f"{key}={before.get(key)} there, {now.get(key)} now" for key in changed)
        raise ValueError(
            f"out={folder} was begun with other settings: {'; '.join(lines)}. Use the same to "
            "continue, or a new folder."
        )
