"""The `daa` command: the installation, anchors, comparisons, and what they are made with."""

import importlib
import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from daa_ext import plugin
from daa_ext.artifact import read_manifest, verify_files
from daa_ext.compare.command import compare
from daa_ext.manifest import Manifest
from daa_ext.newsqa.command import newsqa_app
from daa_ext.report import versions
from daa_ext.wise import wise

app = typer.Typer(
    help="Dynamic Anchor Annealing for LLaMA-Factory. Training itself needs no command of ours: "
    "llamafactory-cli train x.yaml with finetuning_type: daa.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
anchor_app = typer.Typer(help="Look into an anchor folder.", no_args_is_help=True)
app.add_typer(anchor_app, name="anchor")
app.add_typer(newsqa_app, name="newsqa")
app.command()(compare)
app.command()(wise)
console = Console()


@app.command()
def doctor() -> None:
    """Tell whether `finetuning_type: daa` will work here, and if not, why. Exit code 1 if not."""
    for name, found in versions().items():
        console.print(f"{name:14}{found}")
    problems = list(diagnose())
    for problem in problems:
        console.print(f"[red]problem:[/red] {problem}", highlight=False)
    if problems:
        raise typer.Exit(1)
    console.print("[green]All well:[/green] llamafactory-cli knows finetuning_type: daa.")


def diagnose() -> Iterator[str]:
    """What stands in the way, one sentence each, with the mend."""
    own = requires("daa_ext") or []
    for requirement in (Requirement(text) for text in own if "extra ==" not in text):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield f"{requirement.name} is not installed: pip install '{requirement}'."
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield (
                f"{requirement.name} {found} is not in the tested range: "
                f"pip install '{requirement}'."
            )
    yield from _mismatched_builds()
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        yield "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the plugin off: unset it."
    if not any(entry.name == "daa_ext" for entry in entry_points(group="torch.backends")):
        yield "the entry point torch.backends: daa_ext is not registered: pip install daa_ext anew."
    yield from _broken_seams()


def _mismatched_builds() -> Iterator[str]:
    """torchvision and torchaudio must be built for the torch that is installed."""
    torch_version = version("torch")
    for name in ("torchvision", "torchaudio"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # named above
        wanted = _torch_of(name)
        if wanted is not None and _minor(wanted) != _minor(torch_version):
            yield (
                f"{name} {found} is built for torch {wanted}, installed is torch {torch_version}: "
                f"pip install --no-deps '{name}=={_partner(name, torch_version)}'."
            )
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            yield f"{name} {found} does not load beside torch {torch_version}: {error}"


def _torch_of(name: str) -> str | None:
    """The torch version a package is built for: what it pins, else (torchaudio) its own."""
    for requirement in map(Requirement, requires(name) or []):
        pins = [s.version for s in requirement.specifier if s.operator == "=="]
        if requirement.name == "torch" and pins:
            return pins[0]
    return version(name) if name == "torchaudio" else None


def _partner(name: str, torch_version: str) -> str:
    """The release series of torchvision or torchaudio made for a torch 2.x."""
    minor = int(_minor(torch_version)[1])
    return f"0.{minor + 15}.*" if name == "torchvision" else f"2.{minor}.*"


def _minor(text: str) -> list[str]:
    return re.split(r"[.+]", text)[:2]


def _broken_seams() -> Iterator[str]:
    """Import the host's modules and look whether the plugin has reached them."""
    try:
        from daa_ext.stages import TRAINERS, install

        arguments = importlib.import_module("llamafactory.hparams.finetuning_args")
        plugin.check_seams()
        for stage in TRAINERS:
            install(stage)
    except Exception as error:
        yield f"LLaMA-Factory: {error}"
        return
    if "daa_stage" not in arguments.FinetuningArguments.__dataclass_fields__:
        yield (
            "the plugin is installed but did not become active: is another package's "
            "torch.backends entry point failing, or torch older than 2.5?"
        )


def _open(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except ValueError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error


@anchor_app.command()
def info(folder: Path) -> None:
    """Show where an anchor comes from and what it holds."""
    manifest = _open(folder)
    table = Table(show_header=False, title=str(folder), title_justify="left")
    size = sum(
        (folder / name).stat().st_size for name in manifest.files if (folder / name).exists()
    )
    kinds = [entry["kind"] for entry in manifest.tensors.values()]
    energies = [e["energy"] for e in manifest.tensors.values() if e["kind"] == "factors"]
    lowest = f", at least {min(energies):.1%} of the energy of each" if energies else ""
    for key, value in {
        "base model": f"{manifest.base_model} ({manifest.base_fingerprint[:12]})",
        "general data": f"{', '.join(manifest.datasets)} ({manifest.data_fingerprint[:12]})",
        "template": f"{manifest.template}, cutoff_len {manifest.cutoff_len}",
        "estimate": f"{manifest.steps} steps, {manifest.samples:,} samples, "
        f"{manifest.tokens:,} labelled tokens, {manifest.skipped_steps} steps skipped",
        "beta": str(manifest.beta),
        "norm": f"{manifest.norm:.4g}",
        "tensors": f"{kinds.count('factors')} as factors of rank <= {manifest.rank}{lowest}; "
        f"{kinds.count('dense')} dense",
        "size": f"{size / 2**20:.1f} MiB",
        "built in": ", ".join(f"{name} {s:.0f} s" for name, s in manifest.seconds.items()),
        "versions": ", ".join(f"{name} {found}" for name, found in manifest.versions.items()),
    }.items():
        table.add_row(key, value)
    console.print(table)


@anchor_app.command()
def verify(folder: Path) -> None:
    """Check every file of an anchor against its SHA-256. Exit code 1 if one differs."""
    manifest = _open(folder)
    try:
        verify_files(folder, manifest)
    except ValueError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error
    console.print(f"{folder}: {len(manifest.files)} file(s) as written.")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
