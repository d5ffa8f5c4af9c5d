"""Reads an experiment file and checks it whole, so that a mistake is found before the first run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from daa_ext.compare.experiment import Experiment, Method
from daa_ext.compare.methods import KINDS, PRESETS

OWNED = {
    "output_dir", "learning_rate", "seed", "dataset", "max_samples", "dataset_dir",
    "finetuning_type", "model_name_or_path", "template",
}  # fmt: skip


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, with `key=value` of the command line put in (nested: `a.b=value`).

    Raises:
        ValueError: names every key that is wrong, its value, and what is allowed.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the path of an experiment file.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; see docs/compare.md for an example.")
    if wrong := [word for word in overrides if "=" not in word]:
        raise ValueError(f"{wrong[0]} is not key=value: write for example output=saves/compare.")
    merged = OmegaConf.merge(OmegaConf.create(content), OmegaConf.from_dotlist(list(overrides)))
    filled: Any = OmegaConf.to_container(merged, resolve=True)
    if isinstance(filled.get("methods"), dict):
        filled["methods"] = {name: _filled(name, own) for name, own in filled["methods"].items()}
    try:
        experiment = Experiment.model_validate(filled)
    except ValidationError as error:
        lines = [_words(each) for each in error.errors(include_url=False)]
        raise ValueError(f"{path}:\n  " + "\n  ".join(lines)) from None
    _check_keys(experiment)
    for name in experiment.methods:
        _check_method(experiment, name)
    _check_sets(experiment)
    return experiment


def _words(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{place} is missing."
    if error["type"] == "extra_forbidden":
        return f"{place}={error['input']!r} is not a key of an experiment; see docs/compare.md."
    return f"{place}={error['input']!r}: {error['msg']}."


def _filled(name: str, settings: Any) -> Any:
    if settings is None:
        settings = {}
    if not isinstance(settings, dict) or "kind" in settings:
        return settings
    if name not in PRESETS:
        raise ValueError(
            f"methods.{name}: no kind is given and {name} is not a known method. Known: "
            f"{', '.join(PRESETS)}. Or set kind: one of {', '.join(KINDS)}."
        )
    preset = PRESETS[name]
    return {**preset, **settings, "keys": {**preset.get("keys", {}), **settings.get("keys", {})}}


def _check_keys(experiment: Experiment) -> None:
    if experiment.reference not in experiment.methods:
        raise ValueError(
            f"reference={experiment.reference}: the method that the others are tested against must "
            f"be one of {', '.join(experiment.methods)}."
        )
    for place, keys in experiment.yaml_keys():
        for key in sorted(OWNED & keys.keys()):
            raise ValueError(
                f"{place}.{key}={keys[key]}: daa compare sets {key} itself. Remove it (rates, "
                "seeds and data are keys of the experiment, not of its YAMLs)."
            )
    if experiment.tune_seed is not None and experiment.tune_seed not in experiment.seeds:
        raise ValueError(
            f"tune_seed={experiment.tune_seed} is not among seeds={experiment.seeds}: name one of "
            "them."
        )


def _check_method(experiment: Experiment, name: str) -> None:
    methods = experiment.methods
    method, here = methods[name], f"methods.{name}"
    if method.kind not in KINDS:
        raise ValueError(f"{here}.kind={method.kind}: one of {', '.join(KINDS)}.")
    kind = KINDS[method.kind]
    if kind.derived:
        _check_origin(methods, name)
    elif method.of is not None:
        raise ValueError(f"{here}.of={method.of} has no effect with kind={method.kind}.")
    if bool(method.learning_rate) == kind.derived:
        what = "is taken from `of`; remove it" if kind.derived else "is missing: give a list"
        raise ValueError(f"{here}.learning_rate={method.learning_rate} {what}.")
    if bool(method.alpha) != (method.kind == "wise"):
        raise ValueError(f"{here}.alpha={method.alpha}: a list in (0, 1), for kind wise alone.")
    for key in ("general_share", "sweep"):
        if getattr(method, key) and kind.derived:
            raise ValueError(f"{here}.{key} has no effect with kind={method.kind}: remove it.")
    for domain in method.domains or ():
        if domain not in experiment.domains:
            raise ValueError(f"{here}.domains={domain}: one of {', '.join(experiment.domains)}.")
    if strange := set(experiment.seeds_of(method)) - set(experiment.seeds):
        raise ValueError(f"{here}.seeds={sorted(strange)} are not among seeds={experiment.seeds}.")


def _check_origin(methods: dict[str, Method], name: str) -> None:
    """What a wise or a control is made from."""
    method, here = methods[name], f"methods.{name}"
    if method.of not in methods:
        raise ValueError(
            f"{here}.of={method.of}: a {method.kind} needs the name of another method of this "
            f"file: {', '.join(sorted(methods.keys() - {name}))}."
        )
    origin = methods[method.of]
    if origin.kind not in KINDS or KINDS[origin.kind].derived:
        raise ValueError(f"{here}.of={method.of}: name a method that trains by itself.")
    if origin.sweep:
        raise ValueError(f"{here}.of={method.of}: that method has a sweep; name one without.")
    if method.kind == "control" and not KINDS[origin.kind].anchored:
        raise ValueError(f"{here}.of={method.of}: the control is made for a DAA method.")


def _check_sets(experiment: Experiment) -> None:
    for domain in experiment.domains:
        names = [each.name for each in experiment.sets(domain)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"score sets of {domain}: the name {twice[0]} is given twice.")
        if not any(each.counted for each in experiment.domains[domain].score):
            raise ValueError(
                f"domains.{domain}.score has losses alone: S_D needs a set of kind labels, choice "
                "or harness."
            )
    if not any(each.counted for each in experiment.general):
        raise ValueError("general has losses alone: S_G needs a set of kind choice or harness.")
    if experiment.curves is not None:
        losses = {
            each.name
            for domain in experiment.domains
            for each in experiment.sets(domain)
            if each.kind == "loss"
        }
        for name in experiment.curves.sets:
            if name not in losses:
                raise ValueError(
                    f"curves.sets={name}: a score set of kind loss: {', '.join(sorted(losses))}."
                )
