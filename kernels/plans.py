"""The sparse CPU kernels as Python calls: convolutions over the non-zeros of a mask (csrc/cpu/masked_conv2d.h).

A *plan* holds the index lists of one mask for one pass and shape. Building it takes time linear in the non-zeros, so
plans are kept, and found again by the mask's content: a mask that was changed in any way whatever, in place, by loading
or by the garbage collector's reuse of its memory, never meets an old plan. The comparison reads one byte a weight.

A linear layer is a 1x1 convolution on 1x1 maps.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native

LANES = 16
"""Images side by side in a line, see csrc/cpu/line_kernels.h."""


class Geometry(NamedTuple):
    """What a convolution is, beside its operands."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, int]:
        """``[P, Q]`` for maps of ``[H, W]``."""
        height, width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(input_size, kernel_size, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width


class Support:
    """Sorted flat positions of a weight, and the plans made for them."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self._plans: dict[tuple, Any] = {}

    def plan(self, input_gradient: bool, maps: Sequence[int], weight: Tensor, geometry: Geometry) -> Any:
        """Plan for input maps of shape ``[B, C, H, W]`` in the forward pass; the gradient's runs the other way."""
        images, channels, *size = maps
        # The number of images is only a matter of how the work is cut up.
        key = (input_gradient, -(-images // LANES), channels, *size, geometry, weight.stride(), native.lib.isa())
        plan = self._plans.get(key)
        if plan is None:
            out_size = geometry.output_size(size, weight.shape[2:])
            shape = [channels, *size, weight.shape[0], *out_size, *weight.shape[2:]]
            shape += [*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups, *weight.stride()]
            positions = self.positions
            plan = native.lib.ConvPlan(shape, input_gradient, positions.data_ptr(), positions.numel(), images)
            self._plans[key] = plan
        return plan


class LearningSupport(Support):
    """Active weights together with positions of a search space, sorted.

    Attributes:
        wanted: int64 ``[capacity]``, where each position of the search space is in ``positions``; -1 for padding.
        active: bool, which of ``positions`` are active.
    """

    def __init__(self, mask: Tensor, search: Tensor) -> None:
        weights = mask.reshape(-1)
        learning = weights.clone()
        learning[search[search >= 0]] = True  # no sorting: there may be millions
        super().__init__(learning.nonzero().squeeze(1))
        self.wanted = torch.where(search >= 0, torch.searchsorted(self.positions, search), -1)
        self.active = weights[self.positions]


def _equal(a: Tensor, b: Tensor) -> bool:
    """torch.equal of tensors of one shape and type, but faster where that is possible."""
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return native.lib.same_bytes(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size())
    return torch.equal(a, b)


class _Memory:
    """Supports by the content of the tensors that they were made from, the least recently used forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple, tuple[tuple[Tensor, ...], Any]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, make: Any, *tensors: Tensor) -> Any:
        # The address only says where to look.
        key = (make, *((t.data_ptr(), t.shape, t.dtype) for t in tensors))
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and all(map(_equal, kept[0], tensors)):
                self._kept.move_to_end(key)
                return kept[1]
        made = make(*tensors)
        with self._lock:
            self._kept[key] = tuple(t.clone() for t in tensors), made
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return made


_memory = _Memory(capacity=4096)


def _active(mask: Tensor) -> Support:
    return Support(mask.reshape(-1).nonzero().squeeze(1))


def _learning(mask: Tensor, positions: Tensor) -> LearningSupport:
    if positions.numel() and int(positions.max()) >= mask.numel():  # the kernels would follow them out of the weight
        raise IndexError(f"positions has {int(positions.max())}; expected less than {mask.numel()}, the weight's size")
    return LearningSupport(mask, positions)


def active_support(mask: Tensor) -> Support:
    """Where ``mask`` (bool) is True."""
    return _memory.find(_active, mask)


def learning_support(mask: Tensor, positions: Tensor) -> LearningSupport:
    """Where ``mask`` is True, and at ``positions`` (int64 ``[capacity]``, negative = padding)."""
    return _memory.find(_learning, mask, positions)


def _maps(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape[0], tensor.stride()


def empty(*size: int) -> Tensor:
    """Uninitialised float32, from memory that is kept between steps (csrc/cpu/pool.h)."""
    return torch.from_numpy(native.lib.pool_array(math.prod(size))).view(size)


def release_memory() -> None:
    """Give back the memory that is kept for the next step."""
    native.lib.pool_release()


def _zeros_like(weight: Tensor) -> Tensor:
    """With the weight's strides, if nothing lies between its elements."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if not dense or weight.numel() < 1 << 16:
        return torch.zeros_like(weight)
    return empty(weight.numel()).zero_().as_strided(weight.shape, weight.stride())


def to_lines(maps: Tensor) -> Tensor:
    """Maps ``[B, C, H, W]`` of any strides to lines ``[ceil(B / 16), C, H, W, 16]``."""
    lines = empty(-(-maps.shape[0] // LANES), *maps.shape[1:], LANES)
    native.lib.to_lines(_maps(maps), list(maps.shape[1:]), lines.data_ptr(), torch.get_num_threads())
    return lines


def from_lines(lines: Tensor, maps: Tensor) -> Tensor:
    """Lines to ``maps [B, C, H, W]`` of any strides, which is returned."""
    native.lib.from_lines(lines.data_ptr(), _maps(maps), list(maps.shape[1:]), torch.get_num_threads())
    return maps


def _is_planar(maps: Tensor) -> bool:
    """Of NCHW maps a strip holds too short a piece of each row: they go through lines as a whole."""
    return maps.stride(1) != 1 and maps.shape[1] * maps.shape[2] * maps.shape[3] > maps.shape[1]


def _source(maps: Tensor) -> tuple[Tensor, tuple]:
    """Maps that kernels read quickly, and as the extension takes them."""
    if _is_planar(maps):
        lines = to_lines(maps)
        return lines, (lines.data_ptr(), maps.shape[0], None)
    maps = maps if maps.stride(1) == 1 else maps.contiguous()
    return maps, _maps(maps)


def _run(plan: Any, weight: Tensor, maps: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
    held, source = _source(maps)
    address, threads = 0 if bias is None else bias.data_ptr(), torch.get_num_threads()
    if _is_planar(result):
        lines = empty(-(-result.shape[0] // LANES), *result.shape[1:], LANES)
        plan.forward(weight.data_ptr(), source, (lines.data_ptr(), result.shape[0], None), address, False, threads)
        return from_lines(lines, result)
    plan.forward(weight.data_ptr(), source, _maps(result), address, False, threads)
    return result


def conv2d(
    input: Tensor, weight: Tensor, support: Support, bias: Tensor | None, geometry: Geometry, output: Tensor
) -> Tensor:
    """Convolution with ``weight`` at ``support``, zero elsewhere, written into ``output``. Float32, any strides."""
    plan = support.plan(False, input.shape, weight, geometry)
    return _run(plan, weight, input, None if bias is None else bias.contiguous(), output)


def conv2d_input_grad(
    grad_output: Tensor, weight: Tensor, support: Support, geometry: Geometry, grad_input: Tensor
) -> Tensor:
    """Gradient of the input ``[B, C, H, W]``, written into ``grad_input``."""
    plan = support.plan(True, grad_input.shape, weight, geometry)
    return _run(plan, weight, grad_output, None, grad_input)


def conv2d_weight_grad(
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    support: Support,
    mask: Tensor,
    positions: Tensor | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor | None]:
    """``m * G`` as a dense tensor, and ``G`` at ``positions`` (int64 ``[capacity]``, negative = padding) if given."""
    source, grad = _source(input), _source(grad_output)  # both hold the memory that they name
    return weight_grad(source[1], grad[1], input.shape, weight, support, mask, positions, geometry)


def weight_grad(
    input: tuple,
    grad_output: tuple,
    input_shape: Sequence[int],
    weight: Tensor,
    support: Support,
    mask: Tensor,
    positions: Tensor | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor | None]:
    """The same for maps as the extension takes them, ``input_shape`` being ``[B, C, H, W]``."""
    threads = torch.get_num_threads()
    if positions is None:
        grad_weight = _zeros_like(weight)
        plan = support.plan(False, input_shape, weight, geometry)
        plan.weight_grad(input, grad_output, grad_weight.data_ptr(), True, threads)
        return grad_weight, None
    learning = learning_support(mask, positions)
    grads = torch.zeros(learning.positions.numel() + 1, dtype=weight.dtype)  # the last one is what padding takes
    plan = learning.plan(False, input_shape, weight, geometry)
    plan.weight_grad(input, grad_output, grads.data_ptr(), False, threads)
    active = torch.where(learning.active, grads[:-1], 0)
    return _zeros_like(weight).put_(learning.positions, active), grads[learning.wanted]
