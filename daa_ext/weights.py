"""Which weights does a model have? Asked of all ranks, wherever each holds its part."""

from collections.abc import Sequence

import torch
from torch import Tensor

from daa_ext.fingerprint import model_fingerprint, weight_sum
from daa_ext.ranks import Ranks
from daa_ext.zero import full_shape, own_share


def weights_fingerprint(named: Sequence[tuple[str, Tensor]], ranks: Ranks) -> str:
    """`model_fingerprint` of the parameters, each rank reading a part. Collective.

    Args:
        named: (name, parameter), the same on all ranks; whole, or taken apart by ZeRO-3.
    """
    shares = own_share(named, ranks.rank, ranks.size)
    own = [weight_sum(flat, fragment.start) for fragment, flat in shares]
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in own]
    sums = ranks.add_up(torch.tensor(signed, device=ranks.device)).tolist()
    return model_fingerprint(
        {name: (full_shape(p), total) for (name, p), total in zip(named, sums, strict=True)}
    )
