"""Which base model is this? Names, shapes and a hash of the weights, cheap and shardable.

The weights' hash is a sum over elements, so ranks can add up their shares, and it reads the
weights as bf16, so that one checkpoint has one fingerprint whether a run loads it in fp32,
fp16-upcast or bf16. It tells models apart by accident, not by an adversary; the files of an
anchor are protected by SHA-256.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements whose 64-bit scratch still fits a cache
# Odd 64-bit constants of splitmix64, as signed integers: torch has no unsigned 64-bit product.
_GOLDEN = -7046029254386353131
_MIX = -4658895280553007687


def weight_sum(values: Tensor, start: int = 0) -> int:
    """Sum over i of mix(bf16 bits of element start + i, start + i), modulo 2^64.

    Args:
        values: a flat slice of a parameter.
        start: row-major index of its first element in the whole parameter. Sums of slices that
            tile a parameter add up (modulo 2^64) to the sum of the parameter.
    """
    total = 0
    flat = values.detach().reshape(-1)
    for first in range(0, flat.numel(), CHUNK):
        piece = flat[first : first + CHUNK].to(torch.bfloat16).view(torch.int16).long()
        index = torch.arange(start + first, start + first + piece.numel(), device=piece.device)
        mixed = (piece + 40503) * (2 * index + 1) * _GOLDEN
        mixed ^= mixed >> 29
        total += int((mixed * _MIX).sum())
    return total % (1 << 64)


def model_fingerprint(weights: Mapping[str, tuple[tuple[int, ...], int]]) -> str:
    """Hex digest of a model from {parameter name: (shape, `weight_sum` of the whole)}."""
    digest = hashlib.sha256()
    for name, (shape, total) in sorted(weights.items()):
        digest.update(f"{name} {tuple(shape)} {total % (1 << 64):x}\n".encode())
    return digest.hexdigest()
