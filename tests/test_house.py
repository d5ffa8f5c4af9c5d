"""The house rules that no linter knows: which module may import which, and what an import costs."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import daa_ext

PACKAGE = Path(daa_ext.__file__).parent
# The ladder of daa_ext/__init__.py, lowest floor first. A module imports from lower floors only.
LADDER: list[set[str]] = [
    {"schedule", "blend", "correction", "lowrank", "fingerprint", "fragments", "reweight", "noise"},
    {"parts"},
    {"keys", "ranks", "mends", "stored", "flow_cache"},
    {"config", "manifest", "method_config"},
    {"artifact"},
    {"layout", "gathered", "factorize", "retention"},
    {"zero", "estimator", "resident", "steered"},
    {"start", "engine", "weights"},
    {"anchored", "l2_init"},
    {"report"},
    {"checkpoint", "guard", "ds_config", "passes"},
    {"trainer", "reweight_trainer", "osft_trainer"},
    {"steered_trainer", "anchor_trainer", "card_trainer"},
    {"start_trainer"},
    {"anneal_trainer", "l2_trainer", "flow_trainer"},
    {"methods"},
    {"stages"},
    {"plugin"},
    {"wise", "tasks"},
    {"compare", "newsqa"},
    {"cli"},
]
# The floors of the packages that are one module above: each with a ladder of its own.
INSIDE: dict[str, list[set[str]]] = {
    "compare": [
        {"methods", "data", "stats", "process", "rows", "host", "host_template", "likelihood"},
        {"harness", "encoding", "experiment"},
        {"scoring", "reading", "runs"},
        {"score", "plan", "progress", "table"},
        {"making", "summary"},
        {"campaign", "figures"},
        {"report"},
        {"command"},
    ],
    "tasks": [{"documents"}],
    "newsqa": [
        {"articles"},
        {"questions"},
        {"generate", "journal", "files"},
        {"build"},
        {"command"},
    ],
}
GROUND = sorted(LADDER[0] | LADDER[1])
# All that maths may import. Whatever reads files, talks to ranks or names a host is not here.
GROUND_MAY_IMPORT = {"collections.abc", "dataclasses", "hashlib", "math", "torch", "typing"}
HOSTS = {"llamafactory", "transformers", "accelerate", "deepspeed", "datasets", "peft", "trl"}
BEHIND_TORCH = re.compile(
    r"\btorch\.(distributed|save|load)\b|\bopen\(|\.(read|write)_(text|bytes)\("
)
ZERO_INTERNALS = (
    "averaged_gradients", "ds_tensor", "ds_shape", "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups", "round_robin_bit16",
)  # fmt: skip
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
ALL = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem != "__init__"
)


def source(module: str) -> str:
    """The text of `module`, or of package.module, or of a package's __init__."""
    path = PACKAGE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="ascii")


def imports(text: str) -> Iterator[str]:
    """Full names of all that is imported, at module level, in functions, for type checking."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(module: str) -> set[str]:
    """The modules of daa_ext that `module` imports, a package counting as one."""
    names = (name.split(".") for name in imports(source(module)))
    known = {*MODULES, *INSIDE} - {module.split(".")[0]}
    return {name[1] for name in names if name[0] == "daa_ext" and len(name) > 1} & known


def siblings(package: str, module: str) -> set[str]:
    """The modules of `package` that package.module imports."""
    names = (name.split(".") for name in imports(source(f"{package}.{module}")))
    found = {name[2] for name in names if name[:2] == ["daa_ext", package] and len(name) > 2}
    return found & {name.partition(".")[2] for name in ALL}


def roots(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source(module))}


def floor(module: str, ladder: list[set[str]] = LADDER) -> int:
    return next(i for i, modules in enumerate(ladder) if module.split(".")[0] in modules)


def test_every_module_stands_on_one_floor() -> None:
    listed = [module for modules in LADDER for module in modules]
    assert len(listed) == len(set(listed))
    assert set(listed) == {*MODULES, *INSIDE}
    for package, ladder in INSIDE.items():
        inside = [module for modules in ladder for module in modules]
        assert len(inside) == len(set(inside))
        assert {f"{package}.{module}" for module in inside} == {
            name for name in ALL if name.startswith(f"{package}.")
        }


@pytest.mark.parametrize(
    ("package", "module"), [tuple(name.split(".")) for name in ALL if "." in name]
)
def test_imports_inside_a_package_go_downwards(package: str, module: str) -> None:
    ladder = INSIDE[package]
    above = {s for s in siblings(package, module) if floor(s, ladder) >= floor(module, ladder)}
    assert not above, f"{package}.{module} imports {above}"


@pytest.mark.parametrize("module", ALL)
def test_imports_go_downwards(module: str) -> None:
    above = {other for other in own(module) if floor(other) >= floor(module)}
    assert not above, f"{module} stands on floor {floor(module)} and imports {above}"


def test_the_import_reader_sees_what_is_there() -> None:
    """Without this the test above would pass on a reader that finds nothing."""
    assert {"blend", "correction", "layout", "resident", "schedule"} <= own("anchored")
    assert "anchored" in own("report")
    assert "wise" in own("compare.making")
    assert siblings("newsqa", "journal") == {"questions"}
    assert {"stages", "config"} <= own("plugin"), "imports inside functions count"
    text = "def f():\n    import daa_ext.a\n    from b.c import d\nif TYPE_CHECKING:\n    import e"
    assert set(imports(text)) == {"daa_ext.a", "b.c", "b.c.d", "e"}


def documented_ladder() -> list[set[str]]:
    """The floors of the package's docstring: lines of `label  floor  ->  floor  ...`."""
    lines = (daa_ext.__doc__ or "").partition("(tests/test_house.py):")[2].split("\n")
    floors = [line.split(maxsplit=1)[1].split("->") for line in lines if line.strip()]
    return [set(floor.split()) for line in floors for floor in line]


