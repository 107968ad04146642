"""Whole networks on the CPU in the layout of the sparse kernels.

Between sparse layers, feature maps stay *in lines*: contiguous ``[ceil(B / 16), C, H, W, 16]``, sixteen images side by
side. :func:`optimize_for_cpu` traces a model and runs it so wherever that is possible: batch normalization, ReLU and
additions are carried out on lines too, fused with one another and, where nobody else needs their result, into the
convolution that follows. Everything else meets ordinary tensors; maps are converted around it. Modules, parameters and
the keys of the state dict stay what they were.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import lines, native
from .kernels.dispatch import sparse_support
from .kernels.plans import Geometry
from .nn import SparseMaskedConv2d, SparseMaskedModule, sparse_layers

# -- values on their way through the network ---------------------------------------------------------------------------


@dataclasses.dataclass
class Lines:
    """Maps in lines, of so many images; ``join`` is where the gradients of two users meet."""

    data: Tensor
    images: int
    join: lines.Join | None = None


@dataclasses.dataclass
class Pending:
    """A batch normalization that has its statistics, but has not been carried out: more may be fused with it."""

    source: Lines
    module: nn.BatchNorm2d
    norm: lines.Norm
    residual: Lines | None = None

    def carry_out(self) -> Lines:
        data, images, module = self.source.data, self.source.images, self.module
        residual, join = (None, None) if self.residual is None else (self.residual.data, self.residual.join)
        return Lines(lines.Normalize.apply(data, module.weight, module.bias, residual, self.norm, images, join), images)


Value = Any  # Lines, Pending, or whatever an ordinary network hands on


def _lines(value: Lines | Pending | Tensor) -> Lines:
    if isinstance(value, Pending):
        return value.carry_out()
    return value if isinstance(value, Lines) else Lines(lines.ToLines.apply(value), value.shape[0])


def ordinary(value: Value) -> Any:
    """The value as any module or function takes it."""
    if isinstance(value, (Lines, Pending)):
        value = _lines(value)
        return lines.FromLines.apply(value.data, value.images)
    return value


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_maps(value: Value) -> bool:
    """Maps as they are or as they can be put in lines."""
    if isinstance(value, Tensor):
        return value.dim() == 4 and value.dtype == torch.float32 and value.numel() > 0
    return isinstance(value, (Lines, Pending))


def convolve(value: Value, module: SparseMaskedConv2d) -> Value:
    """A sparse convolution, in lines if the sparse kernels take it."""
    if type(module) is not SparseMaskedConv2d or _has_hooks(module) or not _is_maps(value):
        return module(ordinary(value))
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return module(ordinary(value))
    images, channels, *_ = _map_shape(value)
    data = value if isinstance(value, Tensor) else (value.source if isinstance(value, Pending) else value).data
    stride, dilation = module.stride, module.dilation
    support = sparse_support("masked_conv2d", data, module.weight, module.mask, stride[0] * stride[1], images)
    if support is None or channels != module.in_channels:
        return module(ordinary(value))
    norm = norm_weight = norm_bias = None
    if isinstance(value, Pending) and value.residual is None:
        norm, norm_weight, norm_bias, source = value.norm, value.module.weight, value.module.bias, value.source
    else:
        source = _lines(value)
    geometry = Geometry(_pair(stride), _pair(module.padding), _pair(dilation), module.groups)
    collected = module._sink_arguments()
    out = lines.Convolve.apply(
        source.data,
        norm_weight,
        norm_bias,
        module.weight,
        module.bias,
        collected["mask_scores"],
        collected["grad_sink"],
        lines.Convolution(module.mask, support, collected["positions"], geometry, images, norm, source.join),
    )
    return Lines(out, images)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def normalize(value: Value, module: nn.BatchNorm2d, wanted_in_lines: bool, users: int) -> Value:
    """Batch normalization; nothing but the statistics is computed as long as nobody else needs the result."""
    if isinstance(value, Tensor) and not wanted_in_lines:
        return module(value)
    if type(module) is not nn.BatchNorm2d or _has_hooks(module) or not _is_maps(value):
        return module(ordinary(value))
    if any(p is not None and p.dtype != torch.float32 for p in (module.weight, module.bias, module.running_mean)):
        return module(ordinary(value))
    source = _lines(value)
    pending = Pending(source, module, _norm(source, module))
    return pending if users == 1 else pending.carry_out()


@torch.no_grad()
def _norm(source: Lines, module: nn.BatchNorm2d) -> lines.Norm:
    """By the statistics of the batch or by the running ones, which follow, as in ``nn.BatchNorm2d``."""
    data, images = source.data, source.images
    running = None
    if module.running_mean is not None and module.running_var is not None:
        running = module.running_mean, module.running_var
    if running is not None and not module.training:
        return lines.Norm.of_running(module.weight, module.bias, module.eps, running)
    if images * data.shape[2] * data.shape[3] == 1:
        size = [images, *data.shape[1:4]]
        raise ValueError(f"batch normalization in training needs more than one value per channel, got input of {size}")
    momentum = 0.0
    if running is not None:
        assert module.num_batches_tracked is not None
        module.num_batches_tracked.add_(1)
        # None asks for the mean over all batches.
        momentum = 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    return lines.Norm.of_batch(data, images, module.weight, module.bias, module.eps, running, momentum)


def rectify(value: Value, users: int, module: nn.Module | None = None) -> Value:
    """ReLU. What two use, an addition and a convolution before it, gets a place where their gradients meet."""
    if module is not None and (type(module) is not nn.ReLU or _has_hooks(module)):
        return module(ordinary(value))
    if isinstance(value, Pending):
        value.norm.relu = True
        if users == 1 and value.residual is None:
            return value
        value = value.carry_out()
        if users == 2:
            value.join = lines.Join()
        return value
    if isinstance(value, Lines):
        return Lines(F.relu(value.data), value.images)
    return F.relu(value)


def add(a: Value, b: Value, users: int) -> Value:
    """``a + b``; the addition to a normalization waits for the ReLU that may follow."""
    if not (isinstance(a, (Lines, Pending)) or isinstance(b, (Lines, Pending))):
        return a + b
    if not (_is_maps(a) and _is_maps(b)) or _map_shape(a) != _map_shape(b):
        return ordinary(a) + ordinary(b)
    if not _can_take_residual(a):
        a, b = b, a
    if not _can_take_residual(a):
        a, b = _lines(a), _lines(b)
        return Lines(a.data + b.data, a.images)
    a.residual = _lines(b)
    return a if users == 1 else a.carry_out()


def _can_take_residual(value: Value) -> bool:
    return isinstance(value, Pending) and value.residual is None and not value.norm.relu


def _map_shape(value: Lines | Pending | Tensor) -> tuple[int, ...]:
    if isinstance(value, Pending):
        value = value.source
    return tuple(value.shape) if isinstance(value, Tensor) else (value.images, *value.data.shape[1:4])


def each(value: Value, module: nn.Module) -> Value:
    """An activation that treats every element alike."""
    if type(module) in _EACH and not _has_hooks(module) and isinstance(value, (Lines, Pending)):
        value = _lines(value)
        return Lines(module(value.data), value.images)
    return module(ordinary(value))


def hand_on(value: Value, module: nn.Module) -> Value:
    """Nothing."""
    return value if type(module) is nn.Identity and not _has_hooks(module) else module(ordinary(value))


def max_pool(value: Value, module: nn.MaxPool2d) -> Value:
    """Maximum pooling."""
    if type(module) is not nn.MaxPool2d or _has_hooks(module) or module.ceil_mode or module.return_indices:
        return module(ordinary(value))
    if not isinstance(value, (Lines, Pending)):
        return module(value)
    value = _lines(value)
    settings = (_pair(s) for s in (module.kernel_size, module.stride, module.padding, module.dilation))
    return Lines(lines.MaxPool.apply(value.data, *settings), value.images)


# -- the rewritten network ---------------------------------------------------------------------------------------------


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseMaskedModule) or super().is_leaf_module(m, module_qualified_name)


_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_EACH: set[type[nn.Module]] = {
    *(nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
}
_KINDS: dict[type[nn.Module], str] = {
    **{SparseMaskedConv2d: "conv", nn.BatchNorm2d: "norm", nn.ReLU: "relu"},
    **{nn.MaxPool2d: "pool", nn.Identity: "same"},
}
_PASSES_ON = ("relu", "add", "each", "pool", "same")
_RELUS = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}


def _kind(node: torch.fx.Node, modules: dict[str, nn.Module]) -> str:
    """``conv``, ``norm``, ``relu``, ``add``, ``pool``, ``same``, ``each`` (other activations) or ``other``."""
    if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        module = modules[str(node.target)]
        return "each" if type(module) in _EACH else _KINDS.get(type(module), "other")
    if node.op in ("call_function", "call_method"):
        values = [a for a in node.args if isinstance(a, torch.fx.Node)]
        if node.target in _ADDITIONS and len(values) == len(node.args) == 2 and not node.kwargs:
            return "add"
        if node.target in _RELUS and len(values) == 1 and set(node.kwargs) <= {"inplace"}:
            return "relu"
    return "other"


_OPS: dict[str, Callable[..., Value]] = {
    **{"conv": convolve, "norm": normalize, "relu": rectify, "add": add},
    **{"pool": max_pool, "same": hand_on, "each": each},
}


def _rewrite(model: nn.Module) -> torch.fx.Graph:
    """The traced graph of ``model``, on values of this module."""
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules())
    kinds = {node: _kind(node, modules) for node in graph.nodes}

    leads_to_lines: set[torch.fx.Node] = set()  # by way of what can be done in lines
    for node in reversed(list(graph.nodes)):
        if any(kinds[u] == "conv" or (kinds[u] in _PASSES_ON and u in leads_to_lines) for u in node.users):
            leads_to_lines.add(node)

    for node in list(graph.nodes):
        kind, users = kinds[node], len(node.users)
        with graph.inserting_before(node):
            if kind == "other":
                for argument in node.all_input_nodes:
                    if kinds.get(argument, "ordinary") != "other":
                        node.replace_input_with(argument, graph.call_function(ordinary, (argument,)))
                continue
            operands: tuple[Any, ...] = tuple(a for a in node.args if isinstance(a, torch.fx.Node))
            module: tuple[Any, ...] = (graph.get_attr(str(node.target)),) if node.op == "call_module" else ()
            if kind == "norm":
                module += (node in leads_to_lines, users)
            elif kind in ("relu", "add"):
                module = (users, *module)
            new = graph.call_function(_OPS[kind], (*operands, *module))
        kinds[new] = kind
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return graph


class InLayout(nn.Module):
    """Mixed into the class of a model by :func:`optimize_for_cpu`: its forward, in lines where that is possible."""

    _plain_class: type[nn.Module]
    _graphs: _Graphs  # in __dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = None if _runs_plain(args, kwargs) else self._graphs.find(self)
        return (run or self._plain_class.forward)(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._plain_class, self._plain_state())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self._plain_class.__new__(self._plain_class)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self._plain_state(), memo))
        return optimize_for_cpu(new)

    def _plain_state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_graphs"}


def _rebuild(plain_class: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    model = plain_class.__new__(plain_class)
    model.__dict__.update(state)
    return optimize_for_cpu(model)


class _Graphs:
    """Forwards of a model in lines. Tracing fixes what a forward reads of ``training``, so there is one for each."""

    def __init__(self, model: nn.Module) -> None:
        leaves = _Tracer()
        self._traced_through = [m for m in model.modules() if m is model or not leaves.is_leaf_module(m, "")]
        self._forwards: dict[tuple[bool, ...], Callable[..., Any] | None] = {}
        if not self._hooked():
            self._forwards[self._modes()] = _compile(_rewrite(model))

    def _modes(self) -> tuple[bool, ...]:
        return tuple(m.training for m in self._traced_through)

    def _hooked(self) -> bool:
        return any(_has_hooks(m) for m in self._traced_through[1:])  # those of the model itself run anyway

    def find(self, model: nn.Module) -> Callable[..., Any] | None:
        """The forward for the modes that the modules are in; None runs the model as it was written."""
        if self._hooked():  # a hook on what is traced through would not run
            return None
        modes = self._modes()
        if modes not in self._forwards:
            try:
                self._forwards[modes] = _compile(_rewrite(model))
            except Exception:  # a tracer meets whatever the forward does
                self._forwards[modes] = None
        return self._forwards[modes]


def _runs_plain(args: Any, kwargs: Any) -> bool:
    """Compilers and exporters see the model as it was written, and so does what the sparse kernels do not take."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not native.available():
        return True
    if torch.is_autocast_enabled("cpu"):
        return True
    values = (*args, *kwargs.values())
    return any(
        isinstance(v, torch.fx.Proxy) or (isinstance(v, Tensor) and (v.device.type != "cpu" or not v.numel()))
        for v in values
    )


