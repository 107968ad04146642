"""The sparse CPU kernels as Python calls: convolutions over the non-zeros of a mask (csrc/cpu/masked_conv2d.h).

A *plan* holds the index lists of one mask for one pass and shape. Building it takes time linear in the non-zeros, so
plans are kept, and found again by the mask's content: a mask that was changed in any way whatever, in place, by loading
or by the garbage collector's reuse of its memory, never meets an old plan. The comparison reads one byte a weight.

A linear layer is a 1x1 convolution on 1x1 maps. Maps and weights are float32 or bfloat16; all sums are float32.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import native

LANES = 16
"""Images side by side in a line, see csrc/cpu/line_kernels.h."""


_LARGE = 1 << 16  # elements from which on memory is worth keeping


class Geometry(NamedTuple):
    """What a convolution is, beside its operands."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, int]:
        """``[P, Q]`` for maps of ``[H, W]``; ValueError if the kernel does not fit."""
        height, width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(input_size, kernel_size, self.stride, self.padding, self.dilation, strict=True)
        )
        if height < 1 or width < 1:
            raise ValueError(f"input has maps of {list(input_size)}, too small for {list(kernel_size)} windows, {self}")
        return height, width


class Support:
    """Where a mask is True, and the plans made for it.

    Attributes:
        non_zeros: how many weights that are.
    """

    MOST_PLANS = 16  # for maps of so many sizes, and batches

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self.non_zeros = int(mask.sum())
        self._plans: dict[tuple, Any] = {}

    @functools.cached_property
    def positions(self) -> Tensor:
        """Flat, row-major, ascending; int64 ``[non_zeros]``. Made when a kernel asks, since there may be millions."""
        return self._mask.reshape(-1).nonzero().squeeze(1)

    def plan(
        self,
        input_gradient: bool,
        maps: Sequence[int],
        weight: Tensor,
        geometry: Geometry,
        operands: Sequence[Tensor | tuple] = (),
    ) -> Any:
        """Plan for input maps of shape ``[B, C, H, W]`` in the forward pass; the gradient's runs the other way.

        ``operands``: the maps that it will get. Ordinary tensors have plans of their own, by their layout and the size
        of the batch: where 16 images would leave lanes empty, pixels take them.
        """
        images, channels, *size = maps
        layout = _layout(operands)
        cut = -(-images // LANES) if layout == "lines" else images
        key = (input_gradient, layout, cut, channels, *size, geometry, weight.stride(), native.lib.isa())
        plan = self._plans.get(key)
        if plan is None:
            out_size = geometry.output_size(size, weight.shape[2:])
            shape = [channels, *size, weight.shape[0], *out_size, *weight.shape[2:]]
            shape += [*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups, *weight.stride()]
            positions = self.positions
            plan = native.lib.ConvPlan(
                *(shape, input_gradient, positions.data_ptr(), positions.numel(), images),
                getattr(native.lib.MapsLayout, layout),
            )
            while len(self._plans) >= self.MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan
        return plan


class LearningSupport(Support):
    """Where a mask is True, and at the positions of a search space (int64 ``[capacity]``, negative = padding).

    Attributes:
        wanted: int64 ``[capacity]``, where each position of the search space is in ``positions``; -1 for padding.
        active: bool, which of ``positions`` are active.
    """

    def __init__(self, mask: Tensor, search: Tensor) -> None:
        if search.numel() and int(search.max()) >= mask.numel():  # the kernels would follow it out of the weight
            raise IndexError(f"positions has {int(search.max())}; expected less than {mask.numel()}, the weight's size")
        learning = mask.flatten().clone()
        learning[search[search >= 0]] = True  # no sorting: there may be millions
        super().__init__(learning)
        self.wanted = torch.where(search >= 0, torch.searchsorted(self.positions, search), -1)
        self.active = mask.reshape(-1)[self.positions]


def _equal(a: Tensor, b: Tensor) -> bool:
    """torch.equal of tensors of one shape and type, but faster where that is possible."""
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return native.lib.same_bytes(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size())
    return torch.equal(a, b)


class _Memory:
    """Supports by the content of the tensors that they are made from.

    Those whose tensors are gone are forgotten when the next one is made, and beyond ``capacity`` the least recently
    used. A storage says when it is gone; a weak reference to a tensor would keep torch from swapping it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple, tuple[list[Tensor], Any, list[StorageWeakRef]]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, make: type[Support], *tensors: Tensor) -> Any:
        # The address only says where to look.
        key = (make, *((t.data_ptr(), t.shape, t.dtype) for t in tensors))
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and all(map(_equal, kept[0], tensors)):
                self._kept.move_to_end(key)
                return kept[1]
        copies = [t.clone() for t in tensors]
        made = make(*copies)
        owners = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        with self._lock:
            for gone in [k for k, (*_, of) in self._kept.items() if any(owner.expired() for owner in of)]:
                del self._kept[gone]
            self._kept[key] = copies, made, owners
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


_memory = _Memory(capacity=4096)


def active_support(mask: Tensor) -> Support:
    """Where ``mask`` (bool) is True."""
    return _memory.find(Support, mask)


def learning_support(mask: Tensor, positions: Tensor) -> LearningSupport:
    """Where ``mask`` is True, and at ``positions`` (int64 ``[capacity]``, negative = padding)."""
    return _memory.find(LearningSupport, mask, positions)


def is_bfloat16(tensor: Tensor) -> bool:
    """As the extension is told the type of what it is given: bfloat16, or else float32."""
    return tensor.dtype == torch.bfloat16


def _maps(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), is_bfloat16(tensor), tensor.shape[0], tensor.stride()


def lines_maps(lines: Tensor, images: int, through: tuple[int, int, bool] | None = None) -> tuple:
    """Maps in lines as the extension takes them: ``through`` addresses of scale and shift, and whether with ReLU."""
    return lines.data_ptr(), is_bfloat16(lines), images, through


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised, from memory that is kept between steps (csrc/cpu/pool.h)."""
    count = math.prod(size)
    if dtype == torch.float32:
        return torch.from_numpy(native.lib.pool_array(count)).view(size)
    return torch.from_numpy(native.lib.pool_array(-(-count // 2))).view(torch.bfloat16)[:count].view(size)


def empty_maps(size: Sequence[int], channels_last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised maps ``[B, C, H, W]``; large ones from the memory that is kept, which saves touching new pages."""
    if math.prod(size) < _LARGE:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format)
    # ``.data``: a view that leaves an autograd function may not be written to by what follows.
    if not channels_last:
        return empty(*size, dtype=dtype).data
    images, channels, height, width = size
    return empty(images, height, width, channels, dtype=dtype).permute(0, 3, 1, 2).data


def vectors(*size: int) -> Tensor:
    """Uninitialised float32 for the extension to write, whatever the defaults for new tensors are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def release_memory() -> None:
    """Give back the memory that is kept for the next step."""
    if native.available():
        native.lib.pool_release()
    _memory.clear()


def _zeros_like(weight: Tensor) -> Tensor:
    """With the weight's strides, if nothing lies between its elements."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if not dense or weight.numel() < _LARGE:
        return torch.zeros_like(weight)
    return empty(weight.numel(), dtype=weight.dtype).zero_().as_strided(weight.shape, weight.stride())


def to_lines(maps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Maps ``[B, C, H, W]`` of any strides to lines ``[ceil(B / 16), C, H, W, 16]``, of their type or another."""
    maps = native.in_memory(maps)
    lines = empty(-(-maps.shape[0] // LANES), *maps.shape[1:], LANES, dtype=dtype or maps.dtype)
    address, threads = lines.data_ptr(), torch.get_num_threads()
    native.lib.to_lines(_maps(maps), list(maps.shape[1:]), address, is_bfloat16(lines), threads)
    return lines


def from_lines(lines: Tensor, maps: Tensor) -> Tensor:
    """Lines to ``maps [B, C, H, W]`` of any strides, which is returned."""
    address, threads = lines.data_ptr(), torch.get_num_threads()
    native.lib.from_lines(address, is_bfloat16(lines), _maps(maps), list(maps.shape[1:]), threads)
    return maps


def _is_planar(maps: Tensor) -> bool:
    """Of NCHW maps a strip of 16 images holds too short a piece of each row: they go through lines as a whole."""
    return maps.stride(1) != 1 and maps.shape[1] * maps.shape[2] * maps.shape[3] > maps.shape[1]


def _layout(operands: Sequence[Tensor | tuple]) -> str:
    """The name of a layout of csrc/cpu/masked_conv2d.h."""
    maps = [m for m in operands if isinstance(m, Tensor)]
    if not maps or len(maps) < len(operands):
        return "lines"
    return "planes" if any(map(_is_planar, maps)) else "pixels"


def _source(maps: Tensor | tuple, plan: Any) -> tuple[Any, tuple]:
    """Maps that the plan's kernels read quickly, and as the extension takes them; lines are such already."""
    if isinstance(maps, tuple):
        return None, maps
    maps = native.in_memory(maps)
    if plan.has_pixel_lanes:
        return maps, _maps(maps)
    if _is_planar(maps):
        lines = to_lines(maps)
        return lines, lines_maps(lines, maps.shape[0])
    maps = maps if maps.stride(1) == 1 else maps.contiguous()
    return maps, _maps(maps)


def _run(plan: Any, weight: Tensor, maps: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
    held, source = _source(maps, plan)
    address, threads = 0 if bias is None else bias.data_ptr(), torch.get_num_threads()
    values = weight.data_ptr(), is_bfloat16(weight)
    if _is_planar(result) and not plan.has_pixel_lanes:
        lines = empty(-(-result.shape[0] // LANES), *result.shape[1:], LANES, dtype=result.dtype)
        plan.forward(*values, source, lines_maps(lines, result.shape[0]), address, False, threads)
        return from_lines(lines, result)
    plan.forward(*values, source, _maps(result), address, False, threads)
    return result


def checked_bias(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """Contiguous float32; ValueError if it does not fit the weight, since kernels would read past its end."""
    if bias is None:
        return None
    if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
        raise ValueError(
            f"bias is {bias.dtype} of shape {list(bias.shape)}; expected {weight.dtype} of {[weight.shape[0]]}"
        )
    return bias.float().contiguous()


def conv2d(
    input: Tensor, weight: Tensor, support: Support, bias: Tensor | None, geometry: Geometry, output: Tensor
) -> Tensor:
    """Convolution with ``weight`` at ``support``, zero elsewhere, written into ``output``. Any strides."""
    plan = support.plan(False, input.shape, weight, geometry, (input, output))
    return _run(plan, weight, input, checked_bias(bias, weight), output)


def conv2d_input_grad(
    grad_output: Tensor, weight: Tensor, support: Support, geometry: Geometry, grad_input: Tensor
) -> Tensor:
    """Gradient of the input ``[B, C, H, W]``, written into ``grad_input``."""
    plan = support.plan(True, grad_input.shape, weight, geometry, (grad_output, grad_input))
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
    return weight_grad(input, grad_output, input.shape, weight, support, mask, positions, geometry)


def weight_grad(
    input: Tensor | tuple,
    grad_output: Tensor | tuple,
    input_shape: Sequence[int],
    weight: Tensor,
    support: Support,
    mask: Tensor,
    positions: Tensor | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor | None]:
    """The same, also for maps in lines as the extension takes them, ``input_shape`` being ``[B, C, H, W]``."""

    def run(support: Support, weight: Tensor, grads: Tensor, scatter: bool) -> None:
        plan = support.plan(False, input_shape, weight, geometry, (input, grad_output))
        source, grad = _source(input, plan), _source(grad_output, plan)  # both hold the memory that they name
        address, threads = grads.data_ptr(), torch.get_num_threads()
        plan.weight_grad(source[1], grad[1], address, is_bfloat16(grads), scatter, threads)

    if positions is None:
        grad_weight = _zeros_like(weight)
        # Of the gradient's strides: they differ from the weight's if that is a slice of something.
        run(support, grad_weight, grad_weight, True)
        return grad_weight, None
    learning = learning_support(mask, positions)
    grads = vectors(learning.positions.numel() + 1).zero_()  # the last one is what padding takes
    run(learning, weight, grads, False)
    active = torch.where(learning.active, grads[:-1], 0).to(weight.dtype)
    grad_weight = _zeros_like(weight)
    if torch.are_deterministic_algorithms_enabled():  # these refuse put_, which is the faster, though none comes twice
        flat = active.new_zeros(weight.numel()).scatter_(0, learning.positions, active)
        return grad_weight.copy_(flat.view(weight.shape)), grads[learning.wanted]
    return grad_weight.put_(learning.positions, active), grads[learning.wanted]