def test_the_ladder_is_the_one_that_the_package_documents() -> None:
    assert documented_ladder() == LADDER


@pytest.mark.parametrize("module", GROUND)
def test_ground_floor_is_maths_alone(module: str) -> None:
    outside = {
        name for name in imports(source(module)) if not name.startswith(("torch.", "daa_ext."))
    }
    allowed = {name for name in outside if name in GROUND_MAY_IMPORT}
    members = {name for name in outside if name.rpartition(".")[0] in GROUND_MAY_IMPORT}
    assert outside == allowed | members
    assert not BEHIND_TORCH.search(source(module))
    assert "torch.distributed" not in set(imports(source(module)))
    assert not any(host in source(module).lower() for host in HOSTS - {"datasets"})


def test_only_the_seam_imports_the_host() -> None:
    importers = {module for module in ALL if "llamafactory" in roots(module)}
    assert importers - {"cli"} == {"stages", "compare.host", "compare.host_template"}
    below_the_hosts_floor = {module for module in MODULES if floor(module) < floor("guard")}
    assert not any(roots(module) & HOSTS for module in below_the_hosts_floor)


def test_only_ranks_talks_to_other_ranks() -> None:
    importers = {m for m in ALL if "torch.distributed" in {*imports(source(m))}}
    namers = {module for module in ALL if "torch.distributed" in source(module)}
    assert importers == namers == {"ranks"}


@pytest.mark.parametrize("word", ZERO_INTERNALS)
def test_only_zero_reads_the_insides_of_deepspeed(word: str) -> None:
    assert {module for module in ALL if word in source(module)} == {"zero"}


def test_deepspeed_is_met_and_not_imported() -> None:
    """A run without it must not need it."""
    assert not any("deepspeed" in roots(module) for module in ALL)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_modules_are_ascii_and_short(path: Path) -> None:
    content = path.read_bytes()
    assert content.isascii()
    assert content.count(b"\n") <= 260


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


# what an import costs


def loaded(code: str, *names: str, autoload: bool = True) -> set[str]:
    """Which of `names` a fresh interpreter has in sys.modules after running `code`."""
    code += f"\nimport sys\nprint(*(set({names!r}) & set(sys.modules)))"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "the plugin is silent"
    return set(done.stdout.split())


def test_plugin_imports_nothing_heavy() -> None:
    heavy = ("torch", "wrapt", "llamafactory", "transformers", "numpy", "daa_ext.config")
    assert loaded("import daa_ext.plugin", "daa_ext.plugin", *heavy) == {"daa_ext.plugin"}


def test_import_torch_loads_the_plugin_and_no_host() -> None:
    names = ("daa_ext.plugin", "wrapt", "daa_ext.config", "daa_ext.stages", *HOSTS)
    assert loaded("import torch", *names) == {"daa_ext.plugin", "wrapt"}
    assert loaded("import torch", *names, autoload=False) == set()


def test_import_torch_survives_a_plugin_without_wrapt() -> None:
    code = "import sys; sys.modules['wrapt'] = None; import torch, daa_ext.plugin as p"
    code += "\nassert 'autoload' in p.broken, p.broken"
    assert loaded(code, "torch", "llamafactory") == {"torch"}
