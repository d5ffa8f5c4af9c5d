"""Which keys a LLaMA-Factory YAML may have: asked of the host before the first run."""

import difflib
from collections.abc import Mapping
from typing import Any


def refuse_unknown_keys(places: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for the first key that LLaMA-Factory (with this plugin) does not know.

    Args:
        places: place in the experiment file -> keys that are handed on.
    """
    import torch  # noqa: F401  (its import brings the plugin, and with it our keys)
    from llamafactory import hparams

    kinds = (
        hparams.ModelArguments, hparams.DataArguments, hparams.TrainingArguments,
        hparams.FinetuningArguments, hparams.GeneratingArguments,
    )  # fmt: skip
    known = {name for kind in kinds for name in kind.__dataclass_fields__}
    for place, keys in places.items():
        for key, value in keys.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ValueError(f"{place}.{key}={value}: LLaMA-Factory knows no such key.{hint}")
