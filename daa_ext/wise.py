"""WiSE-FT: models on the straight line from a base model to what was tuned from it (`daa wise`).

    theta(alpha) = (1 - alpha) theta_base + alpha theta_tuned,   0 <= alpha <= 1

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv:2109.01903), section 3.

The output has the tuned model's files, names, order and dtypes; only the numbers differ. So its
safetensors headers are copied and the data is streamed behind them, piece by piece: memory does
not depend on the size of the model or of a tensor.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from daa_ext import __version__
from daa_ext.stored import KEPT, Stored, header_of, resolve, tensors_of

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
RECORD = "wise.json"
console = Console()


def interpolate(
    base: Path,
    tuned: Path,
    alpha: float,
    out: Path,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the model (1 - alpha) base + alpha tuned to the new folder `out`.

    Computed in fp32 (fp64 where a tensor is), stored in the tuned model's dtype. alpha 0 gives
    the base's weights in that dtype and alpha 1 the tuned ones, both bitwise. Tensors that hold
    no floating-point numbers are copied. Configuration and tokenizer are the tuned model's.

    Args:
        base, tuned: folders with safetensors of the same names and shapes, sharded in any way.
        out: does not exist; appears when it is whole.
        advance: called with the bytes written since its last call.

    Raises:
        ValueError: see `paired`; alpha outside [0, 1]; `out` exists; numbers that are not finite.
    """
    _check_alpha(alpha)
    _check_new(out)
    pairs = paired(base, tuned)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a dead process that had our number
    temporary.mkdir(parents=True)
    try:
        for path in sorted(tuned.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in KEPT):
                shutil.copyfile(path, temporary / path.name)
        for source in dict.fromkeys(stored.file for stored, _ in pairs):
            inside = [pair for pair in pairs if pair[0].file == source]
            _write_file(temporary / source.name, source, inside, alpha, advance)
        record = {"base": str(base), "tuned": str(tuned), "alpha": alpha, "daa_ext": __version__}
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def mixed(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) base + alpha tuned in the dtype of `tuned`; bitwise an input at alpha 0 and 1."""
    if alpha == 0:  # not left to arithmetic, which turns -0.0 into 0.0
        return base.to(tuned.dtype)
    if alpha == 1:
        return tuned
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    # lerp rather than two products: a weight that tuning left alone keeps its value.
    return torch.lerp(base.to(wide), tuned.to(wide), alpha).to(tuned.dtype)


def paired(base: Path, tuned: Path) -> list[tuple[Stored, Stored]]:
    """(tuned tensor, the base's) for each tensor of the tuned model, in the order of its files.

    Raises:
        ValueError: a folder without safetensors weights, a LoRA adapter, a damaged file;
            different names, shapes or kinds of numbers (names the first).
    """
    mine, theirs = tensors_of(tuned), tensors_of(base)
    for inside, outside, folder, other in (
        (mine, theirs, tuned, base), (theirs, mine, base, tuned),
    ):  # fmt: skip
        for name in sorted(inside.keys() - outside.keys()):
            if _twin(inside, name) not in outside:
                raise ValueError(
                    f"{name} is in {folder} but not in {other}. Both must be one architecture "
                    "with the same tensors: the tuned model and the model that it was tuned from."
                )
    pairs = [
        (stored, theirs[name if name in theirs else _twin(mine, name)])
        for name, stored in mine.items()
    ]
    for stored, other_stored in pairs:
        if stored.shape != other_stored.shape:
            raise ValueError(
                f"{stored.name} has shape {other_stored.shape} in {base} and {stored.shape} in "
                f"{tuned}. Use the model that it was tuned from (resize_vocab changes shapes, too)."
            )
        if not (stored.dtype in FLOATS and other_stored.dtype in FLOATS):
            if stored.equals(other_stored):
                continue
            raise ValueError(
                f"{stored.name} ({other_stored.dtype} in {base}, {stored.dtype} in {tuned}) "
                f"differs and cannot be interpolated: only {', '.join(FLOATS)} can. Use "
                "checkpoints that are not quantized."
            )
    return pairs


def _twin(model: Mapping[str, Stored], name: str) -> str:
    """Another matrix of the model with the same content ("" if none): tied embeddings.

    A tied matrix is stored under one name or under both, as the program that saved it likes.
    """
    own = model[name]
    for other, stored in model.items():
        if other != name and len(own.shape) == 2 and stored.equals(own):
            return other
    return ""


def _write_file(
    path: Path, source: Path, pairs: list[tuple[Stored, Stored]], alpha: float,
    advance: Callable[[int], object],
) -> None:  # fmt: skip
    size, header = header_of(source)
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little") + header)
        for stored, other in pairs:
            for piece, base_piece in zip(stored.pieces(), other.pieces(), strict=True):
                if stored.dtype in FLOATS:
                    tuned_values = _numbers(piece, stored)
                    result = mixed(_numbers(base_piece, other), tuned_values, alpha)
                    _check_finite(result, path.name, f"{stored.name} in {stored.dtype}")
                    piece = result.view(torch.uint8).numpy()
                file.write(piece)
                advance(len(piece))
        file.flush()
        os.fsync(file.fileno())  # on the disk before the folder has its name


def _numbers(piece: bytearray, stored: Stored) -> Tensor:
    values = torch.frombuffer(piece, dtype=FLOATS[stored.dtype])
    _check_finite(values, str(stored.file), stored.name)
    return values


def _check_finite(values: Tensor, file: str, what: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{file}: {what} holds NaN or infinity. Use an undamaged checkpoint.")


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: allowed are 0 (the base) to 1 (the tuned model).")


def _check_new(out: Path) -> None:
    if out.exists():
        raise ValueError(f"out={out} exists. Name a new folder, or remove this one first.")


def parse_alphas(text: str) -> list[float]:
    """ "0.5", "0,0.5,1" or "0:1:0.1" (start, stop and step) as numbers.

    Raises:
        ValueError: anything else, or a number outside [0, 1].
    """
    try:
        if ":" in text:
            start, stop, step = map(float, text.split(":"))
            count = int((stop - start) / step + 1e-9)
            alphas = [round(start + i * step, 10) for i in range(count + 1)]
        else:
            alphas = [round(float(part), 10) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        alphas = []
    if not alphas:
        raise ValueError(f"alpha={text}: allowed are 0.5, 0,0.5,1 or 0:1:0.1 (start:stop:step).")
    for alpha in alphas:
        _check_alpha(alpha)
    return list(dict.fromkeys(alphas))


def wise(
    base: Annotated[str, typer.Option(help="The model before tuning: a folder or a hub name.")],
    tuned: Annotated[str, typer.Option(help="The tuned model, whole: a folder or a hub name.")],
    alpha: Annotated[str, typer.Option(help="0.5, or several: 0,0.5,1 or 0:1:0.1.")],
    out: Annotated[Path, typer.Option(help="New folder; of several, OUT/alpha-0.1 and so on.")],
) -> None:
    """Write (1 - alpha) base + alpha tuned (WiSE-FT): less forgetting without training."""
    try:
        alphas = parse_alphas(alpha)
        targets = {a: out / f"alpha-{a:.10g}" for a in alphas} if len(alphas) > 1 else {}
        targets = targets or {alphas[0]: out}
        for target in targets.values():
            _check_new(target)
        folders = resolve(base), resolve(tuned)
        total = sum(s.end - s.start for s, _ in paired(*folders)) * len(targets)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("", total=total)
            for value, target in targets.items():
                progress.update(task, description=f"alpha {value:.10g}")
                interpolate(*folders, value, target, partial(progress.advance, task))
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(1) from error
    for target in targets.values():
        console.print(str(target), highlight=False, markup=False)
