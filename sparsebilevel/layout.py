"""Whole networks on the CPU in the layout of the sparse kernels, or in channels_last.

Between sparse layers, feature maps stay *in lines*: contiguous ``[ceil(B / 16), C, H, W, 16]``, sixteen images side by
side. :func:`optimize_for_cpu` traces a model and cuts its graph into segments that stay in lines, each run by one
program of :mod:`sparsebilevel.kernels.lines`, and the rest, which meets ordinary tensors; in channels_last that is all.
Batch normalization, ReLU and additions are fused with one another and, in lines where nobody else needs their result,
into the convolution that follows. Modules, parameters and the keys of the state dict stay what they were.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import lines, native
from .kernels.dispatch import lines_pay, sparse_support
from .kernels.plans import LANES, Geometry, Support, active_support
from .nn import FusedBatchNorm2d, SparseMaskedConv2d, SparseMaskedModule, normalize, sparse_layers

LAYOUTS = ("lines", "channels_last")

# -- what a node of the traced graph is --------------------------------------------------------------------------------

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
_EACH: set[type[nn.Module]] = {  # activations that treat every element alike
    *(nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
}
_KINDS: dict[type[nn.Module], str] = {
    **{SparseMaskedConv2d: "conv", nn.Conv2d: "stem", nn.ReLU: "relu"},
    **{nn.BatchNorm2d: "norm", FusedBatchNorm2d: "norm"},
    **{nn.MaxPool2d: "pool", nn.Identity: "same", nn.AdaptiveAvgPool2d: "mean"},
    **dict.fromkeys(_EACH, "each"),
}
_FEW_CHANNELS = 4  # a dense convolution of so few costs less in lines than the dense library's and a conversion


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (SparseMaskedModule, FusedBatchNorm2d))
        return own or super().is_leaf_module(m, module_qualified_name)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _kind(node: torch.fx.Node, module: nn.Module | None) -> str:
    """What can be done in lines, ``conv``, ``norm``, ``relu``, ``add`` and so on; or ``other``."""
    if module is not None:
        takes_residual = isinstance(module, FusedBatchNorm2d) and set(node.kwargs) <= {"residual"}
        if (len(node.args) + len(node.kwargs) != 1 and not takes_residual) or not node.args or _has_hooks(module):
            return "other"
        kind = _KINDS.get(type(module), "other")
        return kind if _fits(module, kind) else "other"
    if node.op not in ("call_function", "call_method"):
        return "other"
    values = [a for a in node.args if isinstance(a, torch.fx.Node)]
    if node.target in _ADDITIONS and len(values) == len(node.args) == 2 and not node.kwargs:
        return "add"
    if node.target in _RELUS and len(values) == 1 and set(node.kwargs) <= {"inplace"}:
        return "relu"
    if node.target is operator.getitem and _is_slice(node.args[1]):
        return "slice"
    if node.target is F.pad and _pads_maps(node):
        return "pad"
    if node.target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)) and not node.kwargs:
        return "mean"
    return "other"


def _fits(module: nn.Module, kind: str) -> bool:
    """Whether the settings of a module of that kind are among those that programs know."""
    if isinstance(module, nn.Conv2d):
        few = kind == "conv" or module.in_channels <= _FEW_CHANNELS
        return few and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.MaxPool2d):
        return not module.ceil_mode and not module.return_indices
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    return _has_plain_vectors(module)


def _settings(module: nn.Module) -> Any:
    """What a plan takes over of a module; the rest is asked for at each run."""
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features, _has_plain_vectors(module), getattr(module, "relu", False)
    return module.extra_repr() if isinstance(module, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)) else None


def _has_plain_vectors(module: nn.Module) -> bool:
    """Whether what a batch normalization holds can be read and written as arrays of float32."""
    if not isinstance(module, nn.BatchNorm2d):
        return True
    # Not by attribute: that takes ten times as long, and every forward asks every module.
    size, affine, running = (module.num_features,), module._parameters, module._buffers
    for vectors, names in ((affine, ("weight", "bias")), (running, ("running_mean", "running_var"))):
        for name in names:
            v = vectors.get(name)
            if v is not None and (v.dtype != torch.float32 or v.shape != size):
                return False
            if v is not None and vectors is running and not v.is_contiguous():
                return False
    return True


def _is_slice(index: Any) -> bool:
    """All images, and no more than strides and ranges of channels and pixels."""
    return (
        isinstance(index, tuple)
        and len(index) in (2, 3, 4)
        and all(isinstance(i, slice) for i in index)
        and index[0] == slice(None)
        and all(isinstance(end, (int, type(None))) for i in index for end in (i.start, i.stop, i.step))
    )


def _pads_maps(node: torch.fx.Node) -> bool:
    args = [*node.args, *([node.kwargs["pad"]] if "pad" in node.kwargs else [])]
    plain = set(node.kwargs) <= {"pad", "mode", "value"} and node.kwargs.get("mode", "constant") == "constant"
    return (
        plain
        and len(args) == 2
        and isinstance(args[1], (tuple, list))
        and len(args[1]) in (2, 4, 6)
        and all(isinstance(n, int) and n >= 0 for n in args[1])
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# -- a segment of the graph as a program -------------------------------------------------------------------------------


@dataclasses.dataclass
class _Pending:
    """A normalization whose statistics are there, but which has not been carried out: more may be fused with it."""

    source: int
    norm: int
    relu: bool = False
    residual: int | None = None


class _Builder:
    """Writes the program of a segment, node by node. Values are registers, or pending."""

    def __init__(self) -> None:
        self.steps: list[lines.Step] = []
        self.convolutions: list[str] = []
        self.norms: list[str] = []
        self.channels: list[int] = []
        self._written = 0

    def new(self) -> int:
        self._written += 1
        return self._written - 1

    def register(self, value: int | _Pending) -> int:
        """A pending normalization is carried out."""
        if isinstance(value, int):
            return value
        out = self.new()
        self.steps.append(lines.Normalize(value.source, value.norm, value.relu, value.residual, out))
        return out

    def convolve(self, value: int | _Pending, name: str) -> int:
        pending = value if isinstance(value, _Pending) and value.residual is None else None
        source = self.register(value) if pending is None else pending.source
        self.convolutions.append(name)
        out = self.new()
        norm, relu = (None, False) if pending is None else (pending.norm, pending.relu)
        self.steps.append(lines.Convolve(source, norm, relu, len(self.convolutions) - 1, out))
        return out

    def normalize(self, value: int | _Pending, name: str, module: nn.BatchNorm2d) -> _Pending:
        source = self.register(value)
        self.norms.append(name)
        self.channels.append(module.num_features)
        self.steps.append(lines.Statistics(source, len(self.norms) - 1))
        return _Pending(source, len(self.norms) - 1)

    def rectify(self, value: int | _Pending) -> int | _Pending:
        if isinstance(value, _Pending):
            return dataclasses.replace(value, relu=True)
        return self.apply(value, F.relu)

    def add(self, a: int | _Pending, b: int | _Pending) -> int | _Pending:
        """The addition to a normalization waits for the ReLU that may follow."""
        if a is b:  # used twice by one node
            a = b = self.register(a)
        for value, other in ((a, b), (b, a)):
            if isinstance(value, _Pending) and value.residual is None and not value.relu:
                return dataclasses.replace(value, residual=self.register(other))
        out = self.new()
        self.steps.append(lines.Add(self.register(a), self.register(b), out))
        return out

    def apply(self, value: int | _Pending, function: Callable[[Tensor], Tensor]) -> int:
        source = self.register(value)
        out = self.new()
        self.steps.append(lines.Apply(function, source, out))
        return out

    def window(
        self,
        value: int | _Pending,
        index: Sequence[slice],
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        fill: float = 0.0,
    ) -> int:
        """``index`` as indices are given, first channels; ``before`` and ``after`` as padding is, first columns."""
        source = self.register(value)
        out = self.new()
        channels, rows, cols = *index, *[slice(None)] * (3 - len(index))
        (w0, h0, c0), (w1, h1, c1) = ((*sizes, 0, 0, 0)[:3] for sizes in (before, after))
        self.steps.append(lines.Window((channels, rows, cols), (c0, h0, w0), (c1, h1, w1), fill, source, out))
        return out

    def max_pool(self, value: int | _Pending, module: nn.MaxPool2d) -> int:
        kernel, stride, padding, dilation = map(
            _pair, (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        source = self.register(value)
        out = self.new()
        self.steps.append(lines.MaxPool(kernel, stride, padding, dilation, source, out))
        return out


def _out_of_place(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.clone() if getattr(module, "inplace", False) else x)


class _Segment:
    """Nodes that are run in lines together, as a program; and on ordinary tensors, for what the program refuses.

    Called with the model and the values of ``inputs``, it returns those of ``outputs``.
    """

    def __init__(
        self, nodes: list[torch.fx.Node], kinds: dict[torch.fx.Node, str], modules: dict[str, nn.Module]
    ) -> None:
        inside = set(nodes)
        self.inputs = list(dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in inside))
        self.outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        builder = _Builder()
        values: dict[torch.fx.Node, int | _Pending] = {node: builder.new() for node in self.inputs}
        ends: dict[torch.fx.Node, lines.End] = {}
        for node in nodes:
            module = modules[str(node.target)] if node.op == "call_module" else None
            if kinds[node] == "mean":  # only ever at an end
                source = values[node.all_input_nodes[0]] = builder.register(values[node.all_input_nodes[0]])
                ends[node] = lines.Mean(source)
                continue
            value = self._build(builder, node, kinds[node], module, values)
            # What several need, or somebody outside, is carried out; a pending one can be fused once only.
            values[node] = value if len(node.users) == 1 and node not in self.outputs else builder.register(value)
            if node in self.outputs:
                ends[node] = lines.Maps(builder.register(values[node]))
        self._convolutions, self._norms = builder.convolutions, builder.norms
        self._program = lines.Program(
            len(self.inputs),
            builder.steps,
            [ends[node] for node in self.outputs],
            builder.channels,
            len(builder.convolutions),
        )
        self._plain = _on_tensors(nodes, self.inputs, self.outputs, kinds, modules)

    @staticmethod
    def _build(
        builder: _Builder,
        node: torch.fx.Node,
        kind: str,
        module: nn.Module | None,
        values: dict[torch.fx.Node, int | _Pending],
    ) -> int | _Pending:
        operands = [values[a] for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.fx.Node)]
        if kind in ("conv", "stem"):
            return builder.convolve(operands[0], str(node.target))
        if kind == "norm":
            assert isinstance(module, nn.BatchNorm2d)
            value: int | _Pending = builder.normalize(operands[0], str(node.target), module)
            for residual in operands[1:]:
                value = builder.add(value, residual)
            return builder.rectify(value) if getattr(module, "relu", False) else value
        if kind == "relu":
            return builder.rectify(operands[0])
        if kind == "add":
            return builder.add(*operands)
        if kind == "pool":
            assert isinstance(module, nn.MaxPool2d)
            return builder.max_pool(operands[0], module)
        if kind == "each":
            assert module is not None
            return builder.apply(operands[0], functools.partial(_out_of_place, module))
        if kind == "slice":
            index: Any = node.args[1]
            return builder.window(operands[0], index[1:])
        if kind == "pad":
            pad: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
            fill: Any = node.kwargs.get("value")
            return builder.window(operands[0], (), pad[::2], pad[1::2], fill or 0.0)
        return operands[0]  # "same"

    def __call__(self, state: _State, model: nn.Module, *inputs: Any) -> tuple[Any, ...]:
        norms = [state.modules[name] for name in self._norms]
        operands = lines.Operands(
            [_convolution(state.modules[name], state.supports.get(name)) for name in self._convolutions],
            [_normalization(norm) for norm in norms],
        )
        try:
            out = self._program(inputs, operands, _maps_dtype())
        except lines.Unfit:
            return self._plain(model, *inputs)
        counters = [
            counter for norm in norms if norm.training and isinstance(counter := norm.num_batches_tracked, Tensor)
        ]
        if counters:
            torch._foreach_add_(counters, 1)
        return out


@functools.lru_cache(maxsize=64)
def _all_kept(shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _convolution(module: Any, support: Support | None) -> lines.Convolution:
    geometry = Geometry(_pair(module.stride), _pair(module.padding), _pair(module.dilation), module.groups)
    if type(module) is nn.Conv2d:
        mask, collected = _all_kept(module.weight.shape), {"mask_scores": None, "grad_sink": None, "positions": None}
    else:
        mask, collected = module.mask, module._sink_arguments()
    return lines.Convolution(
        module.weight,
        module.bias,
        collected["mask_scores"],
        collected["grad_sink"],
        mask,
        collected["positions"],
        active_support(mask) if support is None else support,
        geometry,
    )


def _normalization(module: Any) -> lines.Normalization:
    """What ``nn.BatchNorm2d`` would do next."""
    running = None
    if module.running_mean is not None and module.running_var is not None:
        running = module.running_mean, module.running_var
    of_batch = module.training or running is None
    momentum = 0.0
    if module.training and running is not None:
        assert module.num_batches_tracked is not None
        # None asks for the mean over all batches.
        momentum = 1.0 / float(module.num_batches_tracked + 1) if module.momentum is None else module.momentum
    elif of_batch:
        running = None
    return lines.Normalization(module.weight, module.bias, running, module.eps, momentum, of_batch)


# -- the rewritten network ---------------------------------------------------------------------------------------------

_PASSES_ON = ("relu", "add", "each", "pool", "same", "slice", "pad", "norm", "stem")
_Part = Callable[..., tuple[Any, ...]]


def _compile(graph: torch.fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<sparsebilevel.layout>", "exec"), namespace)
    return namespace["forward"]


class _Fusion(NamedTuple):
    """A normalization, the addition of something else to it and a ReLU, as far as they are there."""

    norm: torch.fx.Node
    residual: torch.fx.Node | None
    relu: bool
    inner: list[torch.fx.Node]
    """Those whose result nobody else needs."""


def _fusions(
    nodes: Sequence[torch.fx.Node], kinds: dict[torch.fx.Node, str], modules: dict[str, nn.Module]
) -> dict[torch.fx.Node, _Fusion]:
    """Those among the nodes, by the last node of each; of two normalizations that are added one takes the addition."""
    inside = set(nodes)

    def follower(node: torch.fx.Node, kind: str) -> torch.fx.Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is not None and user in inside and kinds[user] == kind else None

    found: dict[torch.fx.Node, _Fusion] = {}
    for node in nodes:
        if kinds[node] != "norm" or type(modules[str(node.target)]) is not nn.BatchNorm2d:
            continue
        chain, residual = [node], None
        addition = follower(node, "add")
        others = [a for a in addition.all_input_nodes if a is not node] if addition is not None else []
        if addition is not None and others and not any(addition in (*f.inner, last) for last, f in found.items()):
            chain.append(addition)
            residual = others[0]
        relu = follower(chain[-1], "relu")
        if relu is not None:
            chain.append(relu)
        found[chain[-1]] = _Fusion(node, residual, relu is not None, chain[:-1])
    return found


def _on_tensors(
    nodes: Sequence[torch.fx.Node],
    inputs: Sequence[torch.fx.Node],
    outputs: Sequence[torch.fx.Node],
    kinds: dict[torch.fx.Node, str],
    modules: dict[str, nn.Module],
) -> Callable[..., Any]:
    """The nodes on ordinary tensors, as a function of the model and the values of ``inputs``."""
    part = torch.fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    fusions = _fusions(nodes, kinds, modules)
    inner = {node for fusion in fusions.values() for node in fusion.inner}
    of_user: dict[tuple[torch.fx.Node, torch.fx.Node], torch.fx.Node] = {}  # a value as one of its users gets it
    for node in nodes:
        if node in fusions:
            norm, residual, relu, chain = fusions[node]
            source = norm.all_input_nodes[0]
            source = of_user.get((source, norm), copies[source])
            if residual is not None:
                residual = of_user.get((residual, chain[1] if len(chain) > 1 else node), copies[residual])
            users = [] if node in outputs else list(node.users)
            arguments = part.get_attr(str(norm.target)), source, residual, relu, max(len(users), 1)
            results = part.call_function(normalize, arguments)
            copies[node] = part.call_function(operator.getitem, (results, 0))
            for i, user in enumerate(users[1:], 1):
                of_user[node, user] = part.call_function(operator.getitem, (results, i))
        elif node not in inner:
            given = {value: of_user.get((value, node), copies[value]) for value in node.all_input_nodes}
            copies[node] = part.node_copy(node, given.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return _compile(part)


def _mutates(node: torch.fx.Node, module: nn.Module | None) -> bool:
    """Whether it writes to its first argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op in ("call_function", "call_method") and (
        in_place
        or node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
        or bool(node.kwargs.get("inplace", False))
    )


