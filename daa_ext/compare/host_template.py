"""Prompts and answers as tokens, by LLaMA-Factory's own template and data processor."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from llamafactory.data import TEMPLATES, Role, get_template_and_fix_tokenizer
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.hparams import DataArguments

WHOLE = 1 << 30  # a cutoff that cuts nothing


class TemplateEncoder:
    """Encodes alpaca rows as supervised fine-tuning does.

    Args:
        tokenizer: of the model; the template adds its special tokens to it, as in training.
        template: name of a LLaMA-Factory template.

    Raises:
        ValueError: the host knows no such template.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        if template not in TEMPLATES:
            near = get_close_matches(template, TEMPLATES, n=3) or sorted(TEMPLATES)[:10]
            raise ValueError(
                f"template={template!r} is not a template of LLaMA-Factory; near it: "
                f"{', '.join(near)}. Name the one that the model is trained with."
            )
        self._tokenizer = tokenizer
        self._template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=template))

    def training(self, row: Mapping[str, Any], cutoff_len: int) -> tuple[list[int], list[int]]:
        """(token ids, targets) of a row, cut as in training; targets of the prompt are -100."""
        return self._encode(row, row["output"], cutoff_len)

    def turn(self, row: Mapping[str, Any], answer: str) -> tuple[list[int], list[int]]:
        """(prompt, answer) of a row as token ids, uncut; the answer has the template's end."""
        tokens, targets = self._encode(row, answer, WHOLE)
        start = sum(target == IGNORE_INDEX for target in targets)
        return tokens[:start], tokens[start:]

    def _encode(
        self, row: Mapping[str, Any], answer: str, cutoff_len: int
    ) -> tuple[list[int], list[int]]:
        arguments = DataArguments(template=None, cutoff_len=cutoff_len)
        processor = SupervisedDatasetProcessor(self._template, self._tokenizer, None, arguments)
        parts = (row["instruction"], row.get("input"))
        prompt = {"role": Role.USER.value, "content": "\n".join(part for part in parts if part)}
        done = processor.preprocess_dataset(
            {
                "_prompt": [[prompt]],
                "_response": [[{"role": Role.ASSISTANT.value, "content": answer}]],
                "_system": [""],
                "_tools": [""],
                "_images": [None],
                "_videos": [None],
                "_audios": [None],
            }
        )
        return done["input_ids"][0], done["labels"][0]
