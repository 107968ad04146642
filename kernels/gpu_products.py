"""The products of a masked layer on a GPU, each on the backend that :mod:`.dispatch` chooses.

A linear layer, and a 1x1 convolution in channels_last, is a product of matrices: rows are tokens, or pixels. All
results of the weight gradient are linear in ``G``, so they add up over micro-batches and processes, whatever
the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import block_sparse, cuda_weight_grad, dense, gpu
from .block_sparse import Geometry
from .dispatch import Backend, Structure, choose_product
from .gradient import Needs
from .measurements import Window

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def structure_of(mask: Tensor, tiles: bool = True, positions: Tensor | None = None) -> Structure:
    """What a mask drops as a whole; nothing where that is not known and may not be asked for.

    Args:
        mask: of the layer.
        tiles: whether there are kernels for tiles.
        positions: at which a sink wants ``G``: what holds one of them is not dropped.
    """
    found = block_sparse.look(mask, positions)
    return Structure() if found is None else found.structure(tiles)


def window_of(weight: Tensor, geometry: Geometry) -> Window | None:
    """What measurements and choices know a convolution by; None if it is a product of matrices."""
    (sy, sx), (py, px), (dy, dx), groups = geometry
    r, s = weight.shape[2:]
    if r == s == sy == sx == groups == 1 and py == px == 0:
        return None
    return Window((r, s), (sy, sx), (dy, dx), groups)


def _choose(
    product: str,
    rows: Tensor,
    weight: Tensor,
    mask: Tensor,
    needs: Needs | None = None,
    positions: Tensor | None = None,
    window: Window | None = None,
    tiles: bool = True,
) -> tuple[Backend, int, Any]:
    """Backend of a product of ``rows``, or of the pixels of maps, the side of its tiles, and what holds them.

    The last is an :class:`.block_sparse.Occupancy` where the backend needs one.
    """
    dense_grad = needs is not None and needs.dense_grad(positions)
    at = positions if needs is not None and needs.sink and not dense_grad else None
    grouped = window is not None and window.groups > 1
    held = None if grouped else block_sparse.look(mask, at)
    structure = Structure() if held is None else held.structure(tiles)
    count = rows.numel() // max(rows.shape[1], 1)
    options: dict[str, Any] = {"dense_grad": dense_grad, "window": window}
    chosen = choose_product(product, rows.dtype, rows.device, count, tuple(weight.shape), structure, **options)
    return *chosen, held


def linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """``x [T, K] @ (mask * weight).T + bias``; weight and mask ``[N, K]``, or ``[N, K, 1, 1]``."""
    backend, block, held = _choose("forward", x, weight, mask)
    if backend.name == "fused" and _is_plain(weight, mask):
        from . import triton_matmul

        return triton_matmul.masked_matmul(x.contiguous(), weight.flatten(1), mask.flatten(1), bias)
    z = _matrix(dense.effective_weight(weight, mask, x.dtype))
    if backend.name == "block":
        return held.layout(block).forward(x.contiguous(), z, bias)
    if backend.name == "slice":
        cut = held.slices()
        out = torch.mm(cut.inputs(x, 1), cut.weight(z).t())
        out = cut.expand_outputs(out, 1, weight.shape[0])
        return out if bias is None else out.add_(bias)
    return torch.nn.functional.linear(x, z, bias)


def linear_input_grad(dy: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """``dy [T, N] @ (mask * weight)``."""
    backend, block, held = _choose("input_grad", dy, weight, mask)
    if backend.name == "fused" and _is_plain(weight, mask):
        from . import triton_matmul

        return triton_matmul.masked_matmul(dy.contiguous(), weight.flatten(1), mask.flatten(1), input_grad=True)
    z = _matrix(dense.effective_weight(weight, mask, dy.dtype))
    if backend.name == "block":
        return held.layout(block).input_grad(dy.contiguous(), z)
    if backend.name == "slice":
        cut = held.slices()
        return cut.expand_inputs(torch.mm(cut.outputs(dy, 1), cut.weight(z)), 1, weight.shape[1])
    return torch.mm(dy, z)


def linear_weight_grad(
    dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, positions: Tensor | None, needs: Needs
) -> Grads:
    """Gradients of weight, scores and sink, in the shape of the weight, where ``needs`` asks."""
    backend, block, held = _choose("weight_grad", x, weight, mask, needs, positions)
    if backend.name == "block" and _is_plain(weight, mask):
        given, dtype = _block_grad(_matrix(mask), weight, needs)
        grad = held.layout(block).weight_grad(dy.contiguous(), x.contiguous(), given, dtype)
        grad = grad if weight.dim() == 2 else grad.view(weight.shape)
        return _of_blocks(grad, weight, mask, positions, needs)
    if backend.name == "slice":
        cut = held.slices()
        grad = torch.mm(cut.outputs(dy, 1).t(), cut.inputs(x, 1))
        grad = cut.expand_inputs(cut.expand_outputs(grad, 0, weight.shape[0]), 1, weight.shape[1])
        return dense.distribute(grad.view(weight.shape), weight, mask, positions, needs)
    if backend.name == "fused" and positions is None and _is_plain(weight, mask):
        wanted = {"need_weight": needs.weight, "need_scores": needs.scores, "need_sink": needs.sink}
        grads = fused_weight_grad(dy.contiguous(), x.contiguous(), weight.flatten(1), mask.flatten(1), **wanted)
        return tuple(None if grad is None else grad.view(weight.shape) for grad in grads)  # type: ignore[return-value]
    if x.is_cuda and x.dtype.itemsize == 2 and positions is None and not (needs.weight or needs.scores):
        # Only G is wanted, as by a shared gradient. The library writes it as it was summed: no rounding, and no pass.
        return None, None, torch.mm(dy.t(), x, out_dtype=torch.float32).view(weight.shape)
    return dense.distribute(torch.mm(dy.t(), x).view(weight.shape), weight, mask, positions, needs)


def fused_weight_grad(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, **wanted: bool) -> Grads:
    """:func:`.triton_matmul.weight_grad`, in CUDA where there is a kernel for it."""
    if cuda_weight_grad.takes(dy, x, weight, mask):
        return cuda_weight_grad.weight_grad(dy, x, weight, mask, **wanted)
    from . import triton_matmul

    return triton_matmul.weight_grad(dy, x, weight, mask, **wanted)


def _block_grad(mask: Tensor, weight: Tensor, needs: Needs) -> tuple[Tensor | None, torch.dtype]:
    """Mask and type for the gradient in the kept tiles: with a sink ``G`` itself, unrounded, of which all follows."""
    return (None, torch.float32) if needs.sink else (mask, weight.dtype)


def _of_blocks(grad: Tensor, weight: Tensor, mask: Tensor, positions: Tensor | None, needs: Needs) -> Grads:
    return dense.distribute(grad, weight, mask, positions, needs) if needs.sink else (grad, None, None)


def _pixels(maps: Tensor) -> Tensor:
    """Maps ``[B, C, H, W]`` in channels_last as rows ``[B * H * W, C]``."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse, of the sizes of ``like``."""
    images, _, height, width = like.shape
    return rows.view(images, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _choose_conv(
    product: str,
    maps: Sequence[Tensor],
    weight: Tensor,
    mask: Tensor,
    geometry: Geometry,
    needs: Needs | None = None,
    positions: Tensor | None = None,
) -> tuple[str, int, bool, Any]:
    """Backend, side of its tiles, whether it is a product of matrices as the ``maps`` lie, the input first, and what
    holds the tiles.
    """
    window = window_of(weight, geometry)
    if window is None:
        matrix = all(m.is_contiguous(memory_format=torch.channels_last) and m.shape[1] > 1 for m in maps)
        # As maps in another order it was not measured, and there are no kernels for it.
        window, tiles = (None, True) if matrix else (Window((1, 1)), False)
    else:
        matrix, tiles = False, window.groups == 1 and _drops_tiles(mask) and _takes_conv(weight, mask, *maps)
    backend, block, held = _choose(product, maps[0], weight, mask, needs, positions, window, tiles)
    return backend.name, block, matrix, held


def conv2d(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``conv2d(input, mask * weight) + bias``."""
    name, block, matrix, held = _choose_conv("forward", (input,), weight, mask, geometry)
    if matrix and name in ("fused", "block"):
        return _maps(linear(_pixels(input), weight, mask, bias), input)
    if name == "fused" and _takes_conv(weight, mask, input):
        from . import triton_conv2d

        return triton_conv2d.masked_conv2d(input, weight, mask, bias, geometry)
    z = dense.effective_weight(weight, mask, input.dtype)
    if name == "block":
        return held.layout(block).conv2d(input, z, bias, geometry)
    stride, padding, dilation, groups = geometry
    cut = held.slices() if name == "slice" else None
    if cut is None or not cut.density:  # no library takes maps without channels
        return torch.ops.aten.convolution(input, z, bias, stride, padding, dilation, False, [0, 0], groups)
    x, z = cut.inputs(input, 1), cut.weight(z)
    out = torch.ops.aten.convolution(x, z, None, stride, padding, dilation, False, [0, 0], groups)
    out = cut.expand_outputs(out, 1, weight.shape[0], is_channels_last(input, weight))
    return out if bias is None else out.add_(bias[:, None, None])


def conv2d_input_grad(dy: Tensor, input: Tensor, weight: Tensor, mask: Tensor, geometry: Geometry) -> Tensor | None:
    """Gradient of the input if another backend than the dense one is chosen, else None."""
    name, block, matrix, held = _choose_conv("input_grad", (input, dy), weight, mask, geometry)
    if matrix and name in ("fused", "block"):
        return _maps(linear_input_grad(_pixels(dy), weight, mask), input)
    if name == "block":
        z = dense.effective_weight(weight, mask, dy.dtype)
        return held.layout(block).conv2d_input_grad(dy, z, input.shape, geometry)
    if name == "fused" and _takes_conv(weight, mask, dy, input):
        from . import triton_conv2d

        return triton_conv2d.input_grad(dy, input, weight, mask, geometry)
    cut = held.slices() if name == "slice" else None
    if cut is None or not cut.density:
        return None
    z = cut.weight(dense.effective_weight(weight, mask, input.dtype))
    x = cut.inputs(input, 1)
    grad = _convolution_backward(cut.outputs(dy, 1), x, z, geometry, [True, False, False])[0]
    return cut.expand_inputs(grad, 1, input.shape[1], is_channels_last(input, weight))


def conv2d_weight_grad(
    dy: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    geometry: Geometry,
    needs: Needs,
) -> Grads | None:
    """Gradients of weight, scores and sink if another backend than the dense one is chosen, else None."""
    name, block, matrix, held = _choose_conv("weight_grad", (input, dy), weight, mask, geometry, needs, positions)
    if matrix and name in ("fused", "block"):
        return linear_weight_grad(_pixels(dy), _pixels(input), weight, mask, positions, needs)
    if name == "block":
        given, dtype = _block_grad(mask, weight, needs)
        blocks, taps = held.layout(block), weight.shape[2:]
        grad = blocks.conv2d_weight_grad(dy, input, given, taps, dtype, geometry)
        return _of_blocks(grad, weight, mask, positions, needs)
    if name == "fused" and positions is None and _takes_conv(weight, mask, dy, input):
        from . import triton_conv2d

        wanted = {"need_weight": needs.weight, "need_scores": needs.scores, "need_sink": needs.sink}
        return triton_conv2d.weight_grad(dy, input, weight, mask, geometry, **wanted)
    cut = held.slices() if name == "slice" else None
    if cut is None or not cut.density:
        return None
    z = cut.weight(weight).to(input.dtype)  # of which the shape is needed
    grad = _convolution_backward(cut.outputs(dy, 1), cut.inputs(input, 1), z, geometry, [False, True, False])[1]
    last = is_channels_last(input, weight)
    grad = cut.expand_inputs(cut.expand_outputs(grad, 0, weight.shape[0], last), 1, weight.shape[1], last)
    return dense.distribute(grad, weight, mask, positions, needs)


def is_channels_last(*tensors: Tensor) -> bool:
    """Whether cuDNN's and oneDNN's convolutions of these give maps and gradients in channels_last."""
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)


def _convolution_backward(dy: Tensor, x: Tensor, z: Tensor, geometry: Geometry, wanted: list[bool]) -> list[Tensor]:
    stride, padding, dilation, groups = geometry
    options = (None, stride, padding, dilation, False, [0, 0], groups, wanted)
    return torch.ops.aten.convolution_backward(dy, x, z, *options)


def _drops_tiles(mask: Tensor) -> bool:
    held = block_sparse.look(mask)
    return held is not None and any(density < 1 for density in held.densities.values())


def _takes_conv(weight: Tensor, mask: Tensor, *maps: Tensor) -> bool:
    """Whether the kernels of convolutions take them, whose results are in channels_last.

    Maps of one channel are in that order and in NCHW, in which torch returns what it makes of them.
    """
    from . import triton_conv2d

    return all(m.shape[1] > 1 for m in maps) and triton_conv2d.takes(weight, mask, *maps)


def _is_plain(weight: Tensor, mask: Tensor) -> bool:
    return weight.is_contiguous() and mask.is_contiguous()


def _matrix(z: Tensor) -> Tensor:
    """``[N, K]`` of that, or of ``[N, K, 1, 1]``."""
    return (z if z.dim() == 2 else z.flatten(1)).contiguous()


def runs(input: Tensor, weight: Tensor) -> bool:
    """Whether these are on a device of ours, and there is something to compute."""
    return input.dtype != torch.float64 and gpu.available(input.device) and input.numel() > 0 and weight.numel() > 0
