"""Scores one model: `python -m daa_ext.compare.score JOB.json`, in a process of its own.

The job is a JSON object with the fields of `Job`; docs/scoring.md has it and what is written.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from daa_ext.compare import harness
from daa_ext.compare.encoding import Encoder
from daa_ext.compare.likelihood import answer_scores, text_losses
from daa_ext.compare.scoring import SetSpec, check, choice_result, loss_result, read, result
from daa_ext.report import versions

ALLOWED = {"dtype": ("bf16", "fp32"), "device": ("auto", "cpu")}


@dataclass(frozen=True)
class Job:
    """What to score and how.

    Attributes:
        model: folder or hub name; its tokenizer lies there too.
        adapter: folder of a LoRA adapter, merged into the model.
        dtype: bf16 is autocast over fp32 weights on a CPU, bf16 weights on a GPU.
        order_seed: another one batches the rows in another way.
        out: the JSON file to write.
    """

    model: str
    template: str
    sets: list[dict[str, Any]]
    out: str
    adapter: str | None = None
    cutoff_len: int = 512
    dtype: str = "bf16"
    device: str = "auto"
    batch_size: int = 8
    order_seed: int = 0

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job of a file.

        Raises:
            ValueError: names what is wrong in it.
        """
        content = json.loads(path.read_text())
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if strange := sorted(content.keys() - known):
            raise ValueError(f"{path}: {strange[0]} is not a key of a job: {', '.join(known)}.")
        if missing := sorted(needed - content.keys()):
            raise ValueError(f"{path}: {missing[0]} is missing.")
        job = cls(**content)
        for name, allowed in ALLOWED.items():
            if (value := getattr(job, name)) not in allowed:
                raise ValueError(f"{path}: {name}={value!r} must be one of {', '.join(allowed)}.")
        for name, least in (("cutoff_len", 2), ("batch_size", 1)):
            if (value := getattr(job, name)) < least:
                raise ValueError(f"{path}: {name}={value} must be {least} or more.")
        check(job.sets)
        return job


class Scorer:
    """A loaded model and the job's settings."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = AutoTokenizer.from_pretrained(job.model)
        self._encoder = Encoder(self._tokenizer, job.template, job.cutoff_len)
        self._model = load_model(job)
        self.device: torch.device = self._model.device
        if len(self._tokenizer) > self._model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"template={job.template!r} adds tokens that the model has no embedding for. Name "
                "the template that it is trained with."
            )

    def score(self, spec: SetSpec) -> dict[str, Any]:
        """The result of one set.

        Raises:
            ValueError: a row cannot be scored within cutoff_len.
        """
        if spec.kind == "harness":
            return self._harness(spec)
        return self._loss(spec) if spec.kind == "loss" else self._choice(spec)

    def _choice(self, spec: SetSpec) -> dict[str, Any]:
        rows, labels = read(spec)
        if labels:
            questions = [self._encoder.labelled(row, labels) for row in rows]
        else:
            questions = [self._encoder.choice(row) for row in rows]
        scores = self._run(spec.name, answer_scores, questions)
        if spec.normalise:
            scores = [
                [score / len(answer) for score, answer in zip(found, question.answers, strict=True)]
                for found, question in zip(scores, questions, strict=True)
            ]
        truths = [row.content["output" if labels else "answer"] for row in rows]
        return choice_result(spec, truths, scores, labels or None)

    def _loss(self, spec: SetSpec) -> dict[str, Any]:
        texts = [self._encoder.text(row) for row in read(spec)[0]]
        losses = self._run(spec.name, text_losses, texts)
        return loss_result(spec, losses, [text.scored for text in texts])

    def _harness(self, spec: SetSpec) -> dict[str, Any]:
        found = harness.evaluate(
            self._model, self._tokenizer, str(spec.task), metric=spec.metric,
            dataset_path=spec.dataset_path, num_fewshot=spec.num_fewshot, limit=spec.limit,
            batch_size=self._job.batch_size,
        )  # fmt: skip
        return result(spec, *found)

    def _run(self, name: str, function: Callable[..., Any], items: list[Any]) -> Any:
        with tqdm(total=len(items), desc=name, file=sys.stderr) as bar:
            return function(
                self._model, items, self._job.batch_size, self._job.order_seed, bar.update
            )


def load_model(job: Job) -> Any:
    """The model of a job, its adapter merged, on its device.

    Raises:
        ValueError: the adapter is none, or not one of this model.
    """
    cuda = job.device == "auto" and torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and job.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    if job.adapter is not None:
        model = _merged(model, job.adapter)
    # Autocast keeps a weight that it has cast only if the weight takes a gradient.
    return model.to("cuda" if cuda else "cpu").eval().requires_grad_(True)


def _merged(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"adapter={adapter}: no adapter_config.json there; give a LoRA folder.")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # else: scored without it
        try:
            return PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (UserWarning, ValueError) as error:
            raise ValueError(f"adapter={adapter} does not fit the model: {error}") from error


def run(job: Job) -> dict[str, Any]:
    """Score all sets of a job; what it writes."""
    start = time.monotonic()
    scorer = Scorer(job)
    on_cpu = scorer.device.type == "cpu"
    with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bf16" and on_cpu):
        found = {spec.name: scorer.score(spec) for spec in map(SetSpec.parse, job.sets)}
    used = {"lm_eval": version("lm_eval")} if any(s["kind"] == "harness" for s in job.sets) else {}
    seconds = time.monotonic() - start
    return {"sets": found, "seconds": seconds, "versions": versions() | used}


def main(arguments: list[str]) -> int:
    """Run the job of a file; 0 if its result is written, 2 if the job cannot be run."""
    try:
        job = Job.read(Path(arguments[0]))
        content = json.dumps(run(job), indent=1, allow_nan=False)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    part.write_text(content + "\n")
    part.replace(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
