"""What a network costs: parameters, FLOPs, bytes, and measured time against its dense twin.

Conventions, as they must stand beside every figure (Blalock et al. 2020, arXiv 2003.03033):

- FLOPs are of one forward pass of one sample, two a multiply-add, of convolutions and linear layers only.
- The compression ratio counts *all* parameters, biases and normalisation included; a fraction of zeros is never one.
- A sparse layer stores what its mask keeps, whatever the values are; in a dense convolution or linear layer, weights
  that are exactly zero count as removed (a densified network has the parameters and theoretical FLOPs of the sparse
  one; bits of masks count in the size of the latter alone); all else is stored.
- Products are known by torch's operators. Of batched ones (``bmm``, ``baddbmm``) those with a weight count; products of
  two activations do in ``mm`` and ``addmm`` alone, those of matrices and vectors and of ``nn.Bilinear`` nowhere.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from ._checks import check_number, check_shape, check_whole
from .kernels import describe, gpu, measurements
from .layout import optimize_for_cpu
from .methods.base import unwrap
from .nn import SparseMaskedConv2d, SparseMaskedModule, densify, sparse_layers

__all__ = ["Costs", "count_costs", "measure_layers", "measure_step", "tune_layers"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a network; see the module's documentation for the conventions.

    Attributes:
        params_total: all parameters (a tied one once; learned mask scores are not part of the network).
        params_nonzero: those that are stored.
        compression: ``params_total / params_nonzero``.
        flops_dense: FLOPs of the same network without masks.
        flops_theoretical: each layer's dense FLOPs times its density.
        flops_executed: what the kernels really execute in training, by torch's FLOP counter or the non-zeros.
        sparsity: fraction of zeros over the weights of the sparse layers; 0 without sparse layers.
        global_sparsity: fraction of zeros over all convolution and linear weights.
        size_bytes: 4 bytes a stored weight and one bit a weight of each masked layer, batch normalisation folded into
            one value a channel: the convention of Evci et al. 2020 (RigL), whose published sizes it reproduces.
        layers: one row a convolution or linear weight: ``name``, ``type``, ``shape``, ``total``, ``nonzero``,
            ``density``, ``sparse`` (has a mask), ``flops_dense``, ``flops_theoretical``, ``flops_executed``. A weight
            that several layers use has one row, and each use counts in its FLOPs.
    """

    params_total: int
    params_nonzero: int
    compression: float
    flops_dense: int
    flops_theoretical: int
    flops_executed: int
    sparsity: float
    global_sparsity: float
    size_bytes: int
    layers: list[dict[str, Any]]

    @property
    def speedup(self) -> float:
        """Theoretical speed-up, ``flops_dense / flops_theoretical``; 1 for a network without such layers."""
        return self.flops_dense / self.flops_theoretical if self.flops_theoretical else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain values that ``json`` can write."""
        return dataclasses.asdict(self) | {"speedup": self.speedup}


# -- counting ----------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


def _linear_flops(input_shape: list[int], weight_shape: list[int], _out_shape: list[int]) -> int:
    return 2 * math.prod(input_shape[:-1]) * math.prod(weight_shape)


def _lstm_flops(input_shape: list[int], weight_shape: list[int], out_shape: list[int]) -> int:
    """Of all steps: the input by its weight, and the state by its own, ``[4 H, H]``."""
    rows = math.prod(input_shape[:-1])
    return 2 * rows * (math.prod(weight_shape) + weight_shape[0] * out_shape[-1])


# Ops of convolutions and linear layers (batched ones too, where a factor is a weight: in attention both are
# activations), and what their dense twin costs where that differs from what the op itself says it executes.
_DENSE_TWINS: dict[Any, Callable[..., int] | None] = {
    torch.ops.aten.convolution: None,
    torch.ops.aten.mm: None,
    torch.ops.aten.addmm: None,
    torch.ops.aten.bmm: None,
    torch.ops.aten.baddbmm: None,
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,  # an LSTM on a CPU
    torch.ops.sparsebilevel.masked_conv2d: conv_flop_count,
    torch.ops.sparsebilevel.masked_linear: _linear_flops,
}

_WITH_BIAS = {torch.ops.aten.addmm, torch.ops.aten.baddbmm}  # before the factors
_BATCHED = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}


@torch.no_grad()
def count_costs(model: nn.Module, input_shape: Sequence[int], device: torch.device | str | None = None) -> Costs:
    """Count parameters, FLOPs and bytes of ``model``; nothing of it changes, no random number is drawn.

    Args:
        model: any module, with or without sparse layers, on any device (the meta device too; there a mask counts as
            its target). May be wrapped in DDP or compiled.
        input_shape: shape of *one* sample, without the batch dimension: ``(3, 224, 224)``.
        device: where the forward pass runs, on zeros. By default on the meta device, where it costs nothing, and if the
            model cannot run there (its control flow reads values), on the model's own.

    Raises:
        ValueError: ``input_shape`` is not what the model takes (the model's own error is the cause).
    """
    check_shape("input_shape", input_shape, "the shape of one sample such as (3, 224, 224)")
    model = unwrap(model)
    rows = _weight_rows(model)
    recorder = _forward_flops(model, input_shape, device)
    on_sparse_kernels = {name for name, layer in sparse_layers(model) if layer.backends["forward"].name == "sparse"}
    for name, row in rows.items():
        dense, executed = recorder.flops.pop(name, (0, 0))
        theoretical = round(dense * row["density"])
        if row["name"] in on_sparse_kernels:  # in training: the one sample counted here took the dense library
            executed = theoretical
        row.update(flops_dense=dense, flops_theoretical=theoretical, flops_executed=executed)
    other_dense = sum(dense for dense, _ in recorder.flops.values())  # slices of a weight, computed weights
    other_executed = sum(executed for _, executed in recorder.flops.values())

    params = {id(p): p.numel() for name, p in model.named_parameters() if not _is_scores(name)}
    total = sum(params.values())
    zeros = sum(row["total"] - row["nonzero"] for row in rows.values())
    weights = sum(row["total"] for row in rows.values())
    sparse = [row for row in rows.values() if row["sparse"]]
    sparse_weights = sum(row["total"] for row in sparse)
    mask_bits = sum(row["total"] for row in sparse if row["nonzero"] < row["total"])
    norms = {id(m): m for m in model.modules() if isinstance(m, _BATCH_NORMS)}.values()
    folded = sum(m.num_features - sum(p.numel() for p in m.parameters()) for m in norms)
    return Costs(
        params_total=total,
        params_nonzero=total - zeros,
        compression=total / max(total - zeros, 1),
        flops_dense=sum(row["flops_dense"] for row in rows.values()) + other_dense,
        flops_theoretical=sum(row["flops_theoretical"] for row in rows.values()) + other_dense,
        flops_executed=sum(row["flops_executed"] for row in rows.values()) + other_executed,
        sparsity=sum(row["total"] - row["nonzero"] for row in sparse) / sparse_weights if sparse else 0.0,
        global_sparsity=zeros / weights if weights else 0.0,
        size_bytes=4 * (total - zeros + folded) + math.ceil(mask_bits / 8),
        layers=list(rows.values()),
    )


def _is_scores(name: str) -> bool:
    return name.rpartition(".")[2] == "mask_scores"


def _weight_rows(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Rows of the layer table without FLOPs, by parameter name; a tied weight under the first of its names."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            first = owners.setdefault(id(module.weight), (name, module))
            if isinstance(module, SparseMaskedModule) and not isinstance(first[1], SparseMaskedModule):
                owners[id(module.weight)] = (first[0], module)
    rows = {}
    for parameter_name, weight in model.named_parameters():
        if id(weight) in owners:
            name, module = owners[id(weight)]
            total, nonzero = weight.numel(), _stored(module)
            rows[parameter_name] = {
                "name": name,
                "type": type(module).__name__,
                "shape": list(weight.shape),
                "total": total,
                "nonzero": nonzero,
                "density": nonzero / total if total else 1.0,
                "sparse": isinstance(module, SparseMaskedModule),
            }
    return rows


def _stored(module: nn.Module) -> int:
    """Weights of a layer that are stored."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, SparseMaskedModule):
        if not module.mask.is_meta:
            return int(module.mask.count_nonzero())
        return round(weight.numel() * module.num_kept / module.pattern.num_groups(weight.shape))
    return weight.numel() if weight.is_meta else int(weight.count_nonzero())


class _FlopRecorder(TorchDispatchMode):
    """Sums (dense, executed) FLOPs of every convolution and linear call, by the name of the weight it uses.

    Ops, not modules, are what is seen: functional uses, attention's projections and repeated use all count. A weight is
    known by its storage, which its transpose and its slices share.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {tensor.untyped_storage()._cdata: name for name, tensor in named.items()}
        self.flops: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = func._overloadpacket
        if op in _DENSE_TWINS:
            factors = args[1:3] if op in _WITH_BIAS else args[:2]
            stores = [t.untyped_storage()._cdata for t in factors]
            name = next((self.names[store] for store in reversed(stores) if store in self.names), "")
            if op in _BATCHED and not name:
                return out
            twin = _DENSE_TWINS[op] or flop_registry[op]
            shapes = [list(t.shape) for t in (args[0], args[1], out[0] if isinstance(out, tuple) else out)]
            executed = flop_registry[op](*args, **kwargs, out_val=out) if op in flop_registry else twin(*shapes)
            dense = executed if _DENSE_TWINS[op] is None else twin(*shapes)
            before = self.flops.get(name, (0, 0))
            self.flops[name] = (before[0] + int(dense), before[1] + int(executed))
        return out


def _forward_flops(model: nn.Module, shape: Sequence[int], device: torch.device | str | None) -> _FlopRecorder:
    """One forward pass of one sample in evaluation mode, recorded."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    home = next((t.device for t in state.values()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    devices = [torch.device("meta"), home] if device is None else [torch.device(device)]
    if device is None and home.type == "meta":
        devices.pop()
    for attempt in devices:
        moved = {name: t if t.device == attempt else t.to(attempt) for name, t in state.items()}
        recorder = _FlopRecorder(moved)
        try:
            with _evaluation(model, home), recorder:
                x = torch.zeros((1, *shape), dtype=dtype, device=attempt)
                torch.func.functional_call(model, moved, (x,), tie_weights=True)
            return recorder
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if attempt == devices[-1]:
                message = f"input_shape={tuple(shape)}: {type(model).__name__} does not run on one such sample: {error}"
                raise ValueError(message) from error
    raise AssertionError("unreachable")


@contextmanager
def _evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode; training flags and random states are afterwards as they were before."""
    training = {module: module.training for module in model.modules()}
    # The fused inference path of attention hides its projections in one op that no counter knows.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with _kept_random_state(device):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, flag in training.items():
            module.training = flag


def _kept_random_state(device: torch.device) -> Any:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure_step(
    model: nn.Module,
    batch_shape: Sequence[int],
    num_classes: int,
    repeats: int = 20,
    budget_s: float = 5.0,
    *,
    in_layout: bool = False,
) -> dict[str, float]:
    """Time of a training step (forward, cross-entropy, backward) against the densified model's, on copies.

    Sparse and dense steps alternate in one process, so that a slow phase of the machine meets both, and medians are
    compared. ``model`` and the random state stay as they are.

    Args:
        model: a classifier, ``batch_shape -> [B, num_classes]`` (of a tuple, the first entry).
        batch_shape: shape of the input *with* the batch dimension.
        num_classes: size of the output.
        repeats: rounds of steps after one of warm-up.
        budget_s: no new round is begun after so many seconds; one is always measured.
        in_layout: also time a copy that :func:`~sparsebilevel.optimize_for_cpu` has rewritten.

    Returns:
        ``sparse_ms`` and ``dense_ms`` (medians), ``ratio`` = dense / sparse (2.0: twice as fast as dense), ``repeats``;
        with ``in_layout`` also ``in_layout_ms`` and ``in_layout_ratio``.
    """
    batch_shape = tuple(batch_shape)
    if not batch_shape or min(batch_shape) < 1:
        raise ValueError(f"batch_shape={batch_shape}: must have a batch and only sizes of at least 1")
    check_whole("num_classes", num_classes, 1)
    model = unwrap(model)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.linspace(-1, 1, math.prod(batch_shape), device=weight.device, dtype=weight.dtype).view(batch_shape)
    target = torch.arange(batch_shape[0], device=weight.device) % num_classes

    def step_of(network: nn.Module) -> Callable[[], None]:
        network.train()
        layers = [layer for _, layer in sparse_layers(network)]

        def step() -> None:
            output = network(x)
            logits = output[0] if isinstance(output, tuple) else output
            F.cross_entropy(logits, target).backward()
            network.zero_grad()
            for layer in layers:
                layer.zero_effective_grad()

        return step

    networks = {"sparse": copy.deepcopy(model), "dense": densify(model)}
    if in_layout:
        networks["in_layout"] = optimize_for_cpu(copy.deepcopy(model))
    with _kept_random_state(weight.device), torch.enable_grad():
        steps = {name: step_of(network) for name, network in networks.items()}
        times, taken = _interleave(steps, repeats, budget_s, weight.device)
    found = _against_dense(times["sparse"], times["dense"]) | {"repeats": taken}
    if in_layout:
        found |= {"in_layout_ms": times["in_layout"], "in_layout_ratio": times["dense"] / times["in_layout"]}
    return found


def measure_layers(
    model: nn.Module, example_input: Tensor, repeats: int = 20, budget_s: float = 5.0
) -> list[dict[str, Any]]:
    """Time every sparse layer against its dense twin, and note it in ``layer.measured_ratio`` and ``measured_passes``.

    Each layer gets inputs of the shape, memory format and need for a gradient that it sees when the model trains on
    ``example_input``; nothing else of ``model`` changes. Its passes are timed one by one, and all of them together.

    Args:
        model: a model with sparse layers.
        example_input: a batch that the model takes.
        repeats, budget_s: as in :func:`measure_step`; the budget is for all layers together.

    Returns:
        One row a layer that the model reached: ``name``, ``shape``, ``input_shape``, ``sparsity``, ``backend`` (of the
        passes, in words), ``reason``, ``sparse_ms``, ``dense_ms``, ``ratio`` (dense / sparse), ``repeats``, ``passes``
        (name -> ``sparse_ms``, ``dense_ms``, ``ratio``, ``backend``; without the gradients that training does not ask
        for).
    """
    model = unwrap(model)
    layers = dict(sparse_layers(model))
    rows: list[dict[str, Any]] = []
    with _kept_random_state(example_input.device), torch.enable_grad():
        inputs = _layer_inputs(model, example_input)
        for name, layer_input in inputs.items():
            layer, sparse = layers[name], copy.deepcopy(layers[name])
            x = torch.randn_like(layer_input).requires_grad_(layer_input.requires_grad)
            runs = {
                f"{what} {kind}": run
                for kind, twin in (("sparse", sparse), ("dense", densify(sparse)))
                for what, run in _layer_runs(twin, x).items()
            }
            times, taken = _interleave(runs, repeats, budget_s / len(inputs), x.device)
            backends = layer.backends
            passes: dict[str, dict[str, Any]] = {
                what: _against_dense(times[f"{what} sparse"], times[f"{what} dense"]) | {"backend": backend.name}
                for what, backend in backends.items()
                if f"{what} dense" in times
            }
            whole = _against_dense(times["layer sparse"], times["layer dense"])
            layer.measured_ratio = whole["ratio"]
            layer.measured_passes = {what: figures["ratio"] for what, figures in passes.items()}
            facts = {"name": name, "shape": list(sparse.weight.shape), "input_shape": list(x.shape)}
            reason = "; ".join(dict.fromkeys(backend.reason for backend in backends.values()))
            facts |= {"sparsity": sparse.sparsity, "backend": describe(backends), "reason": reason}
            rows.append(facts | whole | {"repeats": taken, "passes": passes})
    return rows


def tune_layers(
    model: nn.Module, example_input: Tensor, dtype: torch.dtype | None = None, *, repeats: int = 20
) -> dict[str, dict[str, Any]]:
    """Measure, on a GPU, the kernels that the sparse layers of a model could take, and have layers choose by the times.

    Without them layers choose by a rule that was found on one GPU. Eager steps of little work are PyTorch's own,
    whatever was measured: that is time of the device alone. The times are kept for later processes on the same GPU
    with the same torch (``~/.cache/sparsebilevel/gpu.json``, or where ``SPARSEBILEVEL_MEASUREMENTS`` says), and hold
    for any layer of these shapes. Measured are linear layers and 1x1 convolutions, and where the pattern drops tiles
    or channels the other convolutions of one group; convolutions if weights and maps are channels_last.

    Args:
        model: with sparse layers, on the GPU.
        example_input: a batch that the model takes, as large as those it will be trained on.
        dtype: that the products are computed in; by default that of autocast, if it is enabled, or the input's.
        repeats: how often each kernel is timed.

    Returns:
        What was measured, with seconds by kernel: see :func:`.kernels.measurements.times`.

    Raises:
        ValueError: our kernels do not run on the device of ``example_input``.
    """
    device = example_input.device
    if not gpu.available(device):
        raise ValueError(
            f"example_input is on {device}, where no kernel has to be measured; expected a GPU with Triton, of compute "
            "capability 8.0 or more"
        )
    if dtype is None:
        is_cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_cast else example_input.dtype
    layers = dict(sparse_layers(unwrap(model)))
    with _kept_random_state(device), torch.enable_grad():
        inputs = _layer_inputs(unwrap(model), example_input)
        shapes: dict[Any, bool] = {}  # and whether a layer of it drops tiles
        for name, x in inputs.items():
            layer = layers[name]
            if (shape := _product_shape(layer, x)) is not None:
                shapes[shape] = shapes.get(shape, False) or layer._drops_in_groups
        found: dict[str, dict[str, Any]] = {}
        for tiles in (False, True):
            wanted = [shape for shape, drops in shapes.items() if drops == tiles]
            wanted = [s for s in wanted if tiles or not isinstance(s, measurements.Convolution)]
            found |= measurements.measure(wanted, dtype, device, repeats, tiles=tiles)
    return found


def _product_shape(layer: SparseMaskedModule, x: Tensor) -> tuple[int, int, int] | measurements.Convolution | None:
    """What a layer computes of an input, as it is measured; None if there is nothing to choose."""
    n, k = layer.weight.shape[:2]
    if not isinstance(layer, SparseMaskedConv2d):
        return x.numel() // max(k, 1), n, k
    last = torch.channels_last
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    is_ours = x.dim() == 4 and x.is_contiguous(memory_format=last) and layer.weight.is_contiguous(memory_format=last)
    if not is_ours or layer.groups != 1 or (left, top) != (right, bottom):
        return None
    if layer._window() is None:
        return x.numel() // max(k, 1), n, k
    height, width, padding = *x.shape[2:], (top, left)
    if layer.padding_mode != "zeros":  # the layer pads before it convolves
        height, width, padding = height + 2 * top, width + 2 * left, (0, 0)
    pairs: Any = (layer.kernel_size, layer.stride, padding, layer.dilation)
    return measurements.Convolution(x.shape[0], height, width, n, k, *map(tuple, pairs))


def _against_dense(sparse_ms: float, dense_ms: float) -> dict[str, float]:
    return {"sparse_ms": sparse_ms, "dense_ms": dense_ms, "ratio": dense_ms / sparse_ms}


def _layer_inputs(model: nn.Module, example_input: Tensor) -> dict[str, Tensor]:
    """An empty tensor like the first input of every sparse layer, by name, from one training pass of a copy."""
    network = copy.deepcopy(model).train()
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, torch.empty_like(args[0]).requires_grad_(args[0].requires_grad))

        return hook

    for name, layer in sparse_layers(network):
        layer.register_forward_pre_hook(note(name))
    network(example_input)
    return inputs


def _layer_runs(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], None]]:
    """The whole layer in training, and its passes one by one, of those that training asks for."""
    parameters = dict(layer.named_parameters())
    if isinstance(layer, SparseMaskedModule) and layer.shares_gradient:
        del parameters["mask_scores"]  # which backward leaves out
    leaves: dict[str, list[Tensor]] = {"input_grad": [x], "weight_grad": list(parameters.values())}
    if isinstance(layer, SparseMaskedModule) and layer._grad_sink is not None:
        leaves["weight_grad"].append(layer._grad_sink)
    leaves = {name: [leaf for leaf in of_pass if leaf.requires_grad] for name, of_pass in leaves.items()}
    every = [leaf for of_pass in leaves.values() for leaf in of_pass]
    with torch.no_grad():
        grad = torch.ones_like(layer(x))

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def whole() -> None:
        output = layer(x)
        if every:
            torch.autograd.grad(output, every, grad)

    def gradient(wanted: list[Tensor]) -> Callable[[], None]:
        # What a masked op computes is settled in its forward.
        for leaf in every:
            leaf.requires_grad_(any(leaf is other for other in wanted))
        output = layer(x)
        for leaf in every:
            leaf.requires_grad_()

        def run() -> None:
            torch.autograd.grad(output, wanted, grad, retain_graph=True)

        return run

    return {"layer": whole, "forward": forward} | {name: gradient(wanted) for name, wanted in leaves.items() if wanted}


def _interleave(
    runs: Mapping[str, Callable[[], None]], repeats: int, budget_s: float, device: torch.device
) -> tuple[dict[str, float], int]:
    """Medians in milliseconds of functions that take turns, with cold caches, and how often each ran."""
    check_whole("repeats", repeats, 1)
    check_number("budget_s", budget_s)

    def timed(function: Callable[[], None]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    deadline = time.perf_counter() + budget_s
    for function in runs.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name in list(runs)[:: 1 if i % 2 else -1]:  # they take turns in going first
            times[name].append(timed(runs[name]))
        if time.perf_counter() > deadline:
            break
    return {name: statistics.median(samples) for name, samples in times.items()}, len(times[name])
