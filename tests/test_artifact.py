"""The anchor folder: whole or not there, and every damage named."""

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from daa_ext import artifact
from daa_ext.artifact import AnchorReader, plan_files, read_manifest, tensors_of, write_anchor
from daa_ext.lowrank import AnchorTerm, Dense, LowRank
from daa_ext.manifest import Manifest, anchor_bytes, describe, verify_model

Terms = dict[str, AnchorTerm]
SMALL = "0.5KB"  # a shard size of 500 bytes: the anchor of this test takes several files


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(m: int, rank: int, n: int, seed: int) -> LowRank:
    return LowRank(noise(m, rank, seed=seed), noise(rank, seed=seed), noise(rank, n, seed=seed))


def make_terms(seed: int = 0) -> Terms:
    """Factors (tall and wide), dense terms of every awkward shape, names with odd characters."""
    return {
        "model.layers.0.q.weight": low_rank(40, 3, 30, seed),
        "model.layers.10.q.weight": low_rank(20, 2, 60, seed),
        "lm_head.weight": Dense(noise(4, 3, seed=seed)),
        "Odd name/\u00e4.U": Dense(noise(5, seed=seed)),
        "scalar": Dense(noise(seed=seed)),
        "one.one": Dense(noise(1, 1, seed=seed)),
        "cube": Dense(noise(2, 3, 4, seed=seed)),
        "empty": Dense(noise(0, 4)),
    }


def shape_of(term: AnchorTerm) -> tuple[int, ...]:
    if isinstance(term, LowRank):
        return (term.U_MR.shape[0], term.Vt_RN.shape[1])
    return tuple(term.values.shape)


def make_manifest(terms: Terms, **changes: Any) -> Manifest:
    content: dict[str, Any] = {
        "base_model": "models/tiny", "base_fingerprint": "ab" * 32, "datasets": ["general"],
        "data_fingerprint": "cd" * 32, "template": None, "cutoff_len": 64, "host_stage": "sft",
        "steps": 3, "skipped_steps": 0, "samples": 24, "tokens": 500, "beta": 0.999, "rank": 3,
        "seed": 42, "norm": 1.5, "seconds": {"estimate": 1.0, "factorize": 0.5},
        "versions": {"torch": "2"},
        "tensors": {name: describe(term, shape_of(term), 0.9) for name, term in terms.items()},
    }  # fmt: skip
    return Manifest(**content | changes)


def stored(terms: Terms) -> dict[str, Tensor]:
    """All tensors of an anchor by the names that they have in the files."""
    return {key: t for name, term in terms.items() for key, t in tensors_of(name, term).items()}


def files(terms: Terms, manifest: Manifest) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for file, shapes in plan_files(manifest).items():
        yield file, {key: stored(terms)[key] for key in shapes}


def write(folder: Path, seed: int = 0) -> Manifest:
    terms = make_terms(seed)
    manifest = make_manifest(terms, seed=seed)
    write_anchor(folder, files(terms, manifest), manifest)
    return manifest


def read_all(folder: Path) -> Terms:
    manifest = read_manifest(folder)
    artifact.verify_files(folder, manifest)
    reader = AnchorReader(folder, manifest)
    return {name: reader.term(name) for name in manifest.tensors}


def assert_holds(folder: Path, seed: int) -> None:
    """The folder is the whole anchor that `write(folder, seed)` wrote, bit by bit."""
    found, wanted = stored(read_all(folder)), stored(make_terms(seed))
    assert read_manifest(folder).seed == seed
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "an.chor"
    written = write(folder)
    assert_holds(folder, 0)
    assert asdict(read_manifest(folder)) == asdict(written)
    assert list(written.files) == ["anchor.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["an.chor"], "nothing beside it"


def test_tensors_are_named_by_parameter_and_manifest_describes_them(tmp_path: Path) -> None:
    write(tmp_path / "a")
    keys = load_file(tmp_path / "a" / "anchor.safetensors").keys()
    dense = {"lm_head.weight", "Odd name/\u00e4.U", "scalar", "one.one", "cube", "empty"}
    factors = {f"model.layers.{i}.q.weight.{part}" for i in (0, 10) for part in ("U", "S", "Vt")}
    assert keys == dense | factors
    content = json.loads((tmp_path / "a" / "anchor.json").read_text())
    assert content["format_version"] == 1
    assert len(content["files"]["anchor.safetensors"]) == 64
    term = make_terms()["model.layers.0.q.weight"]
    assert content["tensors"]["model.layers.0.q.weight"] == {
        "shape": [40, 30], "kind": "factors", "rank": 3, "energy": 0.9, "norm": term.norm(),
    }  # fmt: skip
    assert content["tensors"]["scalar"]["shape"] == []
    assert content["tensors"]["scalar"]["rank"] is None


def test_digest_depends_on_the_tensors_alone(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", seed=1)
    assert first.digest == again.digest != other.digest


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "MAX_FILE", SMALL)
    written = sorted(write(tmp_path / "a").files)
    assert written[0].startswith("anchor-00001-of-0000")
    assert written[-1] == "anchor.safetensors.index.json"
    assert len(written) > 3
    assert_holds(tmp_path / "a", 0)
    index = json.loads((tmp_path / "a" / written[-1]).read_text())
    places = {key: n for n in written[:-1] for key in load_file(tmp_path / "a" / n)}
    assert index["weight_map"] == places
    assert places.keys() == stored(make_terms()).keys()
    (tmp_path / "a" / written[1]).unlink()
    with pytest.raises(ValueError, match=f"{written[1]} is missing"):
        artifact.verify_files(tmp_path / "a", read_manifest(tmp_path / "a"))


def test_files_are_planned_from_the_manifest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(make_terms())
    shapes = {key: tuple(tensor.shape) for key, tensor in stored(make_terms()).items()}
    assert plan_files(manifest) == {"anchor.safetensors": shapes}
    monkeypatch.setattr(artifact, "MAX_FILE", SMALL)
    plan = plan_files(manifest)
    assert {key: shape for part in plan.values() for key, shape in part.items()} == shapes
    assert sum(len(part) for part in plan.values()) == len(shapes), "each tensor in one file"
    for part in plan.values():
        total = sum(4 * torch.Size(shape).numel() for shape in part.values())
        assert total <= 500 or len(part) == 1
    read = Manifest(**json.loads(json.dumps(asdict(manifest))))
    assert plan_files(read) == plan


def test_only_one_file_of_tensors_is_alive_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "MAX_FILE", SMALL)
    terms = make_terms()
    manifest = make_manifest(terms)
    alive: list[weakref.ref[Tensor]] = []

    def copies() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for file, tensors in files(terms, manifest):
            assert not [ref for ref in alive if ref() is not None], f"before {file}"
            yield file, {key: remembered(tensor.clone()) for key, tensor in tensors.items()}

    def remembered(tensor: Tensor) -> Tensor:
        alive.append(weakref.ref(tensor))
        return tensor

    write_anchor(tmp_path / "a", copies(), manifest)
    assert len(alive) == len(stored(terms))


