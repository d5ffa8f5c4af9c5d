"""Write the demo data sets of this folder: python examples/data/build.py [--check].

Finance rows come from finance_patterns.json. General rows are those of general_handwritten.jsonl
plus a few small generators over general_tables.json. Same sources, same bytes, every time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, str]

HERE = Path(__file__).resolve().parent
SEED = 0
FINANCE_INSTRUCTION = (
    "What is the sentiment of this financial sentence? Answer with negative, neutral or positive."
)
FINANCE_TRAIN, FINANCE_TEST, FINANCE_UNSEEN = (
    800,
    200,
    80,
)  # unseen: test rows from patterns kept out of train
GENERATED_TRAIN, GENERATED_HELDOUT = 90, 18


def load(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="ascii"))


def row(instruction: str, output: object, given: str = "") -> Row:
    return {"instruction": instruction, "input": given, "output": str(output)}


def listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


class Filler:
    """Fills the {slots} and [either|or] choices of a pattern.

    {company} is a word and {company2} another one; {pct} is a number; {amt.lo} < {amt.hi} are a pair
    and {amt.down} is the fall from hi to lo in per cent. A slot named twice has one value.
    """

    def __init__(self, spec: dict[str, Any], rng: random.Random) -> None:
        self.words, self.numbers, self.rng = spec["words"], spec["numbers"], rng

    def fill(self, pattern: str) -> str:
        values: dict[str, str] = {}

        def slot(match: re.Match[str]) -> str:
            key, name, part = match.group(1), match.group(2), match.group(3) or "lo"
            if (full := f"{key}.{part}") not in values:
                if name in self.numbers:
                    values.update(
                        {f"{key}.{k}": v for k, v in self._pair(*self.numbers[name]).items()}
                    )
                else:
                    values[full] = self.rng.choice(
                        [w for w in self.words[name] if w not in values.values()]
                    )
            return values[full]

        text = re.sub(r"\[([^\]]*)\]", lambda m: self.rng.choice(m.group(1).split("|")), pattern)
        text = re.sub(r"\{(([a-z]+)\d?)(?:\.(\w+))?\}", slot, text)
        text = re.sub(r"\b([Aa]) (?=8|11\b|18\b)", r"\1n ", text)
        return text[0].upper() + text[1:] if pattern.startswith("{") else text

    def _pair(self, low: float, high: float, step: float) -> dict[str, str]:
        small = low + step * self.rng.randint(0, round((high - low) / step))
        large = max(small + step, step * round(small * self.rng.uniform(1.08, 1.45) / step))
        decimals = len(str(step).partition(".")[2])
        lo, hi, down = (
            f"{small:,.{decimals}f}",
            f"{large:,.{decimals}f}",
            f"{100 * (1 - small / large):.0f}",
        )
        return {"lo": lo, "hi": hi, "down": down}


def finance() -> tuple[list[Row], list[Row]]:
    """Train and test rows, the labels as even as the counts allow."""
    rng = random.Random(SEED)
    spec = load("finance_patterns.json")
    filler, seen = Filler(spec, rng), set[str]()
    train: list[Row] = []
    test: list[Row] = []

    def draw(patterns: list[str], label: str, count: int) -> list[Row]:
        drawn: list[Row] = []
        for pattern in itertools.cycle(patterns):
            if len(drawn) == count:
                break
            sentence = filler.fill(pattern)
            if sentence not in seen:
                seen.add(sentence)
                drawn.append(row(FINANCE_INSTRUCTION, label, sentence))
        rng.shuffle(drawn)
        return drawn

    for place, (label, groups) in enumerate(spec["patterns"].items()):
        n_train, n_test, n_unseen = (
            (n + place) // 3 for n in (FINANCE_TRAIN, FINANCE_TEST, FINANCE_UNSEEN)
        )
        shared = draw(groups["shared"], label, n_train + n_test - n_unseen)
        train += shared[:n_train]
        test += shared[n_train:] + draw(groups["test_only"], label, n_unseen)
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def tasks(t: dict[str, Any], r: random.Random) -> Iterator[Row]:
    """Small tasks with computed answers, one of each kind in turn, for ever."""
    words = [word for group in t["categories"].values() for word in group]
    while True:
        a, b = r.randint(12, 89), r.randint(3, 9)
        tens, ones = a - a % 10, a % 10
        steps = (
            f"{b} x {tens} = {b * tens} and {b} x {ones} = {b * ones}. Together that is {a * b}."
        )
        yield row(f"Work out {a} x {b} and show the steps.", steps)

        mover, speed, hours, more = (
            r.choice(t["movers"]),
            r.randint(20, 75),
            r.randint(2, 5),
            r.randint(2, 9),
        )
        ask = f"A {mover} moves at {speed} km/h for {hours} hours and then covers another {more} km. How far is that?"
        way = speed * hours
        yield row(
            ask,
            f"In {hours} hours: {speed} x {hours} = {way} km. Adding {more} km gives {way + more} km.",
        )

        share, whole = r.choice([5, 10, 15, 20, 25, 30, 40]), 20 * r.randint(3, 40)
        part = f"1% of {whole} is {whole / 100:g}, so {share}% is {share} x {whole / 100:g} = {share * whole // 100}."
        yield row(f"What is {share}% of {whole}?", part)

        (big, small, factor), n = r.choice(t["conversions"]), r.randint(2, 45)
        yield row(
            f"Convert {n} {big} to {small}.", f"{n} {big} = {n} x {factor} = {n * factor} {small}."
        )

        numbers, falling = r.sample(range(3, 99), 6), r.random() < 0.5
        how = "largest to smallest" if falling else "smallest to largest"
        yield row(
            f"Sort these numbers from {how}.",
            listed(sorted(numbers, reverse=falling)),
            listed(numbers),
        )

        some = r.sample(words, 5)
        yield row("Put these words in alphabetical order.", listed(sorted(some)), listed(some))

        word = r.choice(words)
        vowels = [letter for letter in word if letter in "aeiou"]
        yield row(
            "How many vowels (a, e, i, o, u) does this word have?",
            f"{len(vowels)}: {listed(vowels)}.",
            word,
        )

        country, city = r.choice(list(t["capitals"].items()))
        yield row(f"What is the capital of {country}?", f"The capital of {country} is {city}.")

        person = {key: r.choice(t[key]) for key in ("name", "age", "job", "town")}
        text = "{name}, aged {age}, works as a {job} in {town}.".format(**person)
        yield row(
            "Turn the text into a JSON object with the keys name, age, job and town.",
            json.dumps(person),
            text,
        )

        begin, length = 5 * r.randint(96, 220), 5 * r.randint(13, 23)
        start, end = (f"{minute // 60}:{minute % 60:02d}" for minute in (begin, begin + length))
        ask = f"A film starts at {start} and lasts {length} minutes. When does it end?"
        yield row(
            ask,
            f"{length} minutes are 1 h {length - 60} min, and {start} plus 1 h {length - 60} min is {end}.",
        )

        wanted, other = r.sample(list(t["categories"]), 2)
        hits = r.sample(t["categories"][wanted], 3)
        mixed = r.sample(hits + r.sample(t["categories"][other], 3), 6)
        yield row(
            f"Pick out the {wanted} from this list.",
            listed([w for w in mixed if w in hits]),
            listed(mixed),
        )


def general() -> tuple[list[Row], list[Row]]:
    """Hand-written and generated rows, shuffled together; no question occurs twice."""
    rng = random.Random(SEED)
    split: dict[str, list[Row]] = {"train": [], "heldout": []}
    seen: set[tuple[str, str]] = set()
    for line in (HERE / "general_handwritten.jsonl").read_text(encoding="ascii").splitlines():
        written = json.loads(line)
        split[written.pop("split")].append(written)
        seen.add((written["instruction"], written["input"]))
    made: list[Row] = []
    for new in tasks(load("general_tables.json"), rng):
        if len(made) == GENERATED_TRAIN + GENERATED_HELDOUT:
            break
        if (key := (new["instruction"], new["input"])) not in seen:
            seen.add(key)
            made.append(new)
    split["train"] += made[:GENERATED_TRAIN]
    split["heldout"] += made[GENERATED_TRAIN:]
    for rows in split.values():
        rng.shuffle(rows)
    return split["train"], split["heldout"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a file on disk differs; write nothing"
    )
    check = parser.parse_args().check
    names = ("finance_train", "finance_test", "general_train", "general_heldout")
    stale = 0
    for name, rows in zip(names, (*finance(), *general())):
        path = HERE / f"{name}.jsonl"
        data = "".join(json.dumps(r) + "\n" for r in rows).encode("ascii")
        if not check:
            path.write_bytes(data)
        elif not path.exists() or path.read_bytes() != data:
            print(f"{path.name} differs from what build.py makes", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