def _trace(model: nn.Module) -> torch.fx.Graph:
    """The graph of the forward as it was written."""
    root = model
    if isinstance(model, InLayout):
        root = model._plain_class.__new__(model._plain_class)
        root.__dict__.update(model._plain_state())
    return _Tracer().trace(root)


class _Plan:
    """A traced graph cut into parts, which run one after the other: segments in lines, and what is between them."""

    def __init__(self, graph: torch.fx.Graph, layout: str, modules: dict[str, nn.Module], dense: set[str]) -> None:
        of_node = {n: modules[str(n.target)] if n.op == "call_module" else None for n in graph.nodes}
        kinds = {
            n: "other" if n.op == "call_module" and n.target in dense else _kind(n, of_node[n]) for n in graph.nodes
        }
        leads_to_lines: set[torch.fx.Node] = set()  # by way of what can be done in lines
        for node in reversed(list(graph.nodes)):
            if any(kinds[u] == "conv" or (kinds[u] in _PASSES_ON and u in leads_to_lines) for u in node.users):
                leads_to_lines.add(node)
        in_lines: set[torch.fx.Node] = set()
        levels: dict[torch.fx.Node, int] = {}  # how often the way to a node has left the lines
        for node in graph.nodes:
            kind = kinds[node]
            from_lines = any(a in in_lines and kinds[a] != "mean" for a in node.all_input_nodes)
            starts = kind == "conv" or (kind in ("norm", "stem") and node in leads_to_lines)
            if layout == "lines" and (starts or (kind not in ("other", "stem") and from_lines)):
                in_lines.add(node)
            left = [a in in_lines and (kinds[a] == "mean" or node not in in_lines) for a in node.all_input_nodes]
            levels[node] = max((levels[a] + out for a, out in zip(node.all_input_nodes, left, strict=True)), default=0)
            if node.all_input_nodes and _mutates(node, of_node[node]) and len(node.all_input_nodes[0].users) > 1:
                raise ValueError(f"{node.name} writes to a tensor that others read")
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (output,) = (node for node in graph.nodes if node.op == "output")
        inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self.parts: list[tuple[_Part | _Segment, list[torch.fx.Node], list[torch.fx.Node]]] = []
        for level in range(max(levels.values()) + 1):
            between = [node for node in inner if node not in in_lines and levels[node] == level]
            if between:
                inside = set(between)
                inputs = list(dict.fromkeys(a for n in between for a in n.all_input_nodes if a not in inside))
                outputs = [n for n in between if any(user not in inside for user in n.users)]
                self.parts.append((_on_tensors(between, inputs, outputs, kinds, modules), inputs, outputs))
            nodes = [node for node in inner if node in in_lines and levels[node] == level]
            if nodes:
                segment = _Segment(nodes, kinds, modules)
                self.parts.append((segment, segment.inputs, segment.outputs))
        self._result = output.args[0]
        wanted = list(output.all_input_nodes)
        last = {node: i for i, (_, inputs, _) in enumerate(self.parts) for node in inputs}
        self._done = [
            [node for node, at in last.items() if at == i and node not in wanted] for i in range(len(self.parts))
        ]

    def __call__(self, model: nn.Module, state: _State, arguments: dict[str, Any]) -> Any:
        values = {node: arguments[str(node.target).lstrip("*")] for node in self._inputs}
        for (part, inputs, outputs), done in zip(self.parts, self._done, strict=True):
            given = [values[node] for node in inputs]
            out = part(state, model, *given) if isinstance(part, _Segment) else part(model, *given)
            values.update(zip(outputs, out, strict=True))
            for node in done:
                del values[node]
        return torch.fx.map_arg(self._result, values.__getitem__)


