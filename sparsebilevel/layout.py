"""Whole networks on the CPU in the layout of the sparse kernels, or in channels_last.

Between sparse layers, feature maps stay *in lines*: contiguous ``[ceil(B / 16), C, H, W, 16]``, sixteen images side by
side. :func:`optimize_for_cpu` traces a model and cuts its graph into segments that stay in lines, each run by one
program of :mod:`sparsebilevel.kernels.lines`, and the rest, which meets ordinary tensors; in channels_last that is all.
Batch normalization, ReLU and additions are fused with one another and, in lines where nobody else needs their result,
into the convolution that follows. Modules, parameters and the keys of the state dict stay what they were.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import math
import operator
import random
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import lines, native
from .kernels.dispatch import forced_backend, lines_pay, sparse_support
from .kernels.plans import LANES, Geometry, Support, active_support
from .nn import FusedBatchNorm2d, SparseMaskedConv2d, SparseMaskedModule, _leave_layout, normalize, sparse_layers

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


def _has_hooks(module: nn.Module) -> bool:
    """Also a forward of the instance alone, by which some libraries hook themselves in."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _has_global_hooks() -> bool:
    """Whether there are hooks of all modules."""
    of_all = nn.modules.module
    return bool(
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
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
        sides = ((v, v) if isinstance(v, int) else v for v in (module.padding, module.kernel_size, module.dilation))
        fits = all(2 * p <= d * (k - 1) + 1 for p, k, d in zip(*sides, strict=True))  # others torch refuses
        return fits and not module.ceil_mode and not module.return_indices
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
    if module.eps <= 0:  # which torch refuses in training
        return False
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


# -- the trace of a forward --------------------------------------------------------------------------------------------


def _modes() -> tuple[bool, ...]:
    """What contexts change of a forward that a graph does not hold."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


_one_at_a_time = threading.RLock()  # tracers exchange methods of all modules
_is_tracing = False  # in whichever thread; torch's own flag is, from 2.14 on, that of the thread alone


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True  # what a forward computes from a buffer is computed by the graph

    def __init__(self) -> None:
        super().__init__()
        self._modes, self._thread = _modes(), threading.get_ident()
        self._proxies: list[weakref.ref[torch.fx.Proxy]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (SparseMaskedModule, FusedBatchNorm2d))
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # somebody else's module, or this one at work
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if _modes() != self._modes:
            raise ValueError("a part of the forward runs in a grad mode or under an autocast of its own")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg([*a.items()]),), {})
        if isinstance(a, (dict, list)) and type(a) not in (dict, list):  # the graph would hold a plain one
            raise ValueError(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        proxy = super().proxy(node)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def let_go(self) -> None:
        """Of the model, which torch's tracer, in cycles of references, would keep until the garbage collector runs."""
        self.root, self.submodule_paths, self.tensor_attrs = nn.Module(), None, {}

    def has_leaked(self) -> bool:
        """Whether somebody has kept a value of the traced forward, which is no tensor."""

        if all(proxy() is None for proxy in self._proxies):
            return False
        gc.collect()  # those in cycles of references are nobody's
        return any(proxy() is not None for proxy in self._proxies)


_INTERNAL = frozenset(dir(nn.Module()))
_MISSING = object()
_PLAIN = (int, float, complex, str, bool, type(None), torch.dtype, torch.device)


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _is_same(value: Any, before: Any) -> bool:
    """Numbers, strings and tuples of them by value, all else by identity."""
    return value is before or (
        type(value) is type(before) and _is_plain(value) and _is_plain(before) and value == before
    )


def _attribute(module: nn.Module, name: str) -> Any:
    """What a forward that reads it depends on; of parameters and buffers, whether they are None."""
    held = module.__dict__
    if name in held:
        return held[name]
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return tensors[name] is None
    return getattr(type(module), name, _MISSING)


class _Read(NamedTuple):
    """An attribute that a forward has read, as it was then."""

    module: nn.Module | None  # None = the model, which holds its traces
    name: str
    value: Any


@contextlib.contextmanager
def _recording(model: nn.Module, reads: list[_Read]) -> Iterator[None]:
    """Appends each attribute of its modules the first time it is read, but for modules, methods and properties."""
    known, thread = {id(module) for module in model.modules()}, threading.get_ident()
    seen: set[tuple[int, str]] = set()
    before = nn.Module.__dict__.get("__getattribute__")
    read: Any = nn.Module.__getattribute__

    def getattribute(self: nn.Module, name: str) -> Any:
        new = name not in _INTERNAL and (id(self), name) not in seen and id(self) in known
        if new and threading.get_ident() == thread:
            seen.add((id(self), name))
            held = read(self, "__dict__")
            if name in held or not (name in held["_modules"] or hasattr(getattr(type(self), name, None), "__get__")):
                reads.append(_Read(None if self is model else self, name, _attribute(self, name)))
        return read(self, name)

    setattr(nn.Module, "__getattribute__", getattribute)  # noqa: B010
    try:
        yield
    finally:
        if before is None:
            del nn.Module.__getattribute__
        else:
            setattr(nn.Module, "__getattribute__", before)  # noqa: B010


class _Watch:
    """What modules hold and the states of random numbers, to find and to undo what a trace changes of them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._attributes = [(module, dict(module.__dict__)) for module in modules]
        self._containers: dict[int, tuple[str, Any, list[Any]]] = {}
        for module, held in self._attributes:
            todo = [(f"{type(module).__name__}.{name}", value) for name, value in held.items()]
            while todo:
                name, value = todo.pop()
                if isinstance(value, (dict, list, set, deque)) and id(value) not in self._containers:
                    contents = self._contents(value)
                    self._containers[id(value)] = name, value, contents
                    todo += [(name, v) for v in contents]
                elif isinstance(value, tuple):
                    todo += [(name, v) for v in value]
        self._random = self._random_states()

    @staticmethod
    def _contents(container: Any) -> list[Any]:
        return [part for item in container.items() for part in item] if isinstance(container, dict) else [*container]

    @staticmethod
    def _random_states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state(), torch.get_rng_state()

    def undo(self) -> str | None:
        """Returns what is wrong with a forward that has changed something, or None."""
        changed = []
        for module, before in self._attributes:
            held = module.__dict__
            names = [n for n in {**before, **held} if not _is_same(held.get(n, _MISSING), before.get(n, _MISSING))]
            changed += [f"{type(module).__name__}.{name}" for name in names]
            for name in names:  # one by one: another thread may read the others
                held.pop(name, None)
                held.update({name: before[name]} if name in before else {})
        for name, container, contents in self._containers.values():
            now = self._contents(container)
            if len(now) != len(contents) or not all(map(_is_same, now, contents)):
                changed.append(name)
                container.clear()
                if isinstance(container, dict):
                    for key, value in zip(contents[::2], contents[1::2], strict=True):
                        container[key] = value
                else:
                    (container.update if isinstance(container, set) else container.extend)(contents)
        before_python, before_numpy, before_torch = self._random
        python, numpy, of_torch = self._random_states()
        drawn = python != before_python or not all(map(np.array_equal, numpy, before_numpy))
        if drawn or not torch.equal(of_torch, before_torch):
            random.setstate(before_python)
            np.random.set_state(before_numpy)
            torch.set_rng_state(before_torch)
            return "its forward draws random numbers itself"
        return f"its forward changes {changed[0]}" if changed else None


def _trace(model: nn.Module, reads: list[_Read], settled: dict[str, Any]) -> torch.fx.Graph:
    """The graph of the forward as it was written. Tensors that it has made itself are in ``meta`` of their nodes.

    Arguments that are ``settled`` have these values, and no place in the graph. Appends to ``reads`` what the graph
    depends on; nothing else changes. Raises whatever a tracer meets in a forward,
    and ValueError where to run the graph again would not do what the forward does.
    """
    global _is_tracing
    tracer, watch = _Tracer(), _Watch(model.modules())
    held = set(model.__dict__)
    try:
        with _one_at_a_time, _recording(model, reads):
            was_tracing, _is_tracing = _is_tracing, True
            try:
                graph = tracer.trace(model, concrete_args=dict(settled) or None)
            finally:
                _is_tracing = was_tracing
        _forget(graph, settled)
        for node in graph.find_nodes(op="call_method", target="view"):
            # The maps may have other strides here than in the forward as it was written.
            if not node.kwargs and not any(isinstance(size, torch.dtype) for size in node.args):
                node.target = "reshape"
        # The tracer makes attributes of the model of them.
        made = [node for node in graph.find_nodes(op="get_attr") if str(node.target) in model.__dict__.keys() - held]
        for node in made:
            node.meta["constant"] = model.__dict__[str(node.target)]
        for name in {str(node.target) for node in made}:
            del model.__dict__[name]
    finally:
        change = watch.undo()
        tracer.let_go()
    if change is not None:
        raise ValueError(change)
    if tracer.has_leaked():
        raise ValueError("its forward keeps values elsewhere than in the model")
    return graph


def _forget(graph: torch.fx.Graph, settled: Iterable[str]) -> None:
    """Takes the places of settled arguments out of a graph, with the assertions about them, which ours makes itself."""
    names = tuple(f"{name}_" for name in settled)
    gone = [node for node in graph.find_nodes(op="placeholder") if str(node.target).rstrip("0123456789") in names]
    for node in gone:  # what is found on the way comes after it
        gone += [user for user in node.users if user not in gone]
    for node in sorted(gone, reverse=True):
        graph.erase_node(node)


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
            [
                _normalization(norm, norms[:i].count(norm) if norm.momentum is None else 0)
                for i, norm in enumerate(norms)
            ],
        )
        try:
            out = self._program(inputs, operands, _maps_dtype())
        except lines.Unfit:
            return self._plain(model, *inputs)
        if counters := [counter for norm in norms if (counter := _counter(norm)) is not None]:
            torch._foreach_add_(counters, 1)
        return out


@functools.lru_cache(maxsize=64)
def _all_kept(shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device="cpu")


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


def _counter(module: Any) -> Tensor | None:
    """Of the batches of an ``nn.BatchNorm2d``, if the next one counts."""
    return module.num_batches_tracked if module.training and module.track_running_stats else None


def _normalization(module: Any, earlier: int) -> lines.Normalization:
    """What ``nn.BatchNorm2d`` would do next, after so many ``earlier`` uses in this forward."""
    running = None
    is_tracked = not module.training or module.track_running_stats
    if is_tracked and module.running_mean is not None and module.running_var is not None:
        running = module.running_mean, module.running_var
    of_batch = module.training or running is None
    momentum, counter = module.momentum, _counter(module)
    if momentum is None:  # the mean over all batches
        momentum = 0.0 if counter is None else 1.0 / float(counter + 1 + earlier)
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


_IN_PLACE = {
    getattr(operator, name) for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
}
_NEW = frozenset(  # functions and methods whose result shares no memory with what they read
    "add sub rsub mul div truediv floordiv mod pow neg abs exp log sqrt rsqrt square sigmoid tanh softmax log_softmax "
    "relu relu6 leaky_relu elu gelu silu mish hardtanh hardswish hardsigmoid softplus matmul mm bmm linear conv2d "
    "batch_norm layer_norm group_norm max_pool2d avg_pool2d adaptive_avg_pool2d mean sum amax amin cat stack clone "
    "interpolate where lerp addcmul".split()
)


def _name(node: torch.fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def written_by(node: torch.fx.Node, module: nn.Module | None) -> list[torch.fx.Node]:
    """Values that a node, of this module, writes to."""
    if module is not None:
        return node.all_input_nodes[:1] if getattr(module, "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    in_place = _name(node).endswith("_") and not _name(node).endswith("__")
    if in_place or node.target in _IN_PLACE or node.kwargs.get("inplace", False):
        return node.all_input_nodes[:1]
    out: list[torch.fx.Node] = []
    torch.fx.map_arg(node.kwargs.get("out"), out.append)
    return out


def _sharing_memory(node: torch.fx.Node, of_node: dict[torch.fx.Node, nn.Module | None]) -> list[torch.fx.Node]:
    """The value, and those that it may be a view of."""
    found = [node]
    for value in found:
        module = of_node[value]
        if module is not None:
            is_new = bool(module._parameters) or _KINDS.get(type(module), "same") != "same"
        else:
            is_new = _name(value) in _NEW and "out" not in value.kwargs
        if not is_new or written_by(value, module):
            # Other arguments of a method are sizes and the like; of a function there may be views of each.
            of_first = value.op == "call_method" or value.target in (operator.getitem, getattr)
            found += [a for a in value.all_input_nodes[: 1 if of_first else None] if a not in found]
    return found


def _check_writes(node: torch.fx.Node, of_node: dict[torch.fx.Node, nn.Module | None]) -> None:
    """ValueError if the node writes to what others may read, for they would read something else in another order."""
    for written in written_by(node, of_node[node]):
        for value in _sharing_memory(written, of_node):
            if len(value.users) > 1:
                raise ValueError(f"{node.name} writes to a tensor that others read")
            if "constant" in value.meta:
                raise ValueError(f"{node.name} writes to a tensor that each forward makes anew")


def _writes_outside(node: torch.fx.Node, of_node: dict[torch.fx.Node, nn.Module | None]) -> bool:
    """Whether it writes to an argument of the forward, a parameter or a buffer, which others see."""
    values = [v for written in written_by(node, of_node[node]) for v in _sharing_memory(written, of_node)]
    return any(value.op in ("placeholder", "get_attr") for value in values)


def _filled(result: Any, values: dict[torch.fx.Node, Any]) -> Any:
    """What a graph returns, in lists and dicts of the caller's own."""
    if isinstance(result, dict):
        return {name: _filled(part, values) for name, part in result.items()}
    if isinstance(result, list):
        return [_filled(part, values) for part in result]
    if type(result) is tuple:
        return tuple([_filled(part, values) for part in result])
    if isinstance(result, tuple):  # a named one
        return type(result)(*[_filled(part, values) for part in result])
    return torch.fx.map_arg(result, values.__getitem__)


def _state_of(
    node: torch.fx.Node, of_node: Mapping[torch.fx.Node, nn.Module | None], modules: Mapping[str, nn.Module]
) -> Any:
    """What a node changes or reads besides its operands, and so must do in the order of the program.

    Those are statistics of normalizations, also where a forward reads such a buffer itself, and the random generator.
    """
    module = of_node[node]
    if node.op == "get_attr":
        module = modules.get(str(node.target).rpartition(".")[0])
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return id(module) if module.training else None
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) and module.training:
        return "random"
    if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
        return "random"
    return None


