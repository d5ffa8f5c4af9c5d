"""The reference for scores: each sequence alone, all of its logits, in fp64."""

from typing import Any

import torch

TOLERANCE = 2e-4  # nats of a summed log-likelihood in fp32


@torch.no_grad()
def alone(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Summed log-likelihood of `answer` after `prompt`, in nats."""
    logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].double()
    steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(steps.gather(1, torch.tensor(answer)[:, None]).sum())
