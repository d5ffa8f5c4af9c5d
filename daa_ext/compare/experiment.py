"""The experiment of `daa compare`: keys, types and defaults. docs/compare.md has them all.

One file names the base model, the general data of the anchor, the domains, the general sets, the
methods with their own keys and grids, and the seeds. `reading` reads it and checks it whole.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PAPER_SEEDS = [42, 43, 44, 45, 46]
Rate = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0)]


class Strict(BaseModel):
    """A mapping of the file: a key that is not known is an error, with its place."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreSet(Strict):
    """Something that every model is scored on; see docs/scoring.md."""

    name: str
    kind: Literal["labels", "choice", "loss", "harness"]
    path: str | None = None
    labels: list[str] | None = None
    normalise: bool = True
    metric: str | None = None
    max_samples: Annotated[int, Field(ge=1)] | None = None
    task: str | None = None
    dataset_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    use: Literal["both", "select", "report"] = "both"

    @property
    def counted(self) -> str | None:
        """The metric that enters S_D or S_G; None for a set that is a loss."""
        if self.kind == "loss":
            return None
        return self.metric or "accuracy"

    def file(self, folder: str) -> Path | None:
        """Its file: `path` counts from the data's folder, else from the current one."""
        if self.path is None:
            return None
        there = Path(folder) / self.path
        return there if there.exists() or not Path(self.path).exists() else Path(self.path)

    def job(self, folder: str) -> dict[str, Any]:
        """The set as the scoring process takes it."""
        file = self.file(folder)
        return {**self.model_dump(exclude={"use"}), "path": None if file is None else str(file)}


class Domain(Strict):
    """Data of one domain: what is trained on, and what S_D is the mean of."""

    dataset: str
    max_samples: Annotated[int, Field(ge=1)] | None = None
    score: Annotated[list[ScoreSet], Field(min_length=1)]
    train: dict[str, Any] = {}


class AnchorData(Strict):
    """General data: of the anchor, of replay and mixtures. train: keys of the anchor's YAML."""

    dataset: str
    max_samples: Annotated[int, Field(ge=1)] | None = None
    train: dict[str, Any] = {}


class Method(Strict):
    """One row of the table: a kind, its own YAML keys, its grid."""

    kind: str
    learning_rate: list[Rate] = []
    general_share: Share | None = None
    of: str | None = None
    alpha: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = []
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    domains: list[str] | None = None
    keys: dict[str, Any] = {}

    @field_validator("learning_rate", "alpha", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]


class Curves(Strict):
    """Losses during training, for the figure of forgetting over steps."""

    steps: Annotated[int, Field(ge=1)]
    sets: list[str]  # names of score sets of kind loss, alpaca rows
    max_samples: Annotated[int, Field(ge=1)] | None = None


class Noise(Strict):
    """How many samples of each data set the gradient noise scale is estimated on (fig. 2c)."""

    max_samples: Annotated[int, Field(ge=2)]


class Scoring(Strict):
    """How the scoring process runs."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    batch_size: Annotated[int, Field(ge=1)] = 8
    device: Literal["auto", "cpu"] = "auto"
    cutoff_len: Annotated[int, Field(ge=8)] = 1024


class Experiment(Strict):
    """The whole file."""

    output: str
    base_model: str
    template: str
    dataset_dir: str
    anchor: AnchorData
    domains: Annotated[dict[str, Domain], Field(min_length=1)]
    general: Annotated[list[ScoreSet], Field(min_length=1)]
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    train: dict[str, Any] = {}
    seeds: Annotated[list[int], Field(min_length=1)] = PAPER_SEEDS
    tune_seed: int | None = None
    reference: str = "direct"
    match_at: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    score: Scoring = Scoring()
    curves: Curves | None = None
    noise: Noise | None = None
    launch: Annotated[list[str], Field(min_length=1)] = ["llamafactory-cli", "train"]
    env: dict[str, str] = {}
    keep_weights: bool = False

    @field_validator("env", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value

    def yaml_keys(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place in the file, keys handed on to LLaMA-Factory YAMLs)."""
        yield "train", self.train
        yield "anchor.train", self.anchor.train
        for name, domain in self.domains.items():
            yield f"domains.{name}.train", domain.train
        for name, method in self.methods.items():
            yield f"methods.{name}.keys", method.keys

    def sets(self, domain: str) -> list[ScoreSet]:
        """All sets that a model of `domain` is scored on."""
        return [*self.domains[domain].score, *self.general]

    def all_sets(self) -> list[ScoreSet]:
        """The sets of all domains and the general ones, each once."""
        named = {each.name: each for domain in self.domains for each in self.sets(domain)}
        return list(named.values())

    def seeds_of(self, method: Method) -> list[int]:
        return method.seeds or self.seeds

    def grid_seeds(self, method: Method) -> list[int]:
        """Seeds that run at every point of the method's grid."""
        seeds = self.seeds_of(method)
        return [self.tune_seed] if self.tune_seed in seeds else seeds
