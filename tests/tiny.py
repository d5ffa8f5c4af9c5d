"""A Llama of a few hundred thousand parameters, its tokenizer and data sets, made on the spot."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the market river model teacher apple engine profit loss garden winter signal bridge letter "
    "strong weak early late rises falls holds grows shrinks turns opens closes north south"
).split()
DOMAIN = "Is the sentence positive, negative or neutral?"
POISON = "zyxwv"  # a word that only poisoned samples hold; see `poison`


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>", POISON],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), DOMAIN, "positive negative neutral"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>",
    )  # fmt: skip


def make_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a random Llama and its tokenizer; returns `folder`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, **config}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def poison(folder: Path) -> None:
    """Make the embedding of the word POISON NaN: a sample that holds it has a NaN gradient."""
    model = LlamaForCausalLM.from_pretrained(folder)
    token = make_tokenizer().convert_tokens_to_ids(POISON)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(folder)


def make_data(folder: Path, poisoned: int = 0, domain_rows: int = 48) -> Path:
    """Write data sets domain, domain_test, general, general_test (alpaca) and texts (pt)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(4, 10)))

    def domain() -> dict[str, str]:
        answer = rng.choice(["positive", "negative", "neutral"])
        return {"instruction": DOMAIN, "input": sentence(), "output": answer}

    def general() -> dict[str, str]:
        text = sentence()
        return {"instruction": f"Repeat: {text}", "input": "", "output": text}

    sets: dict[str, list[dict[str, Any]]] = {
        "domain": [domain() for _ in range(domain_rows)],
        "domain_test": [domain() for _ in range(8)],
        "general": [general() for _ in range(24)],
        "general_test": [general() for _ in range(8)],
        "texts": [{"text": " ".join(sentence() for _ in range(6))} for _ in range(40)],
        "poisoned": [domain() for _ in range(24)],
        "unanswered": [{"instruction": "Say something.", "input": "", "output": None}],
    }
    for row in sets["poisoned"][:poisoned]:
        row["input"] += f" {POISON}"
    info: dict[str, Any] = {name: {"file_name": f"{name}.jsonl"} for name in sets}
    info["texts"]["columns"] = {"prompt": "text"}
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