def test_bytes_are_those_of_the_tensors() -> None:
    terms = make_terms()
    wanted = sum(term.nbytes for term in terms.values())
    assert anchor_bytes(make_manifest(terms)) == wanted


# damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(path: Path, key: str) -> None:
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no anchor there"),
    "no manifest": (lambda f: (f / "anchor.json").unlink(), "no anchor there"),
    "half a manifest": (lambda f: cut(f / "anchor.json", 300), "anchor.json is damaged"),
    "empty manifest": (lambda f: cut(f / "anchor.json", 0), "anchor.json is damaged"),
    "no JSON object": (lambda f: (f / "anchor.json").write_text("[1]"), "anchor.json is damaged"),
    "no text": (lambda f: (f / "anchor.json").write_bytes(b"\xff\xfe"), "anchor.json is damaged"),
    "field gone": (lambda f: drop(f / "anchor.json", "steps"), "anchor.json is damaged.*steps"),
    "version gone": (lambda f: drop(f / "anchor.json", "format_version"), "format_version=None"),
    "other version": (lambda f: edit(f / "anchor.json", format_version=2), "format_version=2.* 1"),
    "no tensors": (lambda f: (f / "anchor.safetensors").unlink(), "anchor.safetensors is missing"),
    "last byte": (lambda f: flip(f / "anchor.safetensors", -1), "SHA-256"),
    "first byte": (lambda f: flip(f / "anchor.safetensors", 0), "SHA-256"),
    "half the tensors": (lambda f: cut(f / "anchor.safetensors", 999), "SHA-256"),
    "empty tensors": (lambda f: cut(f / "anchor.safetensors", 0), "SHA-256"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_an_error_that_names_folder_and_mend(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    write(tmp_path / "a")
    read_all(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as caught:
        read_all(tmp_path / "a")
    assert f"daa_anchor={tmp_path / 'a'}" in str(caught.value)
    assert "anew" in str(caught.value) or "Build it first" in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "lacks a tensor"])
def test_unverified_reading_never_returns_less_than_promised(tmp_path: Path, damage: str) -> None:
    manifest = write(tmp_path / "a")
    if damage == "truncated":
        cut(tmp_path / "a" / "anchor.safetensors", 999)
    else:
        manifest.tensors["new.weight"] = {"kind": "dense", "shape": [1]}
    for read in (AnchorReader.term, AnchorReader.whole, lambda r, name: r.flat(name, 0, 1)):
        with pytest.raises(ValueError, match=r"daa_anchor=.*anew"):
            read(AnchorReader(tmp_path / "a", manifest), "new.weight")


# the model it was made for


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: shape_of(term) for name, term in make_terms().items()}


def verify(change: Callable[[dict[str, tuple[int, ...]]], Any], fingerprint: str) -> None:
    here = shapes()
    change(here)
    verify_model(Path("anchors/a"), make_manifest(make_terms()), here, fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), "1 parameters are in the anchor .* lm_head.weight"),
        (lambda s: s.update({"x": (1,), "y": (2,)}), "2 parameters train but .* such as x"),
        (lambda s: s.update({"lm_head.weight": (3, 4)}), r"lm_head.weight .*\(4, 3\).*\(3, 4\)"),
        (lambda s: s.update({"scalar": (1,)}), r"scalar has shape \(\) there and \(1,\) here"),
        (lambda s: s.update({"a": s.pop("scalar")}), "1 parameters train but .* such as a"),
    ],
)
def test_another_model_is_refused(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        verify(change, "ab" * 32)
    assert str(caught.value).startswith("daa_anchor=anchors/a was made for base model models/tiny")


def test_other_weights_are_refused_and_the_same_pass() -> None:
    verify(lambda s: None, "ab" * 32)
    with pytest.raises(ValueError, match="fingerprint abababababab there, efefefefefef here"):
        verify(lambda s: None, "ef" * 32)
