"""daa wise: every weight against two products in float64, the ends bitwise, nothing by halves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from daa_ext import stored as stored_module
from daa_ext.stored import resolve
from daa_ext.wise import interpolate, mixed, parse_alphas, wise

app = typer.Typer()
app.command()(wise)

# Awkward: a scalar, no elements, one row, three dimensions, odd sizes.
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "empty": (0, 3), "norm": (7,), "row": (1, 11), "matrix": (13, 5),
    "experts": (3, 2, 5),
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def make_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 0) -> Path:
    """A model folder; `shards` > 0: dealt out to so many files with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"from": folder.name}))
    if not shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = [t.reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


def assert_line(out: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], alpha: float) -> None:
    """`out` is (1 - alpha) base + alpha tuned, computed slowly."""
    found = load(out)
    assert found.keys() == tuned.keys()
    for name, tensor in found.items():
        wanted = (1 - alpha) * base[name].double() + alpha * tuned[name].double()
        assert tensor.dtype == tuned[name].dtype, name
        torch.testing.assert_close(tensor, wanted.to(tensor.dtype), msg=name)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", make_tensors(0))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return save(tmp_path / "tuned", make_tensors(1))


@pytest.mark.parametrize("piece", [1, 4, 1 << 22])
@pytest.mark.parametrize("shards", [(0, 0), (3, 0), (0, 2), (2, 5)])
def test_the_line_however_it_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: tuple[int, int], piece: int
) -> None:
    monkeypatch.setattr(stored_module, "PIECE", piece)
    a, b = make_tensors(0), make_tensors(1)
    out, tuned = tmp_path / "out", save(tmp_path / "b", b, shards[1])
    interpolate(save(tmp_path / "a", a, shards[0]), tuned, 0.3, out)
    assert_line(out, a, b, 0.3)
    files = {path.name for path in out.iterdir()}
    assert files == {path.name for path in tuned.iterdir()} | {"wise.json"}
    if shards[1]:
        assert (out / INDEX).read_bytes() == (tuned / INDEX).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_the_tuned_ones(
    tmp_path: Path, dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    a, b = make_tensors(0, base_dtype), make_tensors(1, dtype)
    folders = save(tmp_path / "a", a), save(tmp_path / "b", b, 2)
    interpolate(*folders, 0.7, tmp_path / "out")
    assert_line(tmp_path / "out", a, b, 0.7)
    interpolate(*folders, 0, tmp_path / "zero")
    interpolate(*folders, 1, tmp_path / "one")
    for name in SHAPES:
        assert same_bits(load(tmp_path / "zero")[name], a[name].to(dtype))
        assert same_bits(load(tmp_path / "one")[name], b[name])


def test_ends_are_the_inputs_bitwise_and_the_middle_is_neither(
    tmp_path: Path, base: Path, tuned: Path
) -> None:
    for folder, values in ((base, [-0.0, 1e-45, 3.0]), (tuned, [0.0, -0.0, -1e-45])):
        special = load(folder) | {"special": torch.tensor(values)}
        save_file(special, folder / "model.safetensors", metadata={"format": "pt"})
    for alpha in (0, 1, 0.5):
        interpolate(base, tuned, alpha, tmp_path / f"{alpha}")
    data = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("0", "1")}
    assert data["1"] == (tuned / "model.safetensors").read_bytes(), "the file, header and all"
    assert data["0"] == (base / "model.safetensors").read_bytes()
    middle = load(tmp_path / "0.5")
    assert all(
        not torch.equal(middle[n], load(f)[n]) for f in (base, tuned) for n in ("matrix", "norm")
    )


def test_a_weight_that_tuning_left_alone_keeps_its_value() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    two_products = (1 - 0.3) * values + 0.3 * values
    assert torch.equal(mixed(values, values, 0.3), values)
    assert not torch.equal(two_products, values), "the obvious formula would have moved some"


def test_half_precision_is_mixed_in_single() -> None:
    """One rounding at the end; products in bf16 round three times."""
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = (0.4 * a.double() + 0.6 * b.double()).bfloat16()
    assert (mixed(a, b, 0.6) != wanted).sum() < 10
    assert (0.4 * a + 0.6 * b != wanted).sum() > 100


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The peak of a fresh process after a small model and after one 400 times as large, in which
    one tensor is most of it and has a single row.
    """
    for name, numel in (("small", 1 << 16), ("large", 25 << 20)):
        folders = (tmp_path / f"{name}-a", tmp_path / f"{name}-b")
        for value, folder in enumerate(folders):
            save(folder, {"w": torch.full((1, numel), float(value)), "v": torch.zeros(numel // 8)})
    code = f"""
