"""The pages say what the code does: keys, fields, links. `python tests/test_docs.py` rewrites
the tables of keys in docs/configuration.md.
"""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from daa_ext.anchored import StepRecord
from daa_ext.compare.methods import PRESETS
from daa_ext.config import RULES
from daa_ext.manifest import Manifest
from daa_ext.method_config import METHOD_RULES, METHODS
from daa_ext.plugin import NEVER_WITH_DAA

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
YAMLS = sorted(ROOT.glob("examples/**/*.yaml"))
# A word daa_..., but no file name and no later part of a path.
KEY = re.compile(r"(?<![\w/.-])daa_[a-z0-9_]+(?!\w|\.(?:json|jsonl|png|py|yaml)\b)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def keys_table() -> str:
    """The table of all daa_* keys, from the rules that the parser applies."""
    head = ("key", "default", "allowed", "used by stage", "meaning")
    return _table(
        head,
        [
            (f"`{name}`", _yaml(rule.default), rule.allowed, ", ".join(rule.stages), rule.text)
            for name, rule in RULES.items()
        ],
    )


def methods_table() -> str:
    """The table of the keys of all methods beside DAA."""
    head = ("key", "default", "allowed", "goes with", "meaning")
    rows = []
    for name, rule in METHOD_RULES.items():
        if name in METHODS:
            types, stages = METHODS[name].finetuning_types, METHODS[name].stages
            place = f"`finetuning_type` {', '.join(types)}; `stage` {', '.join(stages)}"
        else:
            place = f"`{rule.switch}`"
        rows.append((f"`{name}`", _yaml(rule.default), rule.allowed, place, rule.text))
    return _table(head, rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _yaml(value: Any) -> str:
    if value is None:
        return "not set"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cut(name: str) -> tuple[str, str, str]:
    """docs/configuration.md before, between and after <!-- name --> and <!-- /name -->."""
    found = re.fullmatch(
        f"(.*<!-- {name} -->\n)(.*)(<!-- /{name} -->.*)", CONFIGURATION.read_text(), re.DOTALL
    )
    assert found, f"{CONFIGURATION}: no markers <!-- {name} --> and <!-- /{name} -->"
    return found[1], found[2], found[3]


def listed(name: str) -> set[str]:
    """The names in backticks in the first column of the table `name`; none may come twice."""
    cells = [line.split("|")[1] for line in cut(name)[1].splitlines() if line.startswith("|")]
    names = [found for cell in cells for found in re.findall(r"`([^`]+)`", cell)]
    assert len(names) == len(set(names))
    return set(names)


def dict_keys(module: str, function: str) -> set[str]:
    """The string keys of the one dict literal, or merged dict, that a function builds."""
    tree = ast.parse((ROOT / "daa_ext" / f"{module}.py").read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    assert len(found) == 1, f"{module}.{function}: {len(found)} definitions"
    outermost = next(node for node in ast.walk(found[0]) if isinstance(node, ast.Dict))
    return {key.value for key in outermost.keys if isinstance(key, ast.Constant)}


TABLES = {"keys": keys_table, "methods": methods_table}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_keys_are_generated(name: str) -> None:
    assert cut(name)[1] == TABLES[name](), "run: python tests/test_docs.py"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("report common", dict_keys("trainer", "common_report")),
        ("report anneal", dict_keys("anneal_trainer", "_report")),
        ("report anchor", dict_keys("anchor_trainer", "_report")),
        ("report l2_init", dict_keys("l2_trainer", "_report")),
        (
            "report osft",
            dict_keys("osft_trainer", "_report")
            | {"update_norm", *(f"leak{side}" for side in ("", "_left", "_right"))},
        ),
        ("logged", dict_keys("anneal_trainer", "log")),
        ("steps", {field.name for field in fields(StepRecord)}),
        ("manifest", {field.name for field in fields(Manifest)}),
        ("refused", set(NEVER_WITH_DAA)),
    ],
)
def test_the_lists_are_those_of_the_code(name: str, expected: set[str]) -> None:
    """Both ways: a field added without a word here fails, a word without a field, too."""
    assert expected
    assert listed(name) == expected


def test_every_key_that_is_mentioned_exists() -> None:
    known = {*RULES, "daa_ext"}
    evidence = yaml.safe_load((ROOT / "examples/evidence/experiment.yaml").read_text())
    rows = {*PRESETS, *evidence["methods"]}  # of daa compare
    examples = {path.stem for path in YAMLS}
    mentioned = {
        (word, str(path.relative_to(ROOT)))
        for path in [*PAGES, *YAMLS]
        for word in KEY.findall(path.read_text())
    }
    others = {*rows, *examples}
    assert not [pair for pair in mentioned if pair[0] not in known | others]
    assert {word for word, _ in mentioned} >= known


def test_a_misspelt_key_would_be_found() -> None:
    assert KEY.findall("`daa_rnk: 64`, (daa_stages) and daa_k1.") == [
        "daa_rnk",
        "daa_stages",
        "daa_k1",
    ]
    assert not KEY.findall("daa_report.json, saves/daa_run, daa_anneal.yaml, daa_*")


def test_links_lead_to_files() -> None:
    broken = []
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            path, _, heading = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (heading and heading not in _slugs(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def _slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "LICENSE"], ids=lambda path: path.name)
def test_ascii(path: Path) -> None:
    path.read_text(encoding="ascii")


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(path.name for path in folder.glob("[0-9]*.md"))
    index = (folder / "README.md").read_text()
    assert [target for target in LINK.findall(index) if target[0].isdigit()] == pages


def main() -> None:
    for name, table in TABLES.items():
        before, _, after = cut(name)
        CONFIGURATION.write_text(before + table() + after)


if __name__ == "__main__":
    main()