class _Plan:
    """A traced graph cut into parts, which run one after the other: segments in lines, and what is between them."""

    def __init__(self, graph: torch.fx.Graph, layout: str, modules: dict[str, nn.Module], dense: set[str]) -> None:
        of_node = {n: modules[str(n.target)] if n.op == "call_module" else None for n in graph.nodes}
        kinds = {
            n: "other"
            if (n.op == "call_module" and n.target in dense) or _writes_outside(n, of_node)
            else _kind(n, of_node[n])
            for n in graph.nodes
        }
        leads_to_lines: set[torch.fx.Node] = set()  # by way of what can be done in lines
        for node in reversed(list(graph.nodes)):
            if any(kinds[u] == "conv" or (kinds[u] in _PASSES_ON and u in leads_to_lines) for u in node.users):
                leads_to_lines.add(node)
        in_lines: set[torch.fx.Node] = set()
        levels: dict[torch.fx.Node, int] = {}  # how often the way to a node has left the lines
        latest: dict[Any, torch.fx.Node] = {}  # the node that used a state last
        for node in graph.nodes:
            kind = kinds[node]
            from_lines = any(a in in_lines and kinds[a] != "mean" for a in node.all_input_nodes)
            starts = kind == "conv" or (kind in ("norm", "stem") and node in leads_to_lines)
            if layout == "lines" and (starts or (kind not in ("other", "stem") and from_lines)):
                in_lines.add(node)
            left = [a in in_lines and (kinds[a] == "mean" or node not in in_lines) for a in node.all_input_nodes]
            levels[node] = max((levels[a] + out for a, out in zip(node.all_input_nodes, left, strict=True)), default=0)
            if (state := _state_of(node, of_node, modules)) is not None:  # no part may come before an earlier use
                if (before := latest.get(state)) is not None:
                    # Of one level, what is between the segments is carried out first.
                    after = before in in_lines and node not in in_lines
                    levels[node] = max(levels[node], levels[before] + after)
                latest[state] = node
            _check_writes(node, of_node)
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (output,) = (node for node in graph.nodes if node.op == "output")
        self._constants = {node: node.meta["constant"] for node in graph.nodes if "constant" in node.meta}
        given = {*self._inputs, *self._constants, output}
        inner = [node for node in graph.nodes if node not in given]
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
        values = self._constants | {node: arguments[str(node.target).lstrip("*")] for node in self._inputs}
        for (part, inputs, outputs), done in zip(self.parts, self._done, strict=True):
            given = [values[node] for node in inputs]
            out = part(state, model, *given) if isinstance(part, _Segment) else part(model, *given)
            values.update(zip(outputs, out, strict=True))
            for node in done:
                del values[node]
        return _filled(self._result, values)


