"""Parts of networks on feature maps in lines: contiguous ``[ceil(B / 16), C, H, W, 16]``, 16 images a line.

The layout of the sparse CPU kernels (csrc/cpu/line_kernels.h). Lanes past the last image of the batch ``B`` hold
anything in maps, and zero in gradients; no sum reads them.

A :class:`Program` is a list of steps on numbered *registers*, each holding maps in lines. It runs as one autograd
function: its backward pass goes through the steps in reverse, so that it knows where gradients meet and adds them up
while they are computed. Maps are float32, or bfloat16 in half the memory; parameters, statistics and all arithmetic are
float32. For use by :mod:`sparsebilevel.layout`; on the CPU, once differentiable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import native, plans
from .gradient import Needs, distribute_gradient, is_left_to_torch, no_view
from .plans import LANES, Geometry, Support, empty, lines_maps, to_lines
from .reference import effective_weight

Pair = tuple[int, int]
Shape = tuple[int, int, int]
"""Channels, height and width of a register."""


class Unfit(Exception):
    """What a program was given is not made of maps that fit together."""


class Convolution(NamedTuple):
    """Operands of a masked convolution; the first four have gradients."""

    weight: Tensor
    bias: Tensor | None
    mask_scores: Tensor | None
    grad_sink: Tensor | None
    mask: Tensor
    positions: Tensor | None
    support: Support
    geometry: Geometry


class Normalization(NamedTuple):
    """Operands of a batch normalization, float32 ``[C]``; the first two have gradients."""

    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor] | None
    """Mean and variance, contiguous; in training they move towards those of the batch by `momentum`."""
    eps: float
    momentum: float
    of_batch: bool
    """Normalize by the statistics of the batch (in training); else by the running ones."""


class Operands(NamedTuple):
    """Of one run, by the numbers that the steps use."""

    convolutions: Sequence[Convolution]
    normalizations: Sequence[Normalization]


# -- a run, forward and backward ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    """Registers and operands of one forward or backward pass."""

    program: Program
    operands: Operands
    dtype: torch.dtype
    """Of the maps."""
    images: int
    shapes: list[Shape]
    terms: Tensor
    """Of all normalizations, [4, C] each: mean, 1 / deviation, and scale and shift of ``scale * x + shift``."""
    values: list[Tensor | None]
    threads: int

    def new(self, register: int) -> Tensor:
        """Memory for a register's maps, or their gradient."""
        channels, height, width = self.shapes[register]
        return empty(-(-self.images // LANES), channels, height, width, LANES, dtype=self.dtype)

    def value(self, register: int) -> Tensor:
        found = self.values[register]
        assert found is not None
        return found

    def term(self, norm: int, row: int) -> int:
        """Address of a row of a normalization's terms."""
        first, channels = self.program.terms[norm]
        return self.terms.data_ptr() + 4 * (4 * first + row * channels)

    def extent(self, register: int) -> list[int]:
        channels, height, width = self.shapes[register]
        return [self.images, channels, height * width, self.dtype == torch.bfloat16]

    def maps(self, register: int) -> tuple[int, int, int, int]:
        """``[B, C, H, W]``."""
        return self.images, *self.shapes[register]

    def reading(self, register: int, norm: int | None, relu: bool) -> tuple:
        """A register as the extension takes it, read through a normalization."""
        through = None if norm is None else (self.term(norm, 2), self.term(norm, 3), relu)
        return lines_maps(self.value(register), self.images, through)


@dataclasses.dataclass
class _Back(_Run):
    """A backward pass: `grads` of the registers, and what it gives for the operands."""

    wanted: list[bool]
    """Registers whose gradient leads to something that asks for it."""
    needs: Sequence[bool]
    """Of inputs and operands, see `Program.convolution_operand` and `norm_operand`."""
    grads: list[Tensor | None]
    found: list[Tensor | None]
    norm_grads: Tensor
    """Of all normalizations, ``[2, C]`` each: weight and bias."""

    def take(self, register: int) -> Tensor | None:
        """The gradient of a register, all of whose uses have been gone through."""
        grad, self.grads[register] = self.grads[register], None
        return grad

    def give(self, register: int, grad: Tensor) -> None:
        """Adds to the gradient of a register; ``grad`` is used up."""
        held = self.grads[register]
        if held is None:
            self.grads[register] = grad
        else:
            held.add_(grad)

    def needs_norm(self, norm: int) -> bool:
        at = self.program.norm_operand(norm)
        return self.needs[at] or self.needs[at + 1]

    def through_norm(
        self, norm: int, relu: bool, grad: Tensor, source: int, activation: Tensor | None, before: Tensor | None
    ) -> None:
        """From the gradient of an activation, which is overwritten, to that of what was normalized.

        ``before`` receives the gradient before the ReLU.
        """
        first, channels = self.program.terms[norm]
        grad_weight = self.norm_grads.data_ptr() + 8 * first
        native.lib.batch_norm_backward(
            self.extent(source),
            grad.data_ptr(),
            self.value(source).data_ptr(),
            native.address(activation),
            self.term(norm, 2),
            self.term(norm, 3),
            self.term(norm, 0),
            self.term(norm, 1),
            relu,
            self.operands.normalizations[norm].of_batch,
            grad.data_ptr(),
            native.address(before),
            grad_weight,
            grad_weight + 4 * channels,
            self.threads,
        )
        if self.wanted[source]:
            self.give(source, grad)


# -- steps -------------------------------------------------------------------------------------------------------------


class Step:
    """One operation of a program."""

    def reads(self) -> Sequence[int]:
        """Registers that the forward pass reads."""
        raise NotImplementedError

    def writes(self) -> int | None:
        """Register that it writes."""
        raise NotImplementedError

    def keeps(self) -> Sequence[int]:
        """Registers that the backward pass reads."""
        return ()

    def shape(self, shapes: list[Shape], operands: Operands) -> Shape | None:
        """Of what it writes; raises Unfit."""
        raise NotImplementedError

    def forward(self, run: _Run) -> None:
        """Carry it out."""
        raise NotImplementedError

    def backward(self, back: _Back) -> None:
        """From the gradient of what it wrote to those of what it read."""
        raise NotImplementedError

    def operand_needs(self, program: Program, needs: Sequence[bool]) -> bool:
        """Whether any operand of its own needs a gradient."""
        return False


@dataclasses.dataclass(frozen=True)
class Convolve(Step):
    """Masked convolution of a register, which it may read through a normalization."""

    source: int
    norm: int | None
    relu: bool
    convolution: int
    out: int

    def reads(self) -> Sequence[int]:
        return (self.source,)

    def writes(self) -> int:
        return self.out

    def keeps(self) -> Sequence[int]:
        return (self.source,)

    def shape(self, shapes: list[Shape], operands: Operands) -> Shape:
        c = operands.convolutions[self.convolution]
        channels, height, width = shapes[self.source]
        expected = c.weight.shape[1] * c.geometry.groups
        if channels != expected:
            raise Unfit(f"input has {channels} channels; weight and groups={c.geometry.groups} ask for {expected}")
        return (c.weight.shape[0], *c.geometry.output_size((height, width), c.weight.shape[2:]))

    def operand_needs(self, program: Program, needs: Sequence[bool]) -> bool:
        at = program.convolution_operand(self.convolution)
        norm = () if self.norm is None else needs[program.norm_operand(self.norm) : program.norm_operand(self.norm) + 2]
        return any(needs[at : at + 4]) or any(norm)

    def forward(self, run: _Run) -> None:
        c = run.operands.convolutions[self.convolution]
        out = run.values[self.out] = run.new(self.out)
        plan = c.support.plan(False, run.maps(self.source), c.weight, c.geometry)
        source = run.reading(self.source, self.norm, self.relu)
        bias, into = plans.checked_bias(c.bias, c.weight), lines_maps(out, run.images)
        plan.forward(c.weight.data_ptr(), False, source, into, native.address(bias), False, run.threads)

    def backward(self, back: _Back) -> None:
        grad = back.take(self.out)
        if grad is None:
            return
        c = back.operands.convolutions[self.convolution]
        at = back.program.convolution_operand(self.convolution)
        need_weight, need_bias, need_scores, need_sink = back.needs[at : at + 4]
        maps = lines_maps(grad, back.images)
        grad_source = None
        if back.wanted[self.source] or (self.norm is not None and back.needs_norm(self.norm)):
            held = back.grads[self.source] if self.norm is None else None
            grad_source = back.new(self.source) if held is None else held
            plan = c.support.plan(True, back.maps(self.source), c.weight, c.geometry)
            into = lines_maps(grad_source, back.images)
            plan.forward(c.weight.data_ptr(), False, maps, into, 0, held is not None, back.threads)
            if self.norm is None:
                back.grads[self.source] = grad_source
        grad_weight = grad_scores = grad_sink = None
        need_weight = need_weight and c.grad_sink is not c.weight
        needs = Needs(False, need_weight, need_scores, need_sink, False)
        if need_scores or (need_sink and c.positions is None):
            # A dense G is a matter for the dense library.
            dense = self._dense_weight_grad(back, grad, c)
            grad_weight, grad_scores, grad_sink = distribute_gradient(dense, c.weight, c.mask, c.positions, needs)
        elif needs.grad:
            grad_weight, grad_sink = plans.weight_grad(
                back.reading(self.source, self.norm, self.relu),
                maps,
                back.maps(self.source),
                c.weight,
                c.support,
                c.mask,
                c.positions if need_sink else None,
                c.geometry,
            )
        grad_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32) if need_bias else None
        back.found[at : at + 4] = (grad_weight if need_weight else None), grad_bias, grad_scores, grad_sink
        if grad_source is not None and self.norm is not None:
            back.through_norm(self.norm, self.relu, grad_source, self.source, None, None)

    def _dense_weight_grad(self, back: _Back, grad: Tensor, c: Convolution) -> Tensor:
        lines = back.value(self.source)
        if self.norm is not None:
            first, channels = back.program.terms[self.norm]
            terms = back.terms[4 * first : 4 * (first + channels)].view(4, channels, 1, 1, 1)
            lines = torch.addcmul(terms[3], lines, terms[2])
            lines = (lines.relu_() if self.relu else lines).to(back.dtype)
        stride, padding, dilation, groups = c.geometry
        z = effective_weight(c.weight, c.mask).to(back.dtype)
        operands = _from_lines(grad, back.images), _from_lines(lines, back.images), z
        _, dense, _ = torch.ops.aten.convolution_backward(
            *operands, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
        )
        return dense.float()


@dataclasses.dataclass(frozen=True)
class Statistics(Step):
    """The terms of a normalization: by the statistics of the register in this batch, or by the running ones."""

    source: int
    norm: int

    def reads(self) -> Sequence[int]:
        return (self.source,)

    def writes(self) -> None:
        return None

    def shape(self, shapes: list[Shape], operands: Operands) -> None:
        return None

    def forward(self, run: _Run) -> None:
        n = run.operands.normalizations[self.norm]
        if n.of_batch:
            if run.images * math.prod(run.shapes[self.source][1:]) == 1:
                size = [run.images, *run.shapes[self.source]]
                raise ValueError(f"batch normalization in training needs more than one value per channel, got {size}")
            weight = None if n.weight is None else n.weight.contiguous()
            bias = None if n.bias is None else n.bias.contiguous()
            native.lib.batch_norm_terms(
                run.extent(self.source),
                run.value(self.source).data_ptr(),
                native.address(weight),
                native.address(bias),
                n.eps,
                0 if n.running is None else n.running[0].data_ptr(),
                0 if n.running is None else n.running[1].data_ptr(),
                n.momentum,
                run.term(self.norm, 0),
                run.threads,
            )
            if n.running is not None:
                torch.autograd.graph.increment_version(list(n.running))
            return
        assert n.running is not None
        first, channels = run.program.terms[self.norm]
        mean, inverse, scale, shift = run.terms[4 * first : 4 * (first + channels)].view(4, channels)
        mean.copy_(n.running[0])
        torch.rsqrt(n.running[1] + n.eps, out=inverse)
        scale.copy_(inverse) if n.weight is None else torch.mul(inverse, n.weight, out=scale)
        torch.mul(mean, scale, out=shift).neg_()
        if n.bias is not None:
            shift.add_(n.bias)

    def backward(self, back: _Back) -> None:
        """Part of what uses the terms."""


@dataclasses.dataclass(frozen=True)
class Normalize(Step):
    """``relu(scale * source + shift + residual)``; residual and ReLU are optional."""

    source: int
    norm: int
    relu: bool
    residual: int | None
    out: int

    def reads(self) -> Sequence[int]:
        return (self.source,) if self.residual is None else (self.source, self.residual)

    def writes(self) -> int:
        return self.out

    def keeps(self) -> Sequence[int]:
        # Without a residual the sign of the activation follows from the source.
        return (self.source, self.out) if self.relu and self.residual is not None else (self.source,)

    def shape(self, shapes: list[Shape], operands: Operands) -> Shape:
        if self.residual is not None and shapes[self.residual] != shapes[self.source]:
            raise Unfit("an addition of maps of two shapes")
        return shapes[self.source]

    def operand_needs(self, program: Program, needs: Sequence[bool]) -> bool:
        at = program.norm_operand(self.norm)
        return any(needs[at : at + 2])

    def forward(self, run: _Run) -> None:
        out = run.values[self.out] = run.new(self.out)
        native.lib.batch_norm_forward(
            run.extent(self.source),
            run.value(self.source).data_ptr(),
            0 if self.residual is None else run.value(self.residual).data_ptr(),
            run.term(self.norm, 2),
            run.term(self.norm, 3),
            self.relu,
            out.data_ptr(),
            run.threads,
        )

    def backward(self, back: _Back) -> None:
        grad = back.take(self.out)
        if grad is None:
            return
        wants_residual = self.residual is not None and back.wanted[self.residual]
        before = None
        if wants_residual:
            assert self.residual is not None
            if self.relu:
                before = back.new(self.residual)
            else:
                before, grad = grad, grad.clone()
        activation = back.values[self.out] if self.relu and self.residual is not None else None
        if back.wanted[self.source] or back.needs_norm(self.norm):
            back.through_norm(self.norm, self.relu, grad, self.source, activation, before if self.relu else None)
        elif before is not None and self.relu:
            assert activation is not None
            torch.mul(grad, activation > 0, out=before)
        if before is not None:
            assert self.residual is not None
            back.give(self.residual, before)


@dataclasses.dataclass(frozen=True)
class Add(Step):
    """The sum of two registers."""

    a: int
    b: int
    out: int

    def reads(self) -> Sequence[int]:
        return self.a, self.b

    def writes(self) -> int:
        return self.out

    def shape(self, shapes: list[Shape], operands: Operands) -> Shape:
        if shapes[self.a] != shapes[self.b]:
            raise Unfit("an addition of maps of two shapes")
        return shapes[self.a]

    def forward(self, run: _Run) -> None:
        run.values[self.out] = torch.add(run.value(self.a), run.value(self.b), out=run.new(self.out))

    def backward(self, back: _Back) -> None:
        grad = back.take(self.out)
        if grad is None:
            return
        if back.wanted[self.b]:
            back.give(self.b, grad.clone() if back.wanted[self.a] else grad)
        if back.wanted[self.a]:
            back.give(self.a, grad)


@dataclasses.dataclass(frozen=True)
class Apply(Step):
    """A differentiable function of maps that treats all images alike, given ``[..., C, H, W, 16]`` in their place.

    The backward pass computes it again.
    """

    function: Callable[[Tensor], Tensor]
    source: int
    out: int

    def reads(self) -> Sequence[int]:
        return (self.source,)

    def writes(self) -> int:
        return self.out

    def keeps(self) -> Sequence[int]:
        return (self.source,)

    def shape(self, shapes: list[Shape], operands: Operands) -> Shape:
        probe = self.function(torch.empty(1, *shapes[self.source], LANES, device="meta"))
        if probe.dim() != 5 or probe.shape[0] != 1 or probe.shape[4] != LANES or not probe.numel():
            raise Unfit("a function that does not give maps")
        return probe.shape[1], probe.shape[2], probe.shape[3]

    def forward(self, run: _Run) -> None:
        run.values[self.out] = self.function(run.value(self.source)).contiguous()

    def backward(self, back: _Back) -> None:
        grad = back.take(self.out)
        if grad is None or not back.wanted[self.source]:
            return
        with torch.enable_grad():
            source = back.value(self.source).detach().requires_grad_()
            out = self.function(source)
        (found,) = torch.autograd.grad(out, source, grad)
        back.give(self.source, found.contiguous())


@dataclasses.dataclass(frozen=True)
class Window(Step):
    """Channels, rows and columns of a register, with a constant around them.

    ``index``: slices of the three; ``before`` and ``after``: how many more there are of each, with ``value``.
    """

    index: tuple[slice, slice, slice]
    before: Shape
    after: Shape
    value: float
    source: int
    out: int

    def reads(self) -> Sequence[int]:
        return (self.source,)

    def writes(self) -> int:
        return self.out

    def shape(self, shapes: list[Shape], operands: Operands) -> Shape:
        taken = (len(range(size)[i]) for size, i in zip(shapes[self.source], self.index, strict=True))
        channels, height, width = map(sum, zip(taken, self.before, self.after, strict=True))
        if not channels * height * width:
            raise Unfit("a window without maps")
        return channels, height, width

    def _taken(self, source: Tensor) -> Tensor:
        """What of the source, or its gradient, there is in the result."""
        channels, rows, cols = self.index
        return source[:, channels, rows, cols]

    def _inside(self, out: Tensor) -> Tensor:
        """The same of the result, or its gradient."""
        sizes = zip(self.before, out.shape[1:4], self.after, strict=True)
        channels, rows, cols = (slice(before, size - after) for before, size, after in sizes)
        return out[:, channels, rows, cols]

    def forward(self, run: _Run) -> None:
        out = run.values[self.out] = run.new(self.out)
        if any((*self.before, *self.after)):
            out.fill_(self.value)
        self._inside(out).copy_(self._taken(run.value(self.source)))

    def backward(self, back: _Back) -> None:
        grad = back.take(self.out)
        if grad is None or not back.wanted[self.source]:
            return
        held = back.grads[self.source]
        if held is None:
            held = back.grads[self.source] = back.new(self.source).zero_()
        self._taken(held).add_(self._inside(grad))


@dataclasses.dataclass(frozen=True)
class MaxPool(Step):
    """Maximum over windows, for settings as ``F.max_pool2d`` takes them (pairs)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    source: int
    out: int

    def reads(self) -> Sequence[int]:
        return (self.source,)

    def writes(self) -> int:
        return self.out

    def keeps(self) -> Sequence[int]:
        return self.source, self.out

    def shape(self, shapes: list[Shape], operands: Operands) -> Shape:
        channels, height, width = shapes[self.source]
        return channels, *Geometry(self.stride, self.padding, self.dilation).output_size((height, width), self.kernel)

    def _arguments(self, run: _Run) -> tuple[list[int], int, bool]:
        size = [*run.shapes[self.source][1:], *run.shapes[self.out][1:]]
        planes = -(-run.images // LANES) * run.shapes[self.source][0]
        settings = [*size, *self.kernel, *self.stride, *self.padding, *self.dilation]
        return settings, planes, run.dtype == torch.bfloat16

    def forward(self, run: _Run) -> None:
        out = run.values[self.out] = run.new(self.out)
        source = run.value(self.source)
        native.lib.max_pool_forward(*self._arguments(run), source.data_ptr(), out.data_ptr(), run.threads)

    def backward(self, back: _Back) -> None:
        grad = back.take(self.out)
        if grad is None or not back.wanted[self.source]:
            return
        found = back.new(self.source)
        lines, out = back.value(self.source), back.value(self.out)
        pointers = lines.data_ptr(), out.data_ptr(), grad.data_ptr(), found.data_ptr()
        native.lib.max_pool_backward(*self._arguments(back), *pointers, back.threads)
        back.give(self.source, found)


# -- ends --------------------------------------------------------------------------------------------------------------


class Maps(NamedTuple):
    """A register leaves a program as maps ``[B, C, H, W]`` in channels_last."""

    source: int

    def leave(self, run: _Run) -> Tensor:
        return _from_lines(run.value(self.source), run.images)

    def enter(self, back: _Back, grad: Tensor) -> Tensor:
        return to_lines(grad, back.dtype)


class Mean(NamedTuple):
    """A register leaves a program as the means of its maps, ``[B, C, 1, 1]``."""

    source: int

    def leave(self, run: _Run) -> Tensor:
        means = run.value(self.source).mean((2, 3))  # [blocks, C, 16]
        return means.transpose(1, 2).reshape(-1, means.shape[1], 1, 1)[: run.images]

    def enter(self, back: _Back, grad: Tensor) -> Tensor:
        channels, height, width = back.shapes[self.source]
        found = back.new(self.source)
        rows = grad.new_zeros(found.shape[0] * LANES, channels)
        torch.div(grad.reshape(-1, channels), height * width, out=rows[: back.images])
        found.copy_(rows.view(-1, LANES, channels).transpose(1, 2)[:, :, None, None])
        return found


End = Maps | Mean


def _from_lines(lines: Tensor, images: int) -> Tensor:
    maps = plans.empty_maps((images, *lines.shape[1:4]), channels_last=True, dtype=lines.dtype)
    return plans.from_lines(lines, maps)


# -- programs ----------------------------------------------------------------------------------------------------------


class Program:
    """Steps on registers; the first registers are what it is given, as ordinary maps.

    Args:
        inputs: how many those are.
        steps: in order; each register is written once.
        ends: what leaves.
        channels: of each normalization.
        convolutions: how many there are.
    """

    def __init__(
        self, inputs: int, steps: Sequence[Step], ends: Sequence[End], channels: Sequence[int], convolutions: int
    ) -> None:
        self.inputs, self.steps, self.ends, self.convolutions = inputs, list(steps), list(ends), convolutions
        written = [step.writes() for step in self.steps]
        self.registers = inputs + sum(register is not None for register in written)
        starts = [0]
        for count in channels:
            starts.append(starts[-1] + count)
        self.terms = list(zip(starts, channels, strict=False))
        self.all_channels = starts[-1]
        self.kept = sorted({register for step in self.steps for register in step.keeps()})
        last_use = {register: i for i, step in enumerate(self.steps) for register in (*step.reads(), step.writes())}
        stays = {end.source for end in self.ends}
        # By step: registers that nobody reads any more, but for the backward pass.
        self._done: list[list[int]] = [[] for _ in self.steps]
        for register, i in last_use.items():
            if register is not None and register not in stays:
                self._done[i].append(register)
        self._shapes: dict[tuple, list[Shape]] = {}
        self._wanted: dict[tuple[bool, ...], list[bool]] = {}  # by needs, of which there are few patterns

    def convolution_operand(self, convolution: int) -> int:
        """Place of a convolution's first operand among all tensors of a run."""
        return self.inputs + 4 * convolution

    def norm_operand(self, norm: int) -> int:
        """Place of a normalization's first operand."""
        return self.inputs + 4 * self.convolutions + 2 * norm

    def shapes(self, inputs: Sequence[Tensor], operands: Operands) -> list[Shape]:
        """Of all registers. Raises Unfit."""
        key = tuple(x.shape for x in inputs)
        # The operands may be others than last time, of a module that was replaced or given other settings.
        whole_key = key, tuple((c.weight.shape, c.geometry) for c in operands.convolutions)
        found = self._shapes.get(whole_key)
        if found is None:
            found = [(0, 0, 0)] * self.registers
            if len({shape[0] for shape in key}) != 1:
                raise Unfit("batches of several sizes")
            for register, size in enumerate(key):
                found[register] = (size[1], size[2], size[3])
            for step in self.steps:
                if isinstance(step, Statistics) and found[step.source][0] != self.terms[step.norm][1]:
                    raise Unfit("a normalization of another number of channels")
                shape, out = step.shape(found, operands), step.writes()
                if shape is not None and out is not None:
                    found[out] = shape
            if len(self._shapes) >= 64:
                self._shapes.clear()
            self._shapes[whole_key] = found
        return found

    def __call__(
        self, inputs: Sequence[Tensor], operands: Operands, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """What leaves, for ordinary maps ``[B, C, H, W]`` of any strides, not empty.

        Maps are of ``dtype``, float32 or bfloat16, inside and when they leave; float32 ones are made bfloat16.

        Raises:
            Unfit: before anything was done, if the inputs are no such maps or do not fit together.
        """
        if any(
            not isinstance(x, Tensor)
            or x.dim() != 4
            or x.dtype not in (torch.float32, dtype)
            or not x.numel()
            or x.device.type != "cpu"
            for x in inputs
        ):
            raise Unfit("an input that is not made of maps")
        # The kernels would read them as what they are not.
        if not all(t is None or (t.dtype == torch.float32 and t.is_cpu) for c in operands.convolutions for t in c[:2]):
            raise Unfit("a weight or a bias that is not float32 in memory")
        shapes = self.shapes(inputs, operands)
        tensors: list[Tensor | None] = [*inputs]
        for c in operands.convolutions:
            tensors += c[:4]
        for n in operands.normalizations:
            tensors += n[:2]
        return _Execute.apply(self, operands, dtype, shapes, torch.is_grad_enabled(), *tensors)

    def forward(self, run: _Run, keep: bool) -> None:
        """Carries out the steps; with ``keep``, what the backward pass needs stays in the registers."""
        kept = set(self.kept) if keep else ()
        for step, done in zip(self.steps, self._done, strict=True):
            step.forward(run)
            for register in done:
                if register not in kept:
                    run.values[register] = None

    def wanted(self, needs: tuple[bool, ...]) -> list[bool]:
        """Which registers lead back to something that needs a gradient."""
        if (known := self._wanted.get(needs)) is not None:
            return known
        found = [*needs[: self.inputs], *[False] * (self.registers - self.inputs)]
        for step in self.steps:
            out = step.writes()
            if out is not None:
                found[out] = step.operand_needs(self, needs) or any(found[r] for r in step.reads())
        self._wanted[needs] = found
        return found


class _Execute(Function):
    @staticmethod
    def forward(
        ctx: Any,
        program: Program,
        operands: Operands,
        dtype: torch.dtype,
        shapes: list[Shape],
        record: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        images = tensors[0].shape[0]  # type: ignore[union-attr]
        values: list[Tensor | None] = [to_lines(x, dtype) for x in tensors[: program.inputs]]  # type: ignore[arg-type]
        values += [None] * (program.registers - program.inputs)
        terms = plans.vectors(4 * program.all_channels)
        run = _Run(program, operands, dtype, images, shapes, terms, values, torch.get_num_threads())
        program.forward(run, keep=record)
        out = tuple(no_view(end.leave(run)) for end in program.ends)
        if record:
            kept = [run.values[register] for register in program.kept]
            # Autograd notices if what the backward pass reads of them has changed.
            read = [t for c in operands.convolutions for t in (c.weight, c.mask, c.positions)]
            ctx.save_for_backward(terms, *kept, *read)
            ctx.program, ctx.operands, ctx.dtype, ctx.shapes, ctx.images = program, operands, dtype, shapes, images
            ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # autograd would leave this path out of some second derivatives, without a word
            raise RuntimeError(
                "a network whose maps stay in lines has no second derivatives (create_graph=True); use "
                'optimize_for_cpu(model, layout="channels_last"), or the model without that call'
            )
        if any(grad is not None and is_left_to_torch(grad) for grad in grads):
            raise RuntimeError(
                "a network whose maps stay in lines takes one gradient at a time (is_grads_batched=True); use "
                'optimize_for_cpu(model, layout="channels_last"), or the model without that call'
            )
        program: Program = ctx.program
        needs = ctx.needs_input_grad[5:]
        terms, *saved = ctx.saved_tensors
        values: list[Tensor | None] = [None] * program.registers
        for register, value in zip(program.kept, saved, strict=False):
            values[register] = value
        back = _Back(
            program,
            ctx.operands,
            ctx.dtype,
            ctx.images,
            ctx.shapes,
            terms,
            values,
            torch.get_num_threads(),
            program.wanted(needs),
            needs,
            [None] * program.registers,
            [None] * len(needs),
            plans.vectors(2 * program.all_channels),
        )
        for end, grad in zip(program.ends, grads, strict=True):
            if grad is not None and back.wanted[end.source]:
                back.give(end.source, end.enter(back, grad))
        used = set()
        for step in reversed(program.steps):
            if isinstance(step, (Convolve, Normalize)) and step.norm is not None and back.grads[step.out] is not None:
                used.add(step.norm)
            step.backward(back)
        for norm, grad in enumerate(back.norm_grads.split([2 * channels for _, channels in program.terms])):
            if norm in used:
                at = program.norm_operand(norm)
                for i, of in enumerate(grad.view(2, -1)):
                    if needs[at + i]:
                        back.found[at + i] = of
        for register in range(program.inputs):
            grad = back.take(register)
            if grad is not None and needs[register]:
                back.found[register] = _from_lines(grad, ctx.images)
        return None, None, None, None, None, *back.found
