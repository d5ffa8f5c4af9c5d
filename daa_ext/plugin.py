"""Where LLaMA-Factory learns of DAA: two names, patched when their modules are imported.

    llamafactory.hparams.finetuning_args.FinetuningArguments   learns `daa` and our keys
    llamafactory.hparams.parser.read_args                      misspelt keys of ours get a mend

Everything else waits until a YAML says finetuning_type: daa or switches one of our methods on
(stages.install). Any other run meets the host's own functions and trainer classes. `autoload` is
called at the end of every `import torch` (entry point group torch.backends), so it imports
nothing but wrapt and never raises.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args, get_type_hints

LLAMAFACTORY = ">=0.9.5,<0.9.6"
NEVER_WITH_DAA = {
    "pure_bf16": "a step of learning_rate=1e-7 vanishes in bf16 weights; use bf16: true",
    "use_galore": "DAA keeps the whole gradient; use optim: adamw_torch",
    "use_apollo": "DAA keeps the whole gradient; use optim: adamw_torch",
    "use_badam": "DAA anchors every parameter at every step; use optim: adamw_torch",
    "use_adam_mini": "its second moment is not per parameter (eq. 9); use optim: adamw_torch",
    "use_muon": "its update has no second moment to correct (eq. 9); use optim: adamw_torch",
    "use_llama_pro": "DAA trains all layers; remove the key",
    "use_hyper_parallel": "that backend has its own trainer, which DAA does not reach",
    "use_mca": "that backend has its own trainer, which DAA does not reach",
}

broken: dict[str, str] = {}  # seam -> what was not found there; read by `daa doctor`


def autoload() -> None:
    """Entry point of torch.backends: register the hooks. Cheap, and silent whatever happens."""
    try:
        import wrapt

        for module, hook in _HOOKS.items():
            wrapt.register_post_import_hook(functools.partial(_guarded, hook), module)
    except Exception as error:  # importing torch must not fail because of a plugin
        broken["autoload"] = repr(error)


def _guarded(hook: Callable[[Any], None], module: ModuleType) -> None:
    """Patch a module, or note what is missing: a run that uses DAA then stops with a word."""
    try:
        hook(module)
    except AttributeError as error:
        broken[module.__name__] = str(error)


def check_seams() -> None:
    """Raise ValueError if this LLaMA-Factory is not one that the plugin knows."""
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    found = version("llamafactory")
    if not SpecifierSet(LLAMAFACTORY).contains(found, prereleases=True):
        raise ValueError(
            f"llamafactory {found} is installed, this daa_ext is tested with {LLAMAFACTORY}. pip "
            f"install 'llamafactory{LLAMAFACTORY}', or update daa_ext."
        )
    if broken:
        raise ValueError(
            f"LLaMA-Factory has moved what the plugin needs: {broken}. Run `daa doctor`."
        )


def _install(stage: str) -> None:
    from daa_ext.stages import install

    try:
        install(stage)
    except (ImportError, AttributeError) as error:
        broken[f"llamafactory.train.{stage}"] = str(error)
        check_seams()


def _patch_arguments(module: Any) -> None:
    module.FinetuningArguments = finetuning_arguments(module.FinetuningArguments)


def finetuning_arguments(host: Any) -> Any:
    """The host's FinetuningArguments with `daa` among the choices and the fields of our keys."""
    from daa_ext.config import DaaSettings
    from daa_ext.method_config import MethodSettings

    types = Literal[(*get_args(get_type_hints(host)["finetuning_type"]), "daa")]  # type: ignore
    inherited = host.__dataclass_fields__["finetuning_type"]

    @dataclass
    class FinetuningArguments(DaaSettings, MethodSettings, host):  # type: ignore[misc]
        finetuning_type: types = field(  # type: ignore[valid-type]
            default=inherited.default, metadata=dict(inherited.metadata)
        )

        def __post_init__(self) -> None:
            self.use_daa = self.finetuning_type == "daa"
            if self.needs_daa_ext():
                check_seams()
            if self.use_daa:
                self.resolve()
                self._check_host_options()
            else:
                self.refuse(self.finetuning_type)
            self.resolve_methods(vars(self))
            if self.needs_daa_ext():
                _install(self.stage)
            if self.use_daa:
                self.finetuning_type = "full"
            super().__post_init__()

        def needs_daa_ext(self) -> bool:
            """Whether the run's trainer is not the host's own."""
            return self.use_daa or bool(self.methods())

        def _check_host_options(self) -> None:
            for key, mend in NEVER_WITH_DAA.items():
                if getattr(self, key, False):
                    raise ValueError(f"{key}=true cannot go with finetuning_type=daa: {mend}.")
            if self.stage not in ("sft", "pt"):
                raise ValueError(
                    f"stage={self.stage} cannot go with finetuning_type=daa: stage sft or pt."
                )

    FinetuningArguments.__module__ = host.__module__
    FinetuningArguments.__qualname__ = host.__qualname__
    return FinetuningArguments


def _patch_parser(module: Any) -> None:
    from daa_ext.config import refuse_unknown
    from daa_ext.method_config import refuse_unknown_methods

    host = module.read_args

    @functools.wraps(host)
    def read_args(args: Any = None) -> Any:
        read = host(args)
        if isinstance(read, dict):
            keys = [key for key in read if isinstance(key, str)]
        else:  # the words of a command line; those without dashes are values
            keys = [word.split("=")[0].removeprefix("--") for word in read if word[:2] == "--"]
        refuse_unknown(keys)
        refuse_unknown_methods(keys)
        return read

    module.read_args = read_args


_HOOKS: Mapping[str, Callable[[Any], None]] = {
    "llamafactory.hparams.finetuning_args": _patch_arguments,
    "llamafactory.hparams.parser": _patch_parser,
}
