"""Data folder of examples/evidence/finance.yaml from the public sets that docs/evidence.md names.

    python examples/evidence/prepare.py SOURCE saves/evidence_data

Everything stays where it is (links), but for PubMedQA, whose rows are cut into two disjoint files:
every fourth one is held out.
"""

import json
import sys
from pathlib import Path

LINKED = ("finance_train", "finance_val", "general_train", "general_heldout")
CHOICES = ("mc_arc_easy", "mc_hellaswag", "mc_mmlu_dev")


def main(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*LINKED, *CHOICES):
        link = folder / f"{name}.jsonl"
        link.unlink(missing_ok=True)
        link.symlink_to((source / f"{name}.jsonl").resolve())
    lines = (source / "pubmedqa_train.jsonl").read_text().rstrip("\n").split("\n")
    parts = {"pubmedqa_fit": [], "pubmedqa_heldout": []}
    for number, line in enumerate(lines):
        parts["pubmedqa_heldout" if number % 4 == 3 else "pubmedqa_fit"].append(line)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    info = {name: {"file_name": f"{name}.jsonl"} for name in (*LINKED, *parts)}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
