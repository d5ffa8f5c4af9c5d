"""The ground floor against its formulas in long form: schedule, blend, correction, fingerprint."""

import itertools
from collections.abc import Mapping, Sequence
from math import inf, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daa_ext import fingerprint
from daa_ext.blend import (
    CLIP_EPS,
    clip_factor,
    clipped_blend,
    clipped_combination,
    combined_norm,
)
from daa_ext.correction import correction, similarity, step_scale
from daa_ext.fingerprint import model_fingerprint, weight_sum
from daa_ext.schedule import gamma, is_capped, total_pull

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)
positive = st.floats(1e-6, 1e6)


def random64(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# schedule


@pytest.mark.parametrize(("total", "k0"), [(200, 200.0), (1000, 200.0), (7, 5.5), (1, 0.5)])
def test_gamma_falls_linearly_from_k0_to_one_step_above_zero(total: int, k0: float) -> None:
    shares = [gamma(t, total, k0) for t in range(total)]
    assert shares[0] == pytest.approx(k0 / total)
    assert shares[-1] == pytest.approx(k0 / total / total)
    falls = [a - b for a, b in itertools.pairwise(shares)]
    assert falls == pytest.approx([k0 / total**2] * (total - 1))
    assert not is_capped(total, k0)
    assert total_pull(total, k0) == pytest.approx(k0 / 2 * (1 + 1 / total))


@pytest.mark.parametrize(("total", "k0"), [(100, 200.0), (6, 6.5), (1, 200.0), (5, 1e9)])
def test_gamma_is_capped_where_the_run_is_shorter_than_daa_k0(total: int, k0: float) -> None:
    assert is_capped(total, k0)
    for t in range(total):
        assert gamma(t, total, k0) == pytest.approx(min(1.0, k0 / total * (1 - t / total)))
    assert gamma(0, total, k0) == 1.0
    assert total_pull(total, k0) <= total
    assert total_pull(total, k0) < k0 / 2 * (1 + 1 / total)


def test_gamma_has_no_effect_at_k0_zero() -> None:
    assert [gamma(t, 5, 0.0) for t in range(5)] == [0.0] * 5
    assert total_pull(5, 0.0) == 0.0
    assert all(gamma(t, 5, 1e-9) > 0.0 for t in range(5))


# blend


def torch_clipped(vector: Tensor, max_norm: float) -> Tensor:
    """The vector as torch.nn.utils.clip_grad_norm_ leaves it; max_norm <= 0 clips nothing."""
    holder = torch.nn.Parameter(torch.zeros_like(vector))
    holder.grad = vector.clone()
    if max_norm > 0:
        torch.nn.utils.clip_grad_norm_([holder], max_norm)
    return holder.grad


ANCHOR = random64(37)
DOMAINS = {
    "random": 3.0 * random64(37, seed=1),
    "tiny": 1e-9 * random64(37, seed=1),
    "parallel": 2.0 * ANCHOR,
    "opposed": -ANCHOR,
    "orthogonal": random64(37, seed=2)
    - ANCHOR * torch.dot(random64(37, seed=2), ANCHOR) / ANCHOR.dot(ANCHOR),
    "zero": torch.zeros(37, dtype=torch.float64),
}


def scalars(domain: Tensor) -> dict[str, float]:
    norm, inner = domain.norm().item(), domain.dot(ANCHOR).item()
    return {"domain_norm": norm, "anchor_norm": ANCHOR.norm().item(), "inner": inner}


@pytest.mark.parametrize("max_norm", [0.0, -1.0, 0.5, 1.0, 1e9])
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", DOMAINS)
def test_blend_equals_blending_first_and_clipping_then(
    name: str, share: float, max_norm: float
) -> None:
    domain = DOMAINS[name]
    whole = share * ANCHOR + (1 - share) * domain
    measured = scalars(domain)
    assert combined_norm(share, 1 - share, **measured) == pytest.approx(
        whole.norm().item(), abs=1e-7
    )
    host_clip = clip_factor(measured["domain_norm"], max_norm)
    blend = clipped_blend(share, **measured, host_clip=host_clip, max_norm=max_norm)
    found = blend.anchor * ANCHOR + blend.domain * torch_clipped(domain, max_norm)
    torch.testing.assert_close(found, torch_clipped(whole, max_norm), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize(("anchor", "domain"), [(3.0, 1.0), (1e-9, 1.0), (0.0, 1.0), (-2.0, 0.1)])
def test_any_combination_is_clipped_as_a_whole(
    anchor: float, domain: float, max_norm: float
) -> None:
    gradient = DOMAINS["random"]
    measured = scalars(gradient)
    found = clipped_combination(
        anchor,
        domain,
        **measured,
        host_clip=clip_factor(measured["domain_norm"], max_norm),
        max_norm=max_norm,
    )
    combined = found.anchor * ANCHOR + found.domain * torch_clipped(gradient, max_norm)
    wanted = torch_clipped(anchor * ANCHOR + domain * gradient, max_norm)
    torch.testing.assert_close(combined, wanted, rtol=1e-9, atol=1e-12)


def test_blend_before_clip_differs_from_clip_before_blend() -> None:
    domain = DOMAINS["random"]
    host_clip = clip_factor(domain.norm().item(), 1.0)
    blend = clipped_blend(0.5, **scalars(domain), host_clip=host_clip, max_norm=1.0)
    assert blend.domain * host_clip == pytest.approx(blend.anchor), "equal shares of g_D and g_hat"
    assert blend.domain > 2 * blend.anchor, "not of the clipped g_D, as clipping first would give"


@given(norm=positive, share=st.floats(0.0, 1.0))
@EXAMPLES
def test_combined_norm_survives_cancellation(norm: float, share: float) -> None:
    found = combined_norm(
        share, 1 - share, domain_norm=norm, anchor_norm=norm, inner=-(norm**2) * (1 + 1e-15)
    )
    assert found == pytest.approx(abs(2 * share - 1) * norm, abs=1e-6 * norm)


def test_clip_factor_ends() -> None:
    assert clip_factor(0.0, 1.0) == clip_factor(0.5, 1.0) == clip_factor(1e9, 0.0) == 1.0
    assert clip_factor(4.0, 1.0) == 1.0 / (4.0 + CLIP_EPS)


# correction


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.integers(0, 99), positive)
@EXAMPLES
def test_similarity_is_bounded_and_has_no_scale(
    values: list[float], seed: int, scale: float
) -> None:
    a, b = torch.tensor(values, dtype=torch.float64), random64(len(values), seed=seed)
    inner, norms = a.dot(b).item(), (a.norm().item(), b.norm().item())
    s = similarity(inner, *norms)
    assert 0.0 <= s <= 1.0
    assert similarity(-inner, *norms) == s
    assert similarity(scale * inner, scale * norms[0], norms[1]) == pytest.approx(s)


def test_similarity_of_parallel_orthogonal_opposed_and_zero() -> None:
    norm = ANCHOR.norm().item()
    cases = {"parallel": 1.0, "opposed": 1.0, "orthogonal": 0.0, "zero": 0.0}
    for name, wanted in cases.items():
        other = DOMAINS[name]
        found = similarity(other.dot(ANCHOR).item(), other.norm().item(), norm)
        assert found == pytest.approx(wanted, abs=1e-12), name
    assert similarity(0.0, norm, 0.0) == 0.0
    assert correction(0.0, 0.01) == 0.01


@given(st.floats(0.0, 1.0), st.floats(1e-6, 2.0), st.floats(1.0, 1e6))
@EXAMPLES
def test_a_step_is_at_most_boost_max_times_as_long(s: float, c0: float, boost_max: float) -> None:
    capped, plain = (step_scale(correction(s, c0, cap)).lr for cap in (boost_max, inf))
    assert capped == pytest.approx(min(plain, boost_max))
    assert plain == step_scale(s + c0).lr, "no cap: the paper's equation, bitwise"


@given(c=positive, v=st.floats(0.0, 1e6), eps=st.floats(1e-12, 1.0))
@EXAMPLES
def test_correction_moves_out_of_the_root(c: float, v: float, eps: float) -> None:
    scale = step_scale(c)
    assert (sqrt(v) + eps * scale.eps) / scale.lr == pytest.approx(sqrt(c * v) + eps, rel=1e-12)
    assert scale.lr * scale.weight_decay == pytest.approx(1.0)


CORRECTIONS = [0.01, 1.01, 0.3, 4.0, 0.05]


def scaled_adamw(gradients: Tensor, corrections: Sequence[float]) -> Tensor:
    parameter = torch.nn.Parameter(random64(11))
    adam = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), eps=0.03, weight_decay=0.7)
    group = adam.param_groups[0]
    for gradient, c in zip(gradients, corrections, strict=True):
        scale = step_scale(c)
        group.update(lr=0.1 * scale.lr, eps=0.03 * scale.eps, weight_decay=0.7 * scale.weight_decay)
        parameter.grad = gradient.clone()
        adam.step()
    return parameter.detach()


