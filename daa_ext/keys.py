"""What a YAML key may hold: the check and the messages that all keys of this plugin share."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """default: of a key that the YAML leaves out. test: whether a value is what `allowed` says."""

    default: Any
    text: str
    allowed: str
    test: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError unless key `name` may hold `value`."""
        if not self.test(value):
            raise ValueError(f"{name}={value!r} is not allowed: {self.allowed}. {self.text}")


def refuse_unknown(
    keys: Iterable[str], ours: Callable[[str], bool], rules: Mapping[str, Rule], kind: str
) -> None:
    """Raise ValueError for the first key that is `ours` by its name and has no rule."""
    for key in keys:
        if ours(key) and key not in rules:
            close = difflib.get_close_matches(key, rules, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{key} is not a {kind}: did you mean {close}? All: {', '.join(rules)}."
            )


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0.0


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