def _mark(module: nn.Module, marks: list[Any]) -> None:
    """Appends what tells one tree below a module from another. Every forward asks for it: this is the fastest way."""
    children = module._modules
    marks += (module.training, len(children))
    for name, child in children.items():
        marks += (name, id(child), type(child))
        if child is not None:
            _mark(child, marks)


def _collect_modules(module: nn.Module, name: str, found: dict[str, nn.Module]) -> None:
    """``named_modules(remove_duplicate=False)``, which takes longer."""
    found[name] = module
    for part, child in module._modules.items():
        if child is not None:
            _collect_modules(child, f"{name}.{part}" if name else part, found)


@dataclasses.dataclass
class _Trace:
    """Without a graph the forward cannot be traced. A plan fixes the settings of the modules and which convolutions
    are sparse, so there is one for each."""

    reads: list[_Read]
    settled: dict[str, Any]
    graph: torch.fx.Graph | None = None
    plans: dict[tuple, _Plan | None] = dataclasses.field(default_factory=dict)

    def holds(self, model: nn.Module, settled: dict[str, Any]) -> bool:
        """Whether it is the trace of a forward with these arguments, and of the attributes as they are."""
        if self.settled.keys() != settled.keys() or not all(_is_same(settled[n], v) for n, v in self.settled.items()):
            return False
        return all(
            _is_same(_attribute(model if module is None else module, name), value) for module, name, value in self.reads
        )


