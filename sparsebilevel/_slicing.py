"""Physically smaller networks from filter and channel masks; see :func:`slice_model`.

Three things are known of every channel of every tensor in the traced graph:

- its *space*: tensors whose channels must go together (a convolution's output, its normalisation, its ReLU, both sides
  of an addition) share one space;
- whether it is *constant*: the same number at every position of every input, as what a removed filter leaves behind;
- whether anybody *reads* it: a convolution or linear layer with a non-zero weight in a row that itself stays.

A channel goes if every layer that sees it either does not read it, or sees a constant that its bias can take over
without error. The latter fails at zero padding (the constant is missing at the border), and then the channel stays.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves

from .layout import written_by
from .nn import densify

__all__ = ["slice_model"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d)
# Functions of single numbers, so that a constant stays one.
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
)
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in evaluation mode
# Called with the further arguments of the node, such as ``approximate="tanh"``.
_ELEMENTWISE_CALLS: dict[Any, Callable[..., Tensor]] = {
    **{f: f for f in (F.relu, torch.relu, F.relu6, F.gelu, F.silu, F.hardswish, torch.sigmoid, torch.tanh)},
    **{"relu": torch.relu, "contiguous": lambda x, **_: x, "clone": lambda x, **_: x},
}
_POOLING_CALLS = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.max_pool2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclasses.dataclass(eq=False)
class _Space:
    """Channels that live and die together."""

    keep: Tensor  # bool [C]
    protected: bool = False  # something reads them that cannot be cut
    merged_into: _Space | None = None

    def root(self) -> _Space:
        return self if self.merged_into is None else self.merged_into.root()


@dataclasses.dataclass
class _Value:
    """What is known of a tensor in the graph: ``repeat`` consecutive entries along ``dim`` belong to a channel."""

    space: _Space
    constant: Tensor  # float64 [C]; NaN = varies
    dim: int
    repeat: int = 1


class _Mixer:
    """A convolution or linear layer, which mixes the channels of ``value`` (None: unknown) into those of ``output``."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, value: _Value | None) -> None:
        self.layer = layer
        self.value = value
        weight = layer.weight.detach().double()
        self.output = _Space(torch.ones(weight.shape[0], dtype=torch.bool))
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
        channels = 1 if value is None else value.constant.numel()
        taps = weight.reshape(len(weight), channels, -1)
        self.weight = taps.sum(2)  # [N, C], what a constant is multiplied by
        if value is None:
            foldable = torch.zeros(1, dtype=torch.bool)
            inputs = torch.zeros(1, dtype=weight.dtype)
        else:
            foldable = _foldable(layer, value.constant)
            inputs = value.constant.masked_fill(~foldable, 0)
        self.needs = (taps != 0).any(2) & ~foldable  # bool [N, C]: output n cannot do without input c
        self.constant = (bias + self.weight @ inputs).masked_fill(self.needs.any(1), torch.nan)

    def cut(self) -> None:
        """Remove output channels, and input channels with what their constants add to the bias."""
        layer, rows = self.layer, self.output.root().keep
        weight, bias = layer.weight.detach(), layer.bias
        if self.value is not None:
            keep = self.value.space.root().keep
            # What is removed is either a constant or not read by the rows that stay.
            folded = (self.weight @ self.value.constant.nan_to_num().masked_fill(keep, 0)).to(weight.dtype)
            if folded[rows].any():
                bias = folded if bias is None else bias.detach() + folded
            weight = weight[:, keep.repeat_interleave(self.value.repeat)]
        layer.weight = nn.Parameter(weight[rows].contiguous(), requires_grad=layer.weight.requires_grad)
        layer.bias = (
            None if bias is None else nn.Parameter(bias.detach()[rows], requires_grad=layer.weight.requires_grad)
        )
        outputs, inputs = layer.weight.shape[:2]
        if isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = outputs, inputs
        else:
            layer.out_features, layer.in_features = outputs, inputs


def _foldable(layer: nn.Module, constant: Tensor) -> Tensor:
    """bool ``[C]``: the inputs of ``layer`` that are a constant at the border too."""
    return constant.eq(0) if _pads(layer) else constant.isfinite()