def _collect_modules(module: nn.Module, name: str, found: dict[str, nn.Module]) -> None:
    """``named_modules(remove_duplicate=False)``, which takes longer: every forward looks for modules replaced."""
    found[name] = module
    for part, child in module._modules.items():
        if child is not None:
            _collect_modules(child, f"{name}.{part}" if name else part, found)


class _State:
    """What a forward finds of a model: modules by name, and the supports of its sparse convolutions, None = dense.

    ``images`` is the size of the batch; None asks for no supports.
    """

    def __init__(self, model: nn.Module, images: int | None) -> None:
        self.modules: dict[str, nn.Module] = {}
        _collect_modules(model, "", self.modules)
        self.supports: dict[str, Support | None] = {}
        for name, module in self.modules.items():
            if images is not None and isinstance(module, SparseMaskedConv2d):
                stride = module.stride[0] * module.stride[1]
                operands = module.weight, module.weight, module.mask
                self.supports[name] = sparse_support("masked_conv2d", *operands, stride, images, groups=module.groups)

    @property
    def dense(self) -> set[str]:
        """Sparse convolutions that the dense library takes."""
        return {name for name, support in self.supports.items() if support is None}


class InLayout(nn.Module):
    """Mixed into the class of a model by :func:`optimize_for_cpu`: its forward, in a layout where that is possible."""

    _plain_class: type[nn.Module]
    _graphs: _Graphs  # in __dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graphs = self._graphs
        if graphs.takes(*args, *kwargs.values()):
            state = graphs.state(self, *args, *kwargs.values())
            plan = graphs.find(self, state)
            if plan is not None:
                bound = graphs.signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                return plan(self, state, bound.arguments)
        return self._plain_class.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._plain_class, self._plain_state(), self._graphs.layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self._plain_class.__new__(self._plain_class)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self._plain_state(), memo))
        return _enter(new, self._graphs.layout)

    def _plain_state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_graphs"}