def equation_9(gradients: Tensor, corrections: Sequence[float]) -> Tensor:
    theta = random64(11)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, (g, c) in enumerate(zip(gradients, corrections, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.95**t)
        theta = theta - 0.1 * 0.7 * theta - 0.1 * m_hat / (torch.sqrt(c * v_hat) + 0.03)
    return theta


def test_scaled_adamw_is_equation_9() -> None:
    gradients = 0.1 * random64(5, 11, seed=3)
    expected = equation_9(gradients, CORRECTIONS)
    found = scaled_adamw(gradients, CORRECTIONS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    plain = scaled_adamw(gradients, [1.0] * 5)
    torch.testing.assert_close(plain, equation_9(gradients, [1.0] * 5), rtol=1e-12, atol=1e-12)
    assert (plain - found).abs().min() > 1e-3, "a correction must have an effect"


def test_correction_does_not_reach_decoupled_weight_decay() -> None:
    still = scaled_adamw(torch.zeros(5, 11, dtype=torch.float64), CORRECTIONS)
    torch.testing.assert_close(still, random64(11) * (1 - 0.1 * 0.7) ** 5, rtol=1e-12, atol=0.0)


# fingerprint


@given(st.lists(st.integers(0, 60), max_size=5), st.integers(1, 9))
@EXAMPLES
def test_fingerprint_slices_add_up(cuts: list[int], chunk: int) -> None:
    values = random64(5, 12).float()
    ends = [0, *sorted(cuts), 60]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "CHUNK", chunk)
        parts = [weight_sum(values.view(-1)[a:b], a) for a, b in itertools.pairwise(ends)]
    assert sum(parts) % (1 << 64) == weight_sum(values)


def test_fingerprint_slices_need_their_place() -> None:
    values = random64(60).float()
    assert weight_sum(values[:30]) + weight_sum(values[30:]) != weight_sum(values)


def named() -> dict[str, Tensor]:
    return {"b.weight": random64(3, 7).float(), "a.bias": random64(7, seed=1).float()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    return model_fingerprint({n: (tuple(t.shape), weight_sum(t)) for n, t in tensors.items()})


def test_fingerprint_ignores_order_and_precision_of_loading() -> None:
    wanted = digest(named())
    assert digest(dict(reversed(named().items()))) == wanted
    bf16 = {name: tensor.bfloat16() for name, tensor in named().items()}
    assert digest(bf16) == wanted
    assert digest({name: tensor.float() for name, tensor in bf16.items()}) == wanted


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_fingerprint_of_shares_that_ranks_add_up_as_signed_numbers(world: int) -> None:
    """int64 sums wrap around, so a total may come back negative."""
    sums = {}
    for name, tensor in named().items():
        length = -(-tensor.numel() // world)
        shares = [
            weight_sum(part, rank * length)
            for rank, part in enumerate(tensor.view(-1).split(length))
        ]
        signed = [share - (1 << 64) if share >= 1 << 63 else share for share in shares]
        sums[name] = (tuple(tensor.shape), int(torch.tensor(signed).sum()))
    assert model_fingerprint(sums) == digest(named())


@pytest.mark.parametrize("change", ["one weight", "swap", "sign", "shape", "name", "missing"])
def test_fingerprint_changes_with(change: str) -> None:
    tensors = named()
    weight = tensors["b.weight"]
    if change == "one weight":
        weight[2, 6] *= 1.01  # bf16 sees relative changes above 1/128
    elif change == "swap":
        weight[0, 0], weight[2, 3] = weight[2, 3].clone(), weight[0, 0].clone()
    elif change == "sign":
        weight[1, 1] *= -1
    elif change == "shape":
        tensors["b.weight"] = weight.view(7, 3)
    elif change == "name":
        tensors["c.weight"] = tensors.pop("b.weight")
    else:
        del tensors["a.bias"]
    assert digest(tensors) != digest(named())
