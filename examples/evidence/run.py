"""The comparison of docs/evidence.md: DAA, plain tuning, and plain tuning at DAA's own rate.

    python examples/evidence/run.py --data DIR --seeds 42 43 44

DIR holds finance_train, finance_val, general_train and general_heldout (alpaca jsonl) and
mc_hellaswag.jsonl ({question, choices, answer}). A run that has its result is not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BASE = Path("models/SmolLM2-135M-Instruct")
OUT = Path("saves/evidence")
LABELS = ("negative", "neutral", "positive")
HELD_OUT = {"finance_val": 300, "general_heldout": 200}  # rows kept, evenly spaced


def prepare(source: Path) -> Path:
    """Data folder of the runs: the sets as they are, the held-out ones thinned to HELD_OUT rows."""
    folder = OUT / "data"
    folder.mkdir(parents=True, exist_ok=True)
    names = ["finance_train", "general_train", *HELD_OUT]
    for name in names:
        lines = _lines(source / f"{name}.jsonl")
        stride = len(lines) // HELD_OUT.get(name, len(lines))
        (folder / f"{name}.jsonl").write_text("\n".join(lines[::stride]) + "\n")
    rows = [json.loads(line) for line in _lines(source / "mc_hellaswag.jsonl")]
    story = [
        {"instruction": row["question"], "input": "", "output": row["choices"][row["answer"]]}
        for row in rows
    ]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in story))
    info = {name: {"file_name": f"{name}.jsonl"} for name in [*names, "hellaswag"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def _lines(path: Path) -> list[str]:
    """Lines of a jsonl file: str.splitlines would also cut at U+2028 inside a string."""
    return path.read_text().rstrip("\n").split("\n")


def train(yaml: str, name: str, data: Path, **changes: Any) -> Path:
    """`llamafactory-cli train` with overrides; returns the output folder."""
    out = OUT / name
    words = [f"{key}={value}" for key, value in changes.items()]
    command = ["llamafactory-cli", "train", str(HERE / yaml), f"output_dir={out}"]
    with (OUT / f"{name}.log").open("w") as log:
        subprocess.run(
            [*command, f"dataset_dir={data}", *words], check=True, stdout=log, stderr=log
        )
    return out


def score(folder: Path, validation: Path) -> dict[str, float]:
    """Accuracy and weighted F1 of the most likely label word after each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first = [tokenizer(label)["input_ids"][0] for label in LABELS]
    assert len(set(first)) == len(LABELS), "the labels share their first token"
    truth, found = [], []
    for line in _lines(validation):
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits = model(**prompt, logits_to_keep=1).logits[0, -1, first].float()
        truth.append(row["output"])
        found.append(LABELS[int(logits.argmax())])
    return {
        "accuracy": accuracy_score(truth, found),
        "f1": f1_score(truth, found, average="weighted", labels=LABELS),
    }


def losses(out: Path) -> dict[str, float]:
    """Held-out losses of a run, from DAA's report or from the host's evaluation."""
    path = out / "daa_report.json"
    if path.exists():
        sets = json.loads(path.read_text())["retention"]["sets"]
        return {
            name.removeprefix("general_"): values["loss"]["final"] for name, values in sets.items()
        }
    results = json.loads((out / "all_results.json").read_text())
    names = {"domain": "finance_val", "heldout": "general_heldout", "hellaswag": "hellaswag"}
    return {name: results[f"eval_{key}_loss"] for name, key in names.items()}


def one(name: str, yaml: str, data: Path, **changes: Any) -> dict[str, Any]:
    """Train, score and remember one run."""
    kept = OUT / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    print(f"{name}: {changes}", flush=True)
    out = train(yaml, name, data, **changes)
    result = {"name": name, **changes, **losses(out), **score(out, data / "finance_val.jsonl")}
    if yaml == "daa.yaml":
        report = json.loads((out / "daa_report.json").read_text())
        keys = ("effective_lr_mean", "similarity_mean", "total_steps", "wall_seconds")
        result |= {key: report[key] for key in keys}
        if "base" not in (path.stem for path in OUT.glob("*.json")):
            sets = report["retention"]["sets"].items()
            base = {n.removeprefix("general_"): v["loss"]["base"] for n, v in sets}
            base |= {"name": "base", **score(BASE, data / "finance_val.jsonl")}
            (OUT / "base.json").write_text(json.dumps(base))
    kept.write_text(json.dumps(result))
    for weights in out.glob("*.safetensors"):
        weights.unlink()
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    if shutil.which("llamafactory-cli") is None:
        sys.exit("llamafactory-cli is not on the PATH: activate the environment first.")
    data = prepare(arguments.data)
    for seed in arguments.seeds:
        daa = one(f"daa-{seed}", "daa.yaml", data, seed=seed)
        one(f"plain-2e-5-{seed}", "plain.yaml", data, seed=seed)
        steps = daa["total_steps"]
        # a linear schedule from r has mean r (T + 1) / 2T: the rate whose mean is DAA's own
        rate = daa["effective_lr_mean"] * 2 * steps / (steps + 1)
        one(
            f"control-{seed}", "plain.yaml", data,
            seed=seed, learning_rate=f"{rate:.4e}",
        )  # fmt: skip
    for path in sorted(OUT.glob("*.json")):
        print(path.read_text())


if __name__ == "__main__":
    main()