def _pads(layer: nn.Module) -> bool:
    """Whether zeros stand at the border; other padding modes repeat what is there, and a constant stays one."""
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(p != 0 for p in layer.padding)


class _Analysis:
    """Walks the graph once forward, then removes channels until no more can go."""

    def __init__(self, graph: fx.GraphModule, example_input: Tensor) -> None:
        ShapeProp(graph).propagate(example_input)
        self.modules = dict(graph.named_modules())
        calls = Counter(id(self.modules[n.target]) for n in graph.graph.nodes if n.op == "call_module")
        owners = [m for m in graph.modules() if m._parameters]
        uses = Counter(id(p) for m in owners for p in m._parameters.values())
        # A layer that is called twice, or shares a weight, cannot be cut for one of its uses; nor can what is computed
        # (weight_norm, parametrize, prune), or what is empty.
        self.cuttable = {
            id(m)
            for m in owners
            if calls[id(m)] == 1
            and m._parameters.keys() >= {"weight", "bias"}
            and all(uses[id(p)] == 1 and p.numel() for p in m._parameters.values() if p is not None)
        }
        self.values: dict[fx.Node, _Value] = {}
        self.memory: dict[fx.Node, fx.Node] = {}  # of a node that shares its tensor's memory: the first that had it
        self.mixers: list[_Mixer] = []
        self.channelwise: list[tuple[nn.Module, _Space]] = []  # batch norms and depth-wise convolutions
        for node in graph.graph.nodes:
            value = self._visit(node)
            if value is not None:
                self.values[node] = value
                self._note_memory(node, value)
        self._remove()

    # -- forward ------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> _Value | None:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        value = self.values.get(source) if source is not None else None
        if node.op == "call_module":
            return self._visit_module(node, self.modules[node.target], value)
        if node.op in ("call_function", "call_method") and value is not None:
            assert source is not None
            if node.target in _ELEMENTWISE_CALLS and len(node.all_input_nodes) == 1:
                function = _ELEMENTWISE_CALLS[node.target]
                return self._elementwise(value, lambda x: function(x, *node.args[1:], **node.kwargs))
            if node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
                other = self.values.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
                if other is not None and _shape(source) == _shape(node.args[1]) and _alike(value, other):
                    _merge(value.space, other.space)
                    return dataclasses.replace(value, constant=value.constant + other.constant)
            if value.dim == 1 and value.repeat == 1:
                if node.target in _POOLING_CALLS or _is_spatial_mean(node):
                    return value
                if _is_flatten(node, source):
                    return self._flatten(value, _shape(source))
            if _reads_batch_size_alone(node, source):
                return None
        self._protect(node)
        return None

    def _note_memory(self, node: fx.Node, value: _Value) -> None:
        """What is written in place is what every later reader of that memory sees."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in self.values:
            return
        module = self.modules[node.target] if node.op == "call_module" else None
        is_written = source in written_by(node, module)
        if is_written or isinstance(module, _SAME) or value.repeat != self.values[source].repeat:  # flattened
            self.memory[node] = first = self.memory.get(source, source)
            if is_written:
                for other, known in self.values.items():
                    if self.memory.get(other, other) is first:
                        self.values[other] = dataclasses.replace(known, constant=value.constant)

    def _visit_module(self, node: fx.Node, module: nn.Module, value: _Value | None) -> _Value | None:
        if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module) in self.cuttable:
            dim = 1 if isinstance(module, nn.Conv2d) else len(_shape(node)) - 1
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                if value is not None and value.dim == 1 and module.groups == module.in_channels == module.out_channels:
                    return self._depthwise(module, value)
                self._protect(node)
                return None
            if value is None or value.dim != dim:
                self._protect(node)  # an input by keyword is not followed either
                value = None
            self.mixers.append(_Mixer(module, value))
            return _Value(self.mixers[-1].output, self.mixers[-1].constant, dim)
        if value is not None and isinstance(module, _SAME):
            return value
        if value is not None and isinstance(module, _ELEMENTWISE):
            return self._elementwise(value, module)
        if value is not None and value.dim == 1 and value.repeat == 1:
            if isinstance(module, _NORMS) and id(module) in self.cuttable and module.running_mean is not None:
                self.channelwise.append((module, value.space))
                return self._elementwise(value, _norm_of_constant(module))
            if isinstance(module, _POOLING):
                return value
            if isinstance(module, nn.AvgPool2d):
                is_padded = module.count_include_pad and module.padding not in (0, (0, 0))
                exact = module.divisor_override is None and not is_padded  # the mean of equal numbers
                constant = value.constant
                return value if exact else dataclasses.replace(value, constant=constant.where(constant == 0, torch.nan))
            if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
                return self._flatten(value, _shape(node.args[0]))
        self._protect(node)
        return None

    def _depthwise(self, layer: nn.Conv2d, value: _Value) -> _Value:
        """Channel by channel, like a normalisation: no new space."""
        self.channelwise.append((layer, value.space))
        taps = layer.weight.detach().double().flatten(1)
        bias = torch.zeros(len(taps)) if layer.bias is None else layer.bias.detach()
        known = taps.eq(0).all(1) | _foldable(layer, value.constant)
        constant = bias.double() + taps.sum(1) * value.constant.nan_to_num()
        return dataclasses.replace(value, constant=constant.where(known, torch.nan))

    @staticmethod
    def _elementwise(value: _Value, function: Callable[[Tensor], Tensor]) -> _Value:
        constant = function(value.constant.clone())  # in-place modules write into their argument
        return dataclasses.replace(value, constant=constant.where(value.constant.isfinite(), torch.nan))

    @staticmethod
    def _flatten(value: _Value, shape: tuple[int, ...]) -> _Value:
        return dataclasses.replace(value, repeat=math.prod(shape[2:]))

    def _protect(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in self.values:
                self.values[source].space.root().protected = True

    # -- removal ------------------------------------------------------------------------------------------------------

    def _remove(self) -> None:
        readers: dict[int, list[_Mixer]] = {}
        for mixer in self.mixers:
            if mixer.value is not None:
                readers.setdefault(id(mixer.value.space.root()), []).append(mixer)
        # From the output backwards, as what is not read there is not read earlier either.
        spaces = list({id(m.output.root()): m.output.root() for m in reversed(self.mixers)}.values())
        changed = True
        while changed:
            changed = False
            for space in spaces:
                if space.protected:
                    continue
                needed = torch.zeros_like(space.keep)
                for mixer in readers.get(id(space), []):
                    needed |= mixer.needs[mixer.output.root().keep].any(0)
                if not needed.any():
                    needed[0] = True  # a layer without channels is none
                changed |= not torch.equal(needed, space.keep)
                space.keep = needed

    def cut(self) -> None:
        """Make the layers smaller, in place."""
        for mixer in self.mixers:
            mixer.cut()
        for module, space in self.channelwise:
            cut_channels(module, space.root().keep)


def _shape(node: Any) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else ()


def _alike(a: _Value, b: _Value) -> bool:
    return a.dim == b.dim and a.repeat == b.repeat and a.constant.shape == b.constant.shape


def _merge(a: _Space, b: _Space) -> None:
    a, b = a.root(), b.root()
    if a is not b:
        a.protected |= b.protected
        b.merged_into = a


def _norm_of_constant(module: Any) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        y = (x - module.running_mean.double()) * (module.running_var.double() + module.eps).rsqrt()
        return y if module.weight is None else y * module.weight.detach().double() + module.bias.detach().double()

    return apply


def _is_flatten(node: fx.Node, source: fx.Node) -> bool:
    """``flatten(x, 1)`` in any spelling, and ``view`` or ``reshape`` to ``(x.size(0), -1)`` in any."""
    if node.target in (torch.flatten, "flatten"):
        arguments = (*node.args[1:], *node.kwargs.values())
        return arguments in ((1,), (1, -1))
    if node.target in (torch.reshape, "view", "reshape"):
        sizes: Any = (*node.args[1:], *node.kwargs.values())
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        is_flat = len(sizes) == 2 and sizes[1] == -1 and _shape(node)[:1] == _shape(source)[:1]
        return is_flat and _is_batch_size(sizes[0], source)
    return False


def _is_batch_size(node: Any, source: fx.Node) -> bool:
    """``x.size(0)``, ``x.size()[0]`` or ``x.shape[0]``, where ``x`` is ``source`` or what the model is given."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is operator.getitem:
        node, index = node.args
        if not isinstance(node, fx.Node) or index != 0 or not _gives_all_sizes(node):
            return False
    elif node.op != "call_method" or node.target != "size" or (*node.args[1:], *node.kwargs.values()) != (0,):
        return False
    x = node.args[0]
    return x is source or (isinstance(x, fx.Node) and x.op == "placeholder")


