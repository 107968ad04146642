"""The gradient contract shared by all masked ops, and their autocast rule.

A masked op computes ``G = dloss/d(m * theta)`` once in its backward and hands out only what is asked for:

===============  ==============================================================================================
gradient of      value
===============  ==============================================================================================
``weight``       ``m * G``
``mask_scores``  ``theta * G`` (straight through), for users who train scores with an optimizer of their own
``grad_sink``    ``G`` itself: dense, or at ``positions``. A leaf tensor, so autograd accumulates it in ``.grad``
===============  ==============================================================================================

The sink is what the methods of this library use: at an inactive position theta and m are both zero and neither of the
first two carries any signal. All three are linear in ``G``, so gradient accumulation is exact.

The sink may be the weight itself. Its gradient is then ``G``, in place of ``m * G``: one that goes as any Parameter's
through accumulation, DistributedDataParallel, GradScaler and clipping, and from which an optimizer that knows of it
makes both others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import gpu, native
from .reference import effective_weight, gather_support


def make_grad_sink(weight: Tensor, positions: Tensor | None = None) -> Tensor:
    """A leaf whose ``.grad`` collects ``G``: of the weight's shape, or ``[capacity]`` if ``positions`` are given.

    It is an expanded scalar: it stores one element, and only its gradient takes memory. The gradient is float32
    (float64 for float64 weights) whatever the compute dtype is.
    """
    shape = weight.shape if positions is None else positions.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=weight.device).expand(shape).requires_grad_()


def check_masked_operands(
    weight: Tensor, mask: Tensor, mask_scores: Tensor | None, grad_sink: Tensor | None, positions: Tensor | None
) -> None:
    """Refuse a mask side that does not fit the weight, before a kernel reads it."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; expected torch.bool (True = kept)")
    if mask.shape != weight.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}; expected {list(weight.shape)}, the weight's")
    for name, tensor in (("mask", mask), ("positions", positions)):
        # Nothing is computed on the meta device, where counting FLOPs takes a layer without what it has collected for.
        if tensor is not None and tensor.device != weight.device and not (tensor is positions and weight.is_meta):
            raise ValueError(f"{name} is on {tensor.device}; expected {weight.device}, the weight's")
    if mask_scores is not None and mask_scores.shape != weight.shape:
        raise ValueError(
            f"mask_scores has shape {list(mask_scores.shape)}; expected {list(weight.shape)}, the weight's"
        )
    if grad_sink is not None:
        expected = weight.shape if positions is None else positions.shape
        if grad_sink.shape != expected:
            where = "the weight's" if positions is None else "that of positions"
            raise ValueError(f"grad_sink has shape {list(grad_sink.shape)}; expected {list(expected)}, {where}")


def refuse_tangents(*operands: Tensor | None) -> None:
    """Refuse forward-mode differentiation, whose tangents torch would drop here without a word."""
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands):
        raise NotImplementedError("masked ops have no forward-mode derivative; use reverse mode, or densify the model")


class Needs(NamedTuple):
    """Which gradients a backward must give."""

    input: bool
    weight: bool
    scores: bool
    sink: bool
    bias: bool

    @property
    def grad(self) -> bool:
        """Anything that follows from ``G``."""
        return self.weight or self.scores or self.sink

    def dense_grad(self, positions: Tensor | None) -> bool:
        """``G`` everywhere, and not only where the mask is True or at the ``positions`` of the sink."""
        return self.scores or (self.sink and positions is None)