def _rebuild(plain_class: type[nn.Module], state: dict[str, Any], layout: str) -> nn.Module:
    model = plain_class.__new__(plain_class)
    model.__dict__.update(state)
    return _enter(model, layout)


class _OwnBatchNorm2d(FusedBatchNorm2d):
    """What the ``nn.BatchNorm2d`` of a model that cannot be traced becomes, in place."""

    _plain_class = nn.BatchNorm2d

    def _get_name(self) -> str:
        return "BatchNorm2d"


class _Graphs:
    """Plans of a model. Tracing fixes what a forward reads of ``training``, and a plan the kinds of the modules and
    which convolutions are sparse, so there is one for each."""

    def __init__(self, model: nn.Module, layout: str) -> None:
        self.layout = layout
        self.signature = inspect.signature(type(model).forward)
        self._leaves: dict[type[nn.Module], bool] = {}
        self._traces: dict[tuple[bool, ...], torch.fx.Graph | None] = {}
        self._plans: dict[tuple, _Plan | None] = {}
        state = self.state(model)
        through, hooked = self._traced_through(model, state)
        if not hooked:
            modes = tuple(m.training for m in through)
            graph = self._traces[modes] = _trace(model)
            self._plans[self._key(modes, state)] = _Plan(graph, layout, state.modules, state.dense)

    def takes(self, *values: Any) -> bool:
        """Whether there may be a plan for these arguments.

        Compilers and exporters see the model as it was written, and so does what the lines do not take; in
        channels_last each op decides for itself.
        """
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or any(isinstance(v, torch.fx.Proxy) for v in values)
        ):
            return False
        if self.layout != "lines":
            return True
        if not native.available() or not lines_pay(*_batch(values)):
            return False
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        return not any(isinstance(v, Tensor) and (v.device.type != "cpu" or not v.numel()) for v in values)

    def state(self, model: nn.Module, *values: Any) -> _State:
        """For arguments of the forward."""
        return _State(model, _batch(values)[0] if self.layout == "lines" else None)

    def _leaf(self, module: nn.Module) -> bool:
        kind = type(module)
        if kind not in self._leaves:
            self._leaves[kind] = _Tracer().is_leaf_module(module, "")
        return self._leaves[kind]

    def _traced_through(self, model: nn.Module, state: _State) -> tuple[list[nn.Module], bool]:
        """Modules whose forward is traced, and whether one of them has a hook, which would not run."""
        through = [m for m in state.modules.values() if m is model or not self._leaf(m)]
        return through, any(_has_hooks(m) for m in through if m is not model)  # those of the model itself run anyway

    def _key(self, modes: tuple[bool, ...], state: _State) -> tuple:
        leaves = (m for m in state.modules.values() if self._leaf(m))
        kinds = tuple((m, type(m), _has_hooks(m), _settings(m)) for m in leaves)
        return modes, kinds, frozenset(state.dense)

    def find(self, model: nn.Module, state: _State) -> _Plan | None:
        """The plan for the modules as they are; None runs the model as it was written."""
        through, hooked = self._traced_through(model, state)
        if hooked:
            return None
        modes = tuple(m.training for m in through)
        key = self._key(modes, state)
        if key not in self._plans:
            try:  # a tracer meets whatever the forward does
                if modes not in self._traces:
                    self._traces[modes] = None
                    self._traces[modes] = _trace(model)
                graph = self._traces[modes]
                self._plans[key] = None if graph is None else _Plan(graph, self.layout, state.modules, state.dense)
            except Exception:
                self._plans[key] = None
        return self._plans[key]