def _gives_all_sizes(node: fx.Node) -> bool:
    """``x.size()`` and ``x.shape``."""
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs


def _reads_batch_size_alone(node: fx.Node, source: fx.Node) -> bool:
    """Whether no other size of ``source`` is read: by ``n, c, h, w = x.shape`` too, if the others are not used."""
    if _gives_all_sizes(node):
        return all(u.target is operator.getitem and (u.args[1] == 0 or not u.users) for u in node.users)
    return _is_batch_size(node, source)


def _is_spatial_mean(node: fx.Node) -> bool:
    if node.target not in (torch.mean, "mean") or len(_shape(node.args[0])) != 4:
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3]


def cut_channels(module: Any, keep: Tensor) -> None:
    """Remove channels of a normalization or depth-wise convolution, in place; ``keep`` is bool ``[C]``."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(module, name, nn.Parameter(parameter.detach()[keep], requires_grad=parameter.requires_grad))
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim():
            setattr(module, name, buffer[keep])
    size = int(keep.sum())
    for name in ("in_channels", "out_channels", "groups", "num_features", "num_channels"):
        if hasattr(module, name):
            setattr(module, name, size)


class _OneArgument(nn.Module):
    """The call that is traced: Python fills in the defaults of other arguments, and the graph does not have them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