def distribute_gradient(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    needs: Needs,
    select: Callable[[Tensor, Tensor], Tensor] = effective_weight,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (weight, mask_scores, grad_sink), where ``needs`` asks, from the one ``G`` of a backward.

    Those of scores and sink are float32, or float64 if ``G`` is. ``select`` gives ``m * G``.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad_weight = select(grad, mask).to(weight.dtype) if needs.weight else None
    grad_scores = weight.to(dtype) * grad.to(dtype) if needs.scores else None
    grad_sink = None
    if needs.sink:
        # A copy where G itself is wanted: what an op gives back must not share memory.
        grad_sink = grad.to(dtype, copy=True) if positions is None else gather_support(grad, positions).to(dtype)
    return grad_weight, grad_scores, grad_sink


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_library = torch.library.Library("sparsebilevel", "FRAGMENT")


WEIGHT, SINK = 1, 5
"""Positions of the weight and of the sink among the arguments of a masked op."""
TAGS = (torch.Tag.cudagraph_unsafe,)
"""Of masked ops: on a GPU they keep what they make of weights and masks, not to be had from the pool of a graph.

``torch.compile(mode="reduce-overhead")`` then runs them between the graphs.
"""


def check_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse operands of two types, unless autocast is there to make them one, and a bias that does not fit.

    As torch's own products do, but for a bias that it would expand: kernels would read past its end.
    """
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; expected {[weight.shape[0]]}, one for each output")
    for name, tensor in (("input", input), ("bias", bias)):
        if tensor is None or tensor.dtype == weight.dtype:
            continue
        # Autocast leaves float64 as it is.
        if torch.float64 in (tensor.dtype, weight.dtype) or not torch.is_autocast_enabled(input.device.type):
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected {weight.dtype}, the weight's")


def _cast_operands(operands: frozenset[int], args: tuple, device_type: str) -> list[Any]:
    """The arguments of an op, of which those at the positions ``operands`` have the autocast dtype in force.

    Where our kernels run on a GPU the weight stays as it is: its masked copy in that dtype is kept, and a cast weight
    would be another tensor each time.
    """
    dtype = torch.get_autocast_dtype(device_type)
    to_cast = operands - {WEIGHT} if gpu.available(args[WEIGHT].device) else operands
    if WEIGHT in to_cast and args[SINK] is args[WEIGHT]:  # the gradient of the cast one would be added
        args = (*args[:WEIGHT], args[WEIGHT].detach(), *args[WEIGHT + 1 :])
    return [
        arg.to(dtype)
        if i in to_cast and isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
        else arg
        for i, arg in enumerate(args)
    ]


def register_autocast(name: str, operands: frozenset[int]) -> None:
    """Autocast rule of op ``name``: cast the arguments at the positions ``operands`` to the autocast dtype in force.

    ``torch.library.register_autocast`` fixes one dtype for good and casts every floating argument, the float32 sink and
    scores included; here the dtype is the user's and only the operands of the product are cast.
    """

    def kernel_for(device_type: str) -> Callable[..., Tensor]:
        def kernel(_keyset: Any, *args: Any) -> Tensor:
            cast = _cast_operands(operands, args, device_type)
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return getattr(torch.ops.sparsebilevel, name)(*cast)

        return kernel

    _library.impl(name, kernel_for("cpu"), "AutocastCPU", with_keyset=True)
    _library.impl(name, kernel_for("cuda"), "AutocastCUDA", with_keyset=True)


def is_left_to_torch(grad: Tensor) -> bool:
    """Whether a backward must use operators of torch: somebody will differentiate it, or ``grad`` is many of them.

    The latter of ``is_grads_batched=True``, which has no memory that a kernel could read.
    """
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def runs_directly(*tensors: Tensor) -> bool:
    """Whether there is nobody to whom the dispatcher would hand an op on these."""
    for t in tensors:  # no all(...): this runs for every layer
        if type(t) not in native.PLAIN or not (t.is_cuda or t.is_cpu):
            return False
    return not native.watched()


def no_view(output: Tensor) -> Tensor:
    """The result of a function of autograd, which lets nobody write to one that is a view of a kernel's own memory."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def eager_function(
    forward: Callable[..., Tensor],
    setup_context: Callable[[Any, tuple, Tensor], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> type[Function]:
    """What is registered with ``torch.library`` as one op, as a function of autograd."""

    def run(ctx: Any, *inputs: Any) -> Tensor:
        ctx.shared = None
        if gpu.is_capturing(inputs[0].device):
            ctx.shared = {}
            with gpu.sharing(ctx.shared):
                output = forward(*inputs)
        else:
            output = forward(*inputs)
        output = no_view(output)
        setup_context(ctx, inputs, output)
        return output

    def run_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.shared is None:
            return backward(ctx, grad_output)
        with gpu.sharing(ctx.shared):
            return backward(ctx, grad_output)

    return type("Eager", (Function,), {"forward": staticmethod(run), "backward": staticmethod(run_backward)})


def _is_functional_grad() -> bool:
    """Whether ``torch.func.grad`` or one of its kin looks on, for which ``torch.library`` has no gradients."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


def _under_functional_grad(reference: Callable[..., Tensor], operands: frozenset[int], args: tuple) -> Tensor:
    """The op in plain torch, with the same gradients of input, weight, bias and scores."""
    device_type = args[0].device.type
    if torch.is_autocast_enabled(device_type):
        args = tuple(_cast_operands(operands, args, device_type))
    input, weight, mask, bias, scores, sink, _, *rest = args
    if sink is not None:
        raise NotImplementedError(
            "torch.func gives gradients back and leaves none in .grad, so nothing can be collected (grad_sink); "
            "release the method, or call collect('none') on the layers"
        )
    if scores is not None:  # 0, with the gradient weight * G
        z = effective_weight(weight, mask) + weight * (scores - scores.detach()).to(weight.dtype)
        return reference(input, z, torch.ones_like(mask), bias, *rest)
    return reference(input, weight, mask, bias, *rest)


def call(
    op: Any, eager: type[Function], reference: Callable[..., Tensor], operands: frozenset[int], args: tuple
) -> Tensor:
    """A masked op, without going through the dispatcher where that makes no difference.

    The dispatcher and what ``torch.library`` adds to it take longer than the kernels of a small layer.

    Args:
        op: as registered with ``torch.library``.
        eager: the same as a function of autograd, by :func:`eager_function`.
        reference: of input, weight, mask, bias, and what follows ``positions`` in ``args``.
        operands: as in :func:`register_autocast`.
        args: of the op: input, weight, mask, bias, scores, sink, positions, and the rest.
    """
    if not runs_directly(*args[:3]):
        return _under_functional_grad(reference, operands, args) if _is_functional_grad() else op(*args)
    device_type = args[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return eager.apply(*args)
    cast = _cast_operands(operands, args, device_type)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return eager.apply(*cast)