class _Structure:
    """The modules below a model, by name, each in its mode, with the traces made of them; latest last."""

    def __init__(self, model: nn.Module, marks: list[Any]) -> None:
        self.marks = marks
        self.modules: dict[str, nn.Module] = {}
        _collect_modules(model, "", self.modules)  # holds them too, so that ids stay theirs
        del self.modules[""]  # the model holds this, and would live until the garbage collector looks
        self.sparse = [(name, m) for name, m in self.modules.items() if isinstance(m, SparseMaskedConv2d)]
        tracer = _Tracer()
        self.leaves = [m for m in self.modules.values() if tracer.is_leaf_module(m, "")]
        leaves = set(map(id, self.leaves))
        # Hooks of these would not run; those of the model itself run anyway.
        self.through = [m for m in self.modules.values() if id(m) not in leaves]
        self.traces: list[_Trace] = []

    def trace(self, model: nn.Module, settled: dict[str, Any]) -> _Trace | None:
        """Of a forward with these arguments, and of the attributes as they are."""
        return next((t for t in self.traces if t.holds(model, settled)), None)


class _State:
    """What a forward finds of a model: modules by name, and the supports of its sparse convolutions, None = dense.

    ``images`` is the size of the batch; None asks for no supports.
    """

    def __init__(self, structure: _Structure, images: int | None) -> None:
        self.structure, self.modules = structure, structure.modules
        self.supports: dict[str, Support | None] = {}
        for name, module in structure.sparse if images is not None else ():
            stride = module.stride[0] * module.stride[1]
            operands = module.weight, module.weight, module.mask
            self.supports[name] = sparse_support("masked_conv2d", *operands, stride, images, groups=module.groups)

    @property
    def dense(self) -> set[str]:
        """Sparse convolutions that the dense library takes."""
        return {name for name, support in self.supports.items() if support is None}