def optimize_for_cpu(model: nn.Module) -> nn.Module:
    """Run ``model`` in the layout of the sparse CPU kernels wherever that is possible.

    Call it after :func:`sparsebilevel.sparsify`, before DDP wraps the model. Results are those of the model as it was,
    up to the rounding of float32; parameters, buffers, hooks, state-dict keys and the class interface stay. What the
    layout does not know gets ordinary tensors. Under autocast, torch.compile, export, on other devices and without the
    C++ extension the model runs as it was written.

    Args:
        model: has sparse convolutions, and can be traced by ``torch.fx``; if it cannot, it is left as it is, with a
            warning: the layers still use the sparse kernels, converting at each.

    Returns:
        The same model.
    """
    if isinstance(model, InLayout):
        return model
    if not any(isinstance(layer, SparseMaskedConv2d) for _, layer in sparse_layers(model)):
        raise ValueError("model has no sparse convolution; call sparsify first")
    try:
        graphs = _Graphs(model)
    except Exception as error:  # a tracer meets whatever the forward does
        warnings.warn(
            f"{type(model).__name__} cannot be traced, so its layers convert one by one: {error}", stacklevel=2
        )
        return model
    plain = type(model)
    model.__dict__["_graphs"] = graphs
    model.__class__ = type(plain.__name__, (InLayout, plain), {"_plain_class": plain, "__module__": plain.__module__})
    return model


def _compile(graph: torch.fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<sparsebilevel.layout>", "exec"), namespace)
    return namespace["forward"]