def _maps_dtype() -> torch.dtype:
    """Autocast asks for maps of half the size."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


def _batch(values: Sequence[Any]) -> tuple[int, int]:
    """Images of the batch and pixels of each, by the first tensor among arguments."""
    sizes = ((v.shape[0], math.prod(v.shape[2:])) for v in values if isinstance(v, Tensor) and v.dim())
    return next(sizes, (LANES, 1))


def _mix_in(model: nn.Module, layout: str) -> None:
    """Raises whatever a tracer meets in a forward."""
    plain = type(model)
    model.__dict__["_graphs"] = _Graphs(model, layout)
    model.__class__ = type(plain.__name__, (InLayout, plain), {"_plain_class": plain, "__module__": plain.__module__})


def _enter(model: nn.Module, layout: str) -> nn.Module:
    """The model in the layout; its parts, if it cannot be traced as a whole, with a warning."""
    try:
        _mix_in(model, layout)
    except Exception as error:
        _enter_in_parts(model, layout)
        message = (
            f"{type(model).__name__} cannot be traced, so its layers convert one by one, but for what nn.Sequential "
            f"holds; BatchNorm2d takes the fused kernel on channels_last maps: {error}"
        )
        warnings.warn(message, stacklevel=3)
    return model


def _enter_in_parts(model: nn.Module, layout: str) -> None:
    # Of other modules a forward may have arguments whose values it depends on.
    for child in model.children():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = _OwnBatchNorm2d
        elif type(child) is nn.Sequential:
            try:
                _mix_in(child, layout)
            except Exception:
                _enter_in_parts(child, layout)
        elif not isinstance(child, InLayout):
            _enter_in_parts(child, layout)


def optimize_for_cpu(model: nn.Module, layout: str = "lines") -> nn.Module:
    """Run ``model`` in the layout of the sparse CPU kernels wherever that is possible, or on ordinary tensors.

    Call it after :func:`sparsebilevel.sparsify`, before DDP wraps the model. Results are those of the model as it was,
    up to rounding; parameters, buffers, hooks, state-dict keys and the class interface stay. Under torch.compile and
    export the model runs as it was written.

    Args:
        model: can be traced by ``torch.fx``. Of one that cannot, what ``nn.Sequential`` holds is taken each for itself
            where that can be traced, and single ``nn.BatchNorm2d`` take the fused kernel; a warning says so.
        layout: ``"lines"``, that of the sparse kernels, is the fastest and needs sparse convolutions. What it does not
            know gets ordinary tensors. Under autocast to bfloat16 the maps are bfloat16, and the parameters are read as
            they are. For a batch of a few images, which would leave lines half empty, on other devices and without the
            C++ extension the model runs as it was written. ``"channels_last"`` puts the weights into that memory
            format, and maps stay ordinary tensors: convolutions run as they are, each batch normalization with the
            addition and the ReLU that follow in one pass (:class:`sparsebilevel.FusedBatchNorm2d`).

    Returns:
        The same model.

    Raises:
        ValueError: an unknown layout; for ``"lines"`` a model without sparse convolutions.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; allowed: {', '.join(LAYOUTS)}")
    if layout == "lines" and not any(isinstance(layer, SparseMaskedConv2d) for _, layer in sparse_layers(model)):
        raise ValueError("model has no sparse convolution; call sparsify first")
    if isinstance(model, InLayout):
        if model._graphs.layout == layout:
            return model
        model.__class__ = model._plain_class  # type: ignore[assignment]
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _enter(model, layout)