@torch.no_grad()
def slice_model(model: nn.Module, example_input: Tensor) -> nn.Module:
    """A physically smaller dense network that computes the same as ``model`` does in evaluation mode.

    Removed are channels that no later layer reads (what a channel mask leaves), and channels that are constant (what a
    filter mask leaves) where the readers' biases can take the constant over exactly. A filter whose normalisation turns
    its zero into another number stays if a zero-padded convolution reads it: at the border that number is missing.

    Followed through convolutions, linear layers, batch normalisation, element-wise activations, pooling, flattening,
    depth-wise convolutions and additions. What else touches a channel (concatenation, grouped convolution, products,
    slicing, layers with shared weights) keeps it, and so do input and output.

    Args:
        model: sparse or dense; is not changed. Must be traceable by ``torch.fx``.
        example_input: a batch that the model takes, as its only argument; its shape alone matters. The result is
            checked on random data of this shape, or on itself where it holds no floating-point numbers.

    Returns:
        A copy in evaluation mode, on the device of ``example_input``, of the same classes with smaller layers. Where a
        constant was folded into a layer without bias, it has one now. If nothing could be removed a warning says so.

    Raises:
        ValueError: ``torch.fx`` cannot trace the model.
        RuntimeError: the result computes something else (code that depends on a number of channels, say).
    """
    original = densify(model).eval()
    # Copies, on the CPU, where double precision costs nothing and nobody waits.
    small, x = densify(original).cpu(), example_input.cpu()
    try:
        graph = fx.symbolic_trace(_OneArgument(small))
    except Exception as error:  # whatever the model's own code does with a proxy
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx, which slicing needs: {error}"
        ) from error
    _Analysis(graph, x).cut()
    if _shapes(small) == _shapes(original):
        warnings.warn(
            f"nothing could be sliced off {type(model).__name__}: no whole channel can go without a change of what it "
            "computes, as after training with pattern filter or channel; the result is as large as the dense network",
            stacklevel=3,  # past torch.no_grad
        )
    small = small.to(example_input.device)
    if x.is_floating_point():  # tokens and the like are indices, and any others may not be
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x = x.to(example_input)
    try:
        for got, expected in zip(*(tree_leaves(net(x)) for net in (small, original)), strict=True):
            if isinstance(expected, Tensor) and expected.numel():
                atol = 1e-3 * float(expected.double().abs().max())
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=atol)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"the sliced {type(model).__name__} does not compute the same: {error}") from error
    return small


def _shapes(model: nn.Module) -> list[torch.Size]:
    return [p.shape for p in model.parameters()]