class _Forward:
    """``forward`` of a class that :class:`InLayout` is mixed into. Of the class, which is what tracers ask, it is the
    forward as it was written."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain = plain
        self._run: Any = functools.wraps(plain)(lambda model, *args, **kwargs: _run(model, *args, **kwargs))

    def __get__(self, model: nn.Module | None, kind: type[nn.Module]) -> Callable[..., Any]:
        if model is None:
            return self._plain
        # Dynamo cannot call types.MethodType, nor, in torch 2.11, __get__.
        return functools.partial(self._plain, model) if torch.compiler.is_compiling() else self._run.__get__(model)


class InLayout(nn.Module):
    """Mixed into the class of a model by :func:`optimize_for_cpu`: its forward, in a layout where that is possible.

    Others of the class, as slices of ``nn.Sequential`` are, have no ``_graphs`` and run as they were written. What is
    done with a model are functions, for methods could have the names of its own.
    """

    _plain_class: type[nn.Module]
    _graphs: _Graphs | None = None  # in __dict__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Unfinished, (), (_aswritten_by(self), _layout_of(self))

    def __copy__(self) -> Any:
        return _Unfinished().enter(copy.copy(_aswritten_by(self)), _layout_of(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = _Unfinished()
        return new.enter(copy.deepcopy(_aswritten_by(self), memo), _layout_of(self))


class _Unfinished(nn.Module):
    """What a copy is until its state is there: others in a cycle of references may hold it already."""

    def enter(self, model: nn.Module, layout: str | None) -> nn.Module:
        """Becomes the model, in the layout."""
        self.__dict__ = model.__dict__
        self.__class__ = type(model)  # type: ignore[assignment]
        return self if layout is None else _enter(self, layout)

    def __setstate__(self, state: Any) -> None:
        self.enter(*state)


def _run(model: InLayout, *args: Any, **kwargs: Any) -> Any:
    graphs = model._graphs
    if graphs is not None and graphs.takes(*args, *kwargs.values()):
        state = graphs.state(model, *args, *kwargs.values())
        arguments = graphs.bind(model, *args, **kwargs)
        plan = None if arguments is None else graphs.find(model, state, graphs.settled(arguments))
        if plan is not None and arguments is not None:
            return plan(model, state, arguments)
    return model._plain_class.forward(model, *args, **kwargs)


def _layout_of(model: InLayout) -> str | None:
    return None if model._graphs is None else model._graphs.layout


def _aswritten_by(model: InLayout) -> nn.Module:
    """One of its own class that holds the same, which copies and saves it as that class does."""
    plain = nn.Module.__new__(model._plain_class)  # not all make another in their own __new__
    plain.__dict__.update({k: v for k, v in model.__dict__.items() if k != "_graphs"})
    return plain


class _OwnBatchNorm2d(FusedBatchNorm2d):
    """What the ``nn.BatchNorm2d`` of a model that cannot be traced becomes, in place."""

    _plain_class = nn.BatchNorm2d

    def _get_name(self) -> str:
        return "BatchNorm2d"


_KEPT = 8  # structures of a model and traces of each, of which most models need one or two
_RUNS = 16  # forwards for each further trace, which takes as long as a few of them


class _Graphs:
    """Plans of a model, found again by its structure and by what its forward has read of its modules."""

    def __init__(self, model: nn.Module, layout: str) -> None:
        self.layout = layout
        self._signature = inspect.signature(type(model).forward)
        self._defaults = {p.name: p.default for p in self._signature.parameters.values() if p.default is not p.empty}
        self._structures: list[_Structure] = []
        self._forwards = self._traced = 0
        state = self.state(model)
        if not any(map(_has_hooks, state.structure.through)):
            trace = self._trace(model, state.structure, self.settled(self._defaults))
            assert trace.graph is not None
            trace.plans[self._key(state)] = _Plan(trace.graph, layout, state.modules, state.dense)

    def takes(self, *values: Any) -> bool:
        """Whether there may be a plan for these arguments.

        Compilers, tracers, exporters, modes and hooks of all modules see the model as it was written, and so does what
        the lines do not take; in channels_last each op decides for itself. Threads do not wait for the trace of
        another, which may wait for them.
        """
        if native.watched() or _is_tracing or torch.fx._symbolic_trace.is_fx_symbolic_tracing() or _has_global_hooks():
            return False
        if self.layout != "lines":
            return True
        if any(isinstance(v, Tensor) and (v.device.type != "cpu" or not v.numel()) for v in values):
            return False
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        return native.available() and lines_pay(*_batch(values))

    def bind(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Arguments of the forward by name; None if they do not fit, which the forward will say."""
        try:
            bound = self._signature.bind(model, *args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return bound.arguments

    def settled(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Numbers, strings and None that have a default: a forward may decide by them what it does."""
        return {name: arguments[name] for name in self._defaults if type(arguments[name]) in _PLAIN}

    def state(self, model: nn.Module, *values: Any) -> _State:
        """For arguments of the forward."""
        return _State(self._structure(model), _batch(values)[0] if self.layout == "lines" else None)

    def _structure(self, model: nn.Module) -> _Structure:
        marks: list[Any] = [_modes()]
        _mark(model, marks)
        for structure in self._structures:
            if structure.marks == marks:
                return structure
        self._structures = [*self._structures[1 - _KEPT :], _Structure(model, marks)]
        return self._structures[-1]

    def _trace(self, model: nn.Module, structure: _Structure, settled: dict[str, Any]) -> _Trace:
        """Raises whatever a tracer meets in a forward, but keeps the trace."""
        self._traced += 1
        trace = _Trace([], settled)
        try:
            trace.graph = _trace(model, trace.reads, settled)
        finally:
            structure.traces = [*structure.traces[1 - _KEPT :], trace]
        return trace

    @staticmethod
    def _key(state: _State) -> tuple:
        return tuple((_has_hooks(m), _settings(m)) for m in state.structure.leaves), frozenset(state.dense)

    def find(self, model: nn.Module, state: _State, settled: dict[str, Any]) -> _Plan | None:
        """The plan for the modules as they are, and these arguments; None runs the model as it was written."""
        if any(map(_has_hooks, state.structure.through)):
            return None
        self._forwards += 1
        trace, key = state.structure.trace(model, settled), self._key(state)
        if trace is not None and key in trace.plans:
            return trace.plans[key]
        with _one_at_a_time:
            return self._make(model, state, settled, key)

    def _make(self, model: nn.Module, state: _State, settled: dict[str, Any], key: tuple) -> _Plan | None:
        """The plan, unless another thread has made it meanwhile."""
        trace = state.structure.trace(model, settled)
        try:  # a tracer meets whatever the forward does
            if trace is None:
                if self._traced >= _KEPT + self._forwards // _RUNS:
                    return None
                trace = self._trace(model, state.structure, settled)
            if key not in trace.plans:
                trace.plans[key] = None
                if trace.graph is not None:
                    trace.plans[key] = _Plan(trace.graph, self.layout, state.modules, state.dense)
            return trace.plans[key]
        except Exception:
            return None


def _maps_dtype() -> torch.dtype:
    """Autocast asks for maps of half the size."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


def _batch(values: Sequence[Any]) -> tuple[int, int]:
    """Images of the batch and pixels of each, by the first tensor among arguments."""
    sizes = ((v.shape[0], math.prod(v.shape[2:])) for v in values if isinstance(v, Tensor) and v.dim())
    return next(sizes, (LANES, 1))


# By the class and its forward: copies of a model are of one class, as others may ask of them.
_CLASSES: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def _mix_in(model: nn.Module, layout: str) -> None:
    """Raises whatever a tracer meets in a forward."""
    plain = type(model)
    model.__dict__["_graphs"] = _Graphs(model, layout)
    mixed = _CLASSES.get((plain, plain.forward))
    if mixed is None:
        own = {"_plain_class": plain, "forward": _Forward(plain.forward), "__module__": plain.__module__}
        mixed = _CLASSES[plain, plain.forward] = type(plain.__name__, (InLayout, plain), own)
    model.__class__ = mixed


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
    export, traced by others with ``torch.fx``, under hooks of all modules and modes such as ``FlopCounterMode`` the
    model runs as it was written.

    A trace is made anew when modules are added, replaced, removed or switched between training and evaluation, in
    another grad mode, and when an attribute that the forward reads of its modules is another object or value: it takes
    as long as a few forwards. While that happens again and again, most of them run as they were written; what changes
    at each step had better be a buffer. All else that a forward reads is fixed by the trace: globals, what is inside of
    lists, dicts and other objects, and what is computed from tensors that are neither parameters nor buffers.
    ``isinstance(x, Tensor)`` and ``torch.is_tensor(x)`` are false of all that depends on the input, a limit of
    ``torch.fx``: a forward that decides by them is traced the wrong way, and must not be given. Another is that
    ``x += y`` is taken for ``x = x + y``: the tensor that ``x`` was, which may have other names, stays as it is.

    Several threads may use a model. A trace is made by one at a time; others go on meanwhile, but must not draw from
    the default generators of random numbers, for which the forward would be blamed.

    Args:
        model: can be traced by ``torch.fx``, with a forward that does no more than to compute its result. One that sets
            attributes or fills lists of its modules, draws numbers from the default generators of Python, NumPy or
            torch other than by operations on its input, enters ``no_grad`` or autocast, or writes to a tensor that
            others read, if only through a view, cannot. Of a model that cannot, what ``nn.Sequential`` holds is taken
            each for itself where that can be traced, and single ``nn.BatchNorm2d`` take the fused kernel; a warning
            says so. One that turns out so later, as in another mode, runs as it was written there.
        layout: ``"lines"``, that of the sparse kernels, is the fastest and needs sparse convolutions. What it does not
            know gets ordinary tensors. Under autocast to bfloat16 the maps are bfloat16, and the parameters are read as
            they are. For a batch that would leave too much of its lines empty (of few images, or few more than a
            multiple of 16), on other devices and without the C++ extension the model runs as it was written.
            ``"channels_last"`` puts the weights into that memory format, and maps stay ordinary tensors: convolutions
            run as they are, each batch normalization with the addition and the ReLU that follow in one pass
            (:class:`sparsebilevel.FusedBatchNorm2d`).

    Returns:
        The same model.

    Raises:
        ValueError: an unknown layout; for ``"lines"`` a model without sparse convolutions.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; allowed: {', '.join(LAYOUTS)}")
    if layout == "lines" and not any(isinstance(layer, SparseMaskedConv2d) for _, layer in sparse_layers(model)):
        raise ValueError(
            "model has no sparse convolution, whose maps this call is for; call sparsify first, and leave networks of "
            "linear layers as they are"
        )
    if isinstance(model, InLayout) and _layout_of(model) == layout:
        return model
    forced_backend()  # a name that is not known would be taken for the model's fault
    _leave_layout(model)
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _enter(model, layout)