import resource
from pathlib import Path
from daa_ext import stored
from daa_ext.wise import interpolate
stored.PIECE = 1 << 16
def peak(name):
    folder = Path({str(tmp_path)!r})
    interpolate(folder / f"{{name}}-a", folder / f"{{name}}-b", 0.5, folder / f"{{name}}-out")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small = peak("small")
print(peak("large") - small)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10, "MiB more for a model of 113 MiB"
    assert load(tmp_path / "large-out")["w"].unique().tolist() == [0.5]


def test_a_model_of_transformers_and_its_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    tuned = make_model(tmp_path / "tuned", seed=1)
    for name in ("trainer_state.json", "training_args.bin", "all_results.json"):
        (tuned / name).write_text("{}")
    (tuned / "checkpoint-10").mkdir()
    interpolate(tiny_model, tuned, 0.25, tmp_path / "out")
    a, b, c = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tiny_model, tuned, tmp_path / "out")
    )
    for name in c:
        torch.testing.assert_close(c[name], torch.lerp(a[name], b[name], 0.25))
    AutoTokenizer.from_pretrained(tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "wise.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_bytes() == (tuned / "config.json").read_bytes()
    assert json.loads((tmp_path / "out" / "wise.json").read_text())["alpha"] == 0.25


@pytest.mark.parametrize("stored_twice", ["base", "tuned", "neither", "both"])
def test_tied_matrices_may_be_stored_once_or_twice(tmp_path: Path, stored_twice: str) -> None:
    embedding = {name: torch.randn(9, 4) for name in ("base", "tuned")}
    folders = []
    for name, values in embedding.items():
        tensors = {"embed": values, "norm": torch.ones(4)}
        if stored_twice in (name, "both"):
            tensors["lm_head"] = values.clone()
        folders.append(save(tmp_path / name, tensors))
    interpolate(*folders, 0.5, tmp_path / "out")
    found = load(tmp_path / "out")
    assert ("lm_head" in found) == (stored_twice in ("tuned", "both"))
    for name in found.keys() - {"norm"}:
        torch.testing.assert_close(found[name], torch.lerp(*embedding.values(), 0.5))


def test_a_head_of_its_own_is_no_tied_one(tmp_path: Path) -> None:
    embedding = torch.randn(9, 4)
    base = save(tmp_path / "base", {"embed": embedding})
    tuned = save(tmp_path / "tuned", {"embed": embedding, "lm_head": embedding + 1})
    with pytest.raises(ValueError, match=r"lm_head is in .*tuned but not in .*base"):
        interpolate(base, tuned, 0.5, tmp_path / "out")


def test_integers_are_copied_if_equal(tmp_path: Path) -> None:
    whole = {"w": torch.ones(2), "ids": torch.arange(5), "mask": torch.tensor([True, False])}
    base, tuned = save(tmp_path / "a", whole), save(tmp_path / "b", whole)
    interpolate(base, tuned, 0.5, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["ids"], torch.arange(5))
    other = save(tmp_path / "c", whole | {"ids": torch.arange(5) + 1})
    with pytest.raises(ValueError, match=r"ids \(I64 in .*, I64 in .*\) differs and cannot be"):
        interpolate(base, other, 0.5, tmp_path / "out2")
    quantized = save(tmp_path / "d", whole | {"w": torch.ones(2).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"w \(F32 in .*, F8_E4M3 in .*only F64, F32, F16, BF16"):
        interpolate(base, quantized, 0.5, tmp_path / "out3")


def assert_refused(tmp_path: Path, base: Path, tuned: Path, message: str, alpha: float = 1) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        interpolate(base, tuned, alpha, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_the_line(tmp_path: Path, base: Path, tuned: Path, alpha: float) -> None:
    assert_refused(tmp_path, base, tuned, rf"alpha={alpha}: allowed are 0 .* to 1", alpha)


def test_names_and_shapes_must_agree(tmp_path: Path, base: Path) -> None:
    more = save(tmp_path / "more", make_tensors(1) | {"zz": torch.ones(1), "extra": torch.ones(1)})
    assert_refused(tmp_path, base, more, r"extra is in .*more but not in .*base.* same tensors")
    assert_refused(tmp_path, more, base, r"extra is in .*more but not in .*base.* same tensors")
    wide = save(tmp_path / "wide", make_tensors(1) | {"matrix": torch.ones(14, 5)})
    shapes = r"matrix has shape \(13, 5\) in .*base and \(14, 5\) in .*wide.*resize_vocab"
    assert_refused(tmp_path, base, wide, shapes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_numbers_that_are_none(tmp_path: Path, bad: float, side: str, alpha: float) -> None:
    folders = []
    for name in ("base", "tuned"):
        tensors = make_tensors(0)
        tensors["row"][0, 10] = bad if name == side else 1.0
        folders.append(save(tmp_path / name, tensors, 2))
    message = rf"{side}.*safetensors: row holds NaN or infinity"
    assert_refused(tmp_path, *folders, message, alpha)


def test_a_number_that_the_tuned_dtype_cannot_hold(tmp_path: Path) -> None:
    base = save(tmp_path / "a", {"w": torch.tensor([1e6])})
    tuned = save(tmp_path / "b", {"w": torch.tensor([1.0]).half()})
    assert_refused(tmp_path, base, tuned, "w in F16 holds NaN or infinity", alpha=0.5)


def test_folders_that_are_no_models(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    assert_refused(tmp_path, base, folder, r"x: neither model.safetensors nor model.safetensors.i")
    (folder / "training_args.bin").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert_refused(tmp_path, folder, base, r"x: only pytorch_model.bin, a pickle.*cli export write")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert_refused(tmp_path, base, folder, r"x is a LoRA adapter.*Merge it first.*-cli export with")


def test_damaged_files(tmp_path: Path, base: Path) -> None:
    tuned = save(tmp_path / "tuned", make_tensors(1), 2)
    last = sorted(tuned.glob("*.safetensors"))[1]
    last.write_bytes(last.read_bytes()[:-1])
    assert_refused(tmp_path, base, tuned, r"model-00002-of-00002.safetensors: cannot be read \(")
    last.unlink()
    assert_refused(tmp_path, base, tuned, r"model-00002-of-00002.safetensors: cannot be read \(")
    (tuned / INDEX).write_text("{")
    assert_refused(tmp_path, base, tuned, r"index.json: damaged")


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, base: Path, tuned: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert_refused(tmp_path, base, tuned, r"out=.*out exists. Name a new folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.5", [0.5]),
        ("0,0.1,1", [0, 0.1, 1]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("1,1.0, 0", [1, 0]),
    ],
)
def test_alphas(text: str, numbers: list[float]) -> None:
    assert parse_alphas(text) == numbers


@pytest.mark.parametrize("text", ["", "half", "0:1", "0:1:0", "0:1:-0.1", "0,,1", "0:1:x"])
def test_alphas_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=rf"alpha={text}: allowed are 0.5, 0,0.5,1 or 0:1:0.1"):
        parse_alphas(text)


def command(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, " ".join(done.output.split())


def test_the_command_writes_a_curve(tmp_path: Path, base: Path, tuned: Path) -> None:
    words = ("--base", base, "--tuned", tuned, "--out", tmp_path / "curve")
    assert command(*words, "--alpha", "0:1:0.5")[0] == 0
    for name, alpha in (("alpha-0", 0), ("alpha-0.5", 0.5), ("alpha-1", 1)):
        assert_line(tmp_path / "curve" / name, load(base), load(tuned), alpha)
    shutil.rmtree(tmp_path / "curve" / "alpha-0")
    code, output = command(*words, "--alpha", "0,1")
    assert code == 1
    assert "alpha-1 exists" in output.replace(" ", "").replace("exists", " exists")
    assert not (tmp_path / "curve" / "alpha-0").exists(), "nothing is done by halves"
    assert command(*words[:-1], tmp_path / "one", "--alpha", "0.3")[0] == 0
    assert_line(tmp_path / "one", load(base), load(tuned), 0.3)


def test_the_command_says_what_is_wrong(tmp_path: Path, base: Path) -> None:
    code, output = command("--base", base, "--tuned", base, "--alpha", "2", "--out", tmp_path / "o")
    assert (code, output) == (1, "alpha=2.0: allowed are 0 (the base) to 1 (the tuned model).")


def test_a_name_that_neither_the_disk_nor_the_hub_knows(tiny_model: Path) -> None:
    assert resolve(str(tiny_model)) == tiny_model
    for name in ("nobody/no-such-model", "./no/such/folder", "no such name"):
        with pytest.raises(ValueError, match=f"{name}: no such folder, and not to be had from the"):
            resolve(name)
