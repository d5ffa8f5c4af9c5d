"""Reading an anchor folder in parts, as ranks do that need no more than their own."""

from pathlib import Path

import pytest
import torch
from test_artifact import SMALL, flip, make_terms, stored, write

from daa_ext import artifact
from daa_ext.artifact import AnchorReader
from daa_ext.lowrank import LowRank


@pytest.mark.parametrize("max_file", ["5GB", SMALL])
def test_a_slice_is_the_slice_of_the_whole(
    tmp_path: Path, max_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "MAX_FILE", max_file)
    reader = AnchorReader(tmp_path / "a", write(tmp_path / "a"))
    for key, tensor in stored(make_terms()).items():
        assert torch.equal(reader.whole(key), tensor)
        total = tensor.numel()
        starts = {0, 1, 4, total // 2, max(0, total - 1), total}
        for start in (start for start in starts if start <= total):
            for numel in {0, 1, 2, 5, 31, total - start} & set(range(total - start + 1)):
                found = reader.flat(key, start, numel)
                assert (found.shape, found.dtype) == ((numel,), torch.float32)
                assert torch.equal(found, tensor.reshape(-1)[start : start + numel])
                assert not numel or found.untyped_storage().nbytes() == 4 * numel, "no whole rows"


def test_terms_are_read_as_what_they_are(tmp_path: Path) -> None:
    reader = AnchorReader(tmp_path / "a", write(tmp_path / "a"))
    for name, term in make_terms().items():
        assert reader.is_factorized(name) == isinstance(term, LowRank)
        assert torch.equal(reader.term(name).dense(), term.dense())


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_ranks_of_a_node_verify_every_file_between_them(
    tmp_path: Path, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "MAX_FILE", SMALL)
    manifest = write(tmp_path / "a")
    for name in manifest.files:
        flip(tmp_path / "a" / name, 0)
        errors = []
        for part in range(parts):
            try:
                artifact.verify_files(tmp_path / "a", manifest, part, parts)
            except ValueError as error:
                errors.append(str(error))
        assert len(errors) == 1
        assert f" {name} is not the file that was written" in errors[0]
        flip(tmp_path / "a" / name, 0)
