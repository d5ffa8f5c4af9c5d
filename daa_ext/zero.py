"""What DeepSpeed's optimizers do with parameters and gradients. The only reader of its internals.

Read at deepspeed 0.19.8: runtime/zero/{stage_1_and_2,stage3,parameter_offload}.py,
runtime/fp16/{fused,unfused}_optimizer.py, runtime/engine.py. What is relied on:

    engine.optimizer           the wrapper (or, ZeRO-0 in fp32, the optimizer itself)
    ZeRO-1/2                   flat fp32 partition per group; its order is that of
                               round_robin_bit16_groups, not that of bit16_groups
    ZeRO-3                     flat fp32 partition per sub-group: its parameters' parts, each of
                               partition_numel() elements, padded at the last ranks
    averaged_gradients         gradients of the partition from the end of backward to the step
    <fp32 partition>.grad      the same where the optimizer is offloaded to the CPU
    clipping                   g / (max(1, (norm + 1e-6) / clip) * loss scale), just before the
                               inner step

Every run checks them: fragments must tile the model (`Layout.check`) and have the engine's norm
(`check_norm`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import isclose
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from daa_ext.blend import clip_factor
from daa_ext.fragments import Fragment, Shape, cut, share, whole
from daa_ext.layout import Buffer, Layout, Replicated

Names = Mapping[int, str]  # id(parameter) -> name


class Partitioned(Layout):
    """A ZeRO optimizer that steps one flat fp32 partition per group (1, 2) or sub-group (3).

    Subclasses say which fragments lie in a partition (`_group`), and, where the optimizer is not
    offloaded, which gradients (`_averaged`).
    """

    sharded = True

    def __init__(self, zero: Any, partitions: Sequence[Tensor], rank: int) -> None:
        self._zero = zero
        self._buffers = [Buffer(flat, self._group(i, rank)) for i, flat in enumerate(partitions)]

    def buffers(self) -> list[Buffer]:
        return self._buffers

    def fragments_of(self, rank: int) -> list[Fragment]:
        return [f for index in range(len(self._buffers)) for f in self._group(index, rank)]

    def raw(self) -> Iterator[tuple[Fragment, Tensor]]:
        for index, buffer in enumerate(self._buffers):
            if _offloads(self._zero):
                yield from _from_flat(buffer)
            else:
                gradients = self._zero.averaged_gradients[index]
                yield from self._averaged(buffer.fragments, gradients)

    def loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    def _group(self, index: int, rank: int) -> list[Fragment]:
        raise NotImplementedError

    def _averaged(
        self, fragments: list[Fragment], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[Fragment, Tensor]]:
        raise NotImplementedError


class PartitionedGroups(Partitioned):
    """ZeRO-1 and 2 (DeepSpeedZeroOptimizer), with or without CPU offload and round robin."""

    def __init__(self, zero: Any, names: Names, rank: int) -> None:
        self._groups = [
            [(names[id(p)], tuple(p.shape)) for p in parameters]
            for parameters in zero.round_robin_bit16_groups
        ]
        # Newer 0.19 can pad parameters to an alignment of their own.
        self._offsets = getattr(zero, "round_robin_bit16_offsets", None) or [
            [0, *accumulate(p.numel() for p in parameters)][:-1]
            for parameters in zero.round_robin_bit16_groups
        ]
        self._lengths = [int(length) for length in zero.partition_size]
        super().__init__(zero, zero.single_partition_of_fp32_groups, rank)

    def _group(self, index: int, rank: int) -> list[Fragment]:
        begin = rank * self._lengths[index]
        end = begin + self._lengths[index]
        return cut(self._groups[index], self._offsets[index], begin, end)

    def _averaged(
        self, fragments: list[Fragment], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[Fragment, Tensor]]:
        at = {fragment.offset: fragment for fragment in fragments}
        offset = 0
        for gradient in gradients:
            if offset in at:  # else padding
                assert gradient.numel() == at[offset].numel
                yield at[offset], gradient.reshape(-1)
            offset += gradient.numel()


class PartitionedParameters(Partitioned):
    """ZeRO-3 (DeepSpeedZeroOptimizer_Stage3), with or without CPU offload."""

    cuts_every_parameter = True

    def __init__(self, zero: Any, names: Names, rank: int, world_size: int) -> None:
        self._world_size = world_size
        self._groups: list[list[tuple[str, Shape, int]]] = []
        for parameters in zero.fp16_groups:
            offsets = [0, *accumulate(p.partition_numel() for p in parameters)]
            pairs = zip(parameters, offsets, strict=False)  # the last offset is the end
            self._groups.append([(names[id(p)], full_shape(p), offset) for p, offset in pairs])
        super().__init__(zero, zero.fp32_partitioned_groups_flat, rank)

    def _group(self, index: int, rank: int) -> list[Fragment]:
        return [
            share(name, shape, rank, self._world_size, offset)
            for name, shape, offset in self._groups[index]
        ]

    def _averaged(
        self, fragments: list[Fragment], gradients: Sequence[Tensor]
    ) -> Iterator[tuple[Fragment, Tensor]]:
        for fragment, gradient in zip(fragments, gradients, strict=True):
            yield fragment, gradient.reshape(-1)[: fragment.numel]


class Mirrored(Replicated):
    """ZeRO-0 in bf16 or fp16: the optimizer steps fp32 copies, flat per group or one by one."""

    def __init__(self, wrapper: Any, named: Sequence[tuple[str, Tensor]], names: Names) -> None:
        self._wrapper = wrapper
        buffers = []
        for index, parameters in enumerate(wrapper.fp16_groups):
            shapes = [(names[id(p)], tuple(p.shape)) for p in parameters]
            if hasattr(wrapper, "fp32_groups_flat"):
                offsets = [0, *accumulate(p.numel() for p in parameters)][:-1]
                flat = wrapper.fp32_groups_flat[index]
                buffers.append(Buffer(flat, cut(shapes, offsets, 0, flat.numel())))
            else:
                copies = wrapper.fp32_groups[index]
                buffers += [
                    Buffer(copy, [whole(name, shape)])
                    for copy, (name, shape) in zip(copies, shapes, strict=True)
                ]
        super().__init__(named, buffers)

    def loss_scale(self) -> float:
        return float(self._wrapper.loss_scale_config.cur_scale)


def _from_flat(buffer: Buffer) -> Iterator[tuple[Fragment, Tensor]]:
    flat = buffer.parameter.grad
    assert flat is not None
    for fragment in buffer.fragments:
        yield fragment, flat[fragment.offset : fragment.offset + fragment.numel]


def layout_of(
    engine: Any, named: Sequence[tuple[str, Tensor]], rank: int, world_size: int
) -> Layout:
    """The layout of a DeepSpeed engine whose configuration `ds_config.refuse` has let pass.

    Raises:
        ValueError: expert groups, or an optimizer wrapper that this version does not know.
    """
    if getattr(engine, "has_moe_layers", False):
        raise ValueError(
            "The model has DeepSpeed MoE layers: their experts shard in another way, which DAA "
            "does not serve. Use a model without them."
        )
    names = {id(parameter): name for name, parameter in named}
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer":
        layout: Layout = PartitionedGroups(wrapper, names, rank)
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        layout = PartitionedParameters(wrapper, names, rank, world_size)
    elif kind in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
        layout = Mirrored(wrapper, named, names)
    elif isinstance(wrapper, Optimizer):
        layout = Replicated(named)
    else:
        raise ValueError(
            f"DeepSpeed runs the optimizer in {kind}, which DAA does not know. Use ZeRO 0, 1, 2 or "
            "3 as in deepspeed_configs/ (docs/zero.md has the whole table)."
        )
    layout.check({name: full_shape(parameter) for name, parameter in named}, world_size)
    return layout


def is_offloaded(engine: Any) -> bool:
    """Whether the inner optimizer and its fp32 partition live in host memory."""
    return _offloads(engine.optimizer)


def _offloads(wrapper: Any) -> bool:
    return bool(getattr(wrapper, "cpu_offload", getattr(wrapper, "offload_optimizer", False)))


def host_factor(layout: Layout, scaled_norm: float, max_norm: float) -> float:
    """What the engine multiplies `raw` by before the inner step: clipping and loss scale.

    Args:
        scaled_norm: ||g|| as `raw` has it. The loss scale may have changed since.
    """
    scale = layout.loss_scale()
    return clip_factor(scaled_norm / scale, max_norm) / scale


def check_norm(engine: Any, norm: float) -> None:
    """Raise ValueError unless the engine found the same gradient norm as we did."""
    theirs = engine.get_global_grad_norm()
    if theirs is not None and not isclose(float(theirs), norm, rel_tol=1e-2, abs_tol=1e-12):
        raise ValueError(
            f"DeepSpeed's gradient norm is {float(theirs):.6g}, the fragments that daa_ext reads "
            f"have {norm:.6g}: this DeepSpeed keeps its gradients elsewhere. Install a deepspeed "
            "of the tested range (daa doctor)."
        )


def full_shape(parameter: Tensor) -> Shape:
    """The shape of a parameter, also where ZeRO-3 has taken it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_share(
    named: Iterable[tuple[str, Tensor]], rank: int, world_size: int
) -> Iterator[tuple[Fragment, Tensor]]:
    """(fragment, its weights, flat): an equal part of the model's weights for every rank.

    Under ZeRO-3 it is the part that lies here; else a slice of what every rank has.
    """
    for name, parameter in named:
        fragment = share(name, full_shape(parameter), rank, world_size)
        if hasattr(parameter, "ds_tensor"):
            yield fragment, parameter.ds_tensor.detach().reshape(-1)[: fragment.numel]
        else:
            flat = parameter.detach().reshape(-1)
            yield fragment, flat[fragment.start : fragment.start + fragment.numel]
