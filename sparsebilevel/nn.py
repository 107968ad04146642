"""Layers with a mask, and the conversion of whole models: ``sparsify`` and ``densify``.

A sparse layer is the dense layer plus a mask. It keeps the class interface (``isinstance(layer, nn.Linear)`` holds),
the Parameters themselves (an optimizer made before still holds them) and the state-dict keys; it adds ``mask`` (bool,
True = kept) and, while scores are learned, ``mask_scores`` (float32). Converting swaps the class of the module in
place, so hooks, references and shared modules survive.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .kernels import PASSES, Backend, choose_backend, describe, gpu, make_grad_sink, masked_conv2d, masked_linear
from .kernels.apply_mask import forget_copies, give_back
from .kernels.batch_norm import batch_norm_for_uses
from .kernels.block_sparse import forget_tiles, look
from .kernels.dense import layer_weight
from .kernels.dispatch import Structure, library_is_best, waits_for_host
from .kernels.gpu_products import structure_of, window_of
from .kernels.gradient import runs_directly
from .kernels.measurements import Window
from .kernels.reference import effective_weight
from .masks import NM, Channel, Filter, Pattern, Unstructured, global_masks, parse_pattern, random_mask
from .schedules import first_that_fits, layer_counts, layer_patterns

Support = Literal["none", "active", "search", "all"]
_SUPPORTS = ("none", "active", "search", "all")

torch.fx.wrap("masked_linear")  # symbolic tracing keeps the ops whole
torch.fx.wrap("masked_conv2d")
torch.fx.wrap("_count_and_normalize")


class SparseMaskedModule(nn.Module):
    """What :class:`SparseMaskedLinear` and :class:`SparseMaskedConv2d` share: the mask and the gradient it needs.

    Code that reads ``weight`` past the forward does not see the mask: of torch's own modules ``nn.MultiheadAttention``,
    for whose projections these layers must not stand in, and in inference ``nn.TransformerEncoderLayer``, unless
    :func:`sparsify` or a method has seen the model.

    Attributes:
        weight: the stored weight theta. Where the mask is False the forward does not see it.
        mask: bool buffer of the weight's shape.
        mask_scores: float32 buffer of the weight's shape, or a Parameter if the user made it one, or None.
        pattern: which weights live and die together.
        num_kept: groups of the pattern that the target sparsity keeps.
    """

    _dense_class: type[nn.Module]
    _wants_shared_gradient = False  # set by share_gradient
    # Of layers made on the meta device: "dense", or the state of the generator that draws the mask there will be.
    _first_mask: str | Tensor | None = None
    _op: str
    weight: nn.Parameter
    mask: Tensor
    mask_scores: Tensor | None
    pattern: Pattern
    num_kept: int

    def _add_mask(self, mask: Tensor, pattern: Pattern, num_kept: int) -> None:
        self.pattern = pattern
        self.num_kept = num_kept
        self.register_buffer("mask", mask)
        self.register_buffer("mask_scores", None)
        self.measured_ratio: float | None = None  # of times, dense over sparse: see costs.measure_layers
        self.measured_passes: dict[str, float] = {}
        self.collect("none")
        _note_weight(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copies and unpickled layers
        super().__setstate__(state)
        _note_weight(self)
        if self._wants_shared_gradient:
            note_sharing(self, True)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:  # every assignment comes here
        super().register_parameter(name, param)
        if name == "weight":
            _note_weight(self)

    def reset_mask(self, generator: torch.Generator | None = None) -> None:
        """Draw a random mask with the layer's exact count; on the meta device there is nothing to draw."""
        if not self.mask.is_meta:
            self.set_mask(random_mask(self.weight.shape, self.num_kept, self.pattern, generator), check=False)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as the dense class does, and draw a new random mask."""
        super().reset_parameters()  # type: ignore[misc]
        if "mask" in self._buffers:
            self._draw_first_mask()

    @torch.no_grad()
    def set_mask(self, mask: Tensor, *, check: bool = True) -> None:
        """Copy ``mask`` (bool, of the weight's shape) into the buffer, in place: compiled graphs stay valid.

        Nothing else changes: not the weight or the optimizer's state, no layer that shares the weight, no other rank.
        A method's :meth:`~sparsebilevel.Sparsifier.set_masks` changes them together.

        Args:
            mask: True = kept.
            check: whether it must fit the pattern. To look waits for the device: methods, which make their masks by the
                pattern, leave it out.
        """
        if mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {mask.dtype}; expected torch.bool (True = kept)")
        if mask.shape != self.weight.shape:
            raise ValueError(f"mask has shape {list(mask.shape)}; expected {list(self.weight.shape)}, the weight's")
        if check and not mask.is_meta:
            self.pattern.check(mask)
        self.mask.copy_(mask)

    def set_mask_scores(self, scores: Tensor | None) -> None:
        """Install scores (or remove them); kept in float32 whatever the weight's dtype is."""
        if scores is not None and scores.shape != self.weight.shape:
            raise ValueError(
                f"mask_scores has shape {list(scores.shape)}; expected {list(self.weight.shape)}, the weight's"
            )
        if scores is not None and not isinstance(scores, nn.Parameter):
            scores = scores.detach().to(device=self.weight.device, dtype=torch.float32)
        del self.mask_scores
        if isinstance(scores, nn.Parameter):
            self.mask_scores = scores
        else:
            self.register_buffer("mask_scores", scores)

    # -- the effective gradient G -------------------------------------------------------------------------------------

    def collect(self, support: Support, positions: Tensor | None = None) -> None:
        """Ask backward for ``G = dloss/d(mask * weight)`` on a support, and drop what was collected so far.

        A method asks in its own name, and again after each of its steps: beside one, leave this to it.

        Args:
            support: ``none``; ``all`` (dense); ``active`` (where the mask is True now); ``search`` (at ``positions``).
            positions: int64 ``[capacity]`` flat positions, row-major, for ``search``; negative entries are padding.
                They are copied. A buffer of the same length is reused, so that a compiled model is not compiled again
                at a change of topology.
        """
        if support not in _SUPPORTS:
            raise ValueError(f"support={support!r} is not known; allowed: {', '.join(_SUPPORTS)}")
        if support != "none" and self.shares_gradient:
            raise ValueError(f"support={support!r}: the layer shares its gradient (share_gradient); allowed: none")
        if (positions is not None) != (support == "search"):
            raise ValueError(f"positions must be given for support='search' and for no other, got support={support!r}")
        if positions is not None:
            _check_positions(positions, self.weight.numel())
        if support == "active":
            positions = self.mask.reshape(-1).nonzero().squeeze(1)
        old = self.__dict__.get("_positions")
        if positions is not None and old is not None and old.shape == positions.shape:
            positions = old.copy_(positions)
        elif positions is not None:
            positions = positions.to(self.weight.device, copy=True)
        self.score_support = support
        self._positions = positions
        sink = self.__dict__.get("_grad_sink")
        shape = None if support == "none" else (positions if positions is not None else self.weight).shape
        if sink is None or shape != sink.shape:
            sink = None if shape is None else make_grad_sink(self.weight, positions)
        self._grad_sink = sink
        self.zero_effective_grad()

    @property
    def effective_grad(self) -> Tensor | None:
        """``G`` summed since last zeroed: dense, or ``[capacity]`` at ``support_positions``. None before backward."""
        return None if self._grad_sink is None else self._grad_sink.grad

    @property
    def support_positions(self) -> Tensor | None:
        """Flat positions ``[capacity]`` of ``effective_grad``; None where it is dense."""
        return self._positions

    def zero_effective_grad(self) -> None:
        """Forget the collected ``G``."""
        if self._grad_sink is not None:
            self._grad_sink.grad = None

    @property
    def shares_gradient(self) -> bool:
        """Whether ``weight.grad`` is ``G``, see :func:`sparsebilevel.optim.share_gradient`."""
        wanted = self._wants_shared_gradient and self.weight.requires_grad  # a frozen one has no gradient to share
        return wanted and isinstance(self.mask_scores, nn.Parameter)

    # -- what a reader sees -------------------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the mask as it is now; on the meta device as its pattern counts them."""
        if self.mask.is_meta:
            groups = self.pattern.num_groups(self.mask.shape)
            return 1.0 - self.num_kept / groups if groups else 0.0
        return 1.0 - self.mask.sum().item() / self.mask.numel() if self.mask.numel() else 0.0

    @property
    def backends(self) -> dict[str, Backend]:
        """Kernel that each pass takes for a batch of 16 or more images, and why; on the meta device as on the CPU."""
        learning = 0 if self._positions is None else self._positions.numel()
        dense_grad = self.score_support == "all" or isinstance(self.mask_scores, nn.Parameter)
        return {
            "forward": self._choose("forward"),
            "input_grad": self._choose("input_grad"),
            "weight_grad": self._choose("weight_grad", learning, dense_grad, self._positions),
        }

    @property
    def backend(self) -> Backend:
        """The choice for all passes together, as where maps stay in the layout of the sparse kernels."""
        return self._choose(PASSES)

    def _choose(
        self,
        passes: str | Sequence[str],
        learning: int = 0,
        dense_grad: bool = False,
        positions: Tensor | None = None,
    ) -> Backend:
        weight = self.weight
        if weight.is_meta:
            non_zeros = round(weight.numel() * self.num_kept / self.pattern.num_groups(weight.shape))
            device = torch.device("cpu")
        else:
            non_zeros, device = int(self.mask.sum()), weight.device
        structure = window = None
        if gpu.available(device) and getattr(self, "groups", 1) == 1:
            window = self._window()
            looks = self._drops_in_groups or not library_is_best(device)
            tiles = window is None or weight.is_contiguous(memory_format=torch.channels_last)
            structure = structure_of(self.mask, tiles, positions) if looks else Structure()
        chosen = choose_backend(
            *(self._op, tuple(weight.shape), weight.dtype, device, max(non_zeros, learning)),
            structure=structure,
            window=window,
            stride=math.prod(getattr(self, "stride", (1,))),
            groups=getattr(self, "groups", 1),
            passes=passes,
            dense_grad=dense_grad,
        )
        if chosen.name == "fused" and not self._drops_in_groups and library_is_best(device):
            return Backend("dense", f"PyTorch's own layer on m*theta; in a CUDA graph {chosen.reason}", 1.0)
        if chosen.name in ("block", "slice") and library_is_best(device):  # not forced
            return chosen._replace(reason=f"{chosen.reason}; PyTorch's own layer in eager steps of little work")
        return chosen

    def _window(self) -> Window | None:
        """What the choice on a GPU knows of a convolution; None if it is a product of matrices."""
        return None

    def effective_weight(self) -> Tensor:
        """``mask * weight``, differentiable in weight."""
        return effective_weight(self.weight, self.mask)

    def extra_repr(self) -> str:
        backends = self.backends
        reasons = "; ".join(dict.fromkeys(backend.reason for backend in backends.values()))
        kernels = f"backend={describe(backends)} ({reasons})"
        return f"{super().extra_repr()}, sparsity={self.sparsity:.4f}, pattern={self.pattern}, {kernels}"

    # -- conversion ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(cls, dense: nn.Module, sparsity: float = 0.0, pattern: Pattern | str = "unstructured") -> Any:
        """A sparse layer that shares the Parameters of ``dense``, with a random mask of the exact count."""
        if type(dense) is not cls._dense_class:
            raise TypeError(f"dense is a {type(dense).__name__}; expected exactly a {cls._dense_class.__name__}")
        layer = _shallow_copy(dense)
        layer.__class__ = cls
        return _attach_random_mask(layer, sparsity, parse_pattern(pattern))

    def to_dense(self) -> nn.Module:
        """A dense layer of the original class with a new weight ``mask * weight``; other Parameters are shared."""
        _refuse_computed("", self)
        return _convert_to_dense(_shallow_copy(self))

    # -- what nn.Module must not do to masks --------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scores, was_meta = self._buffers.get("mask_scores"), self.mask.is_meta
        self._let_go()
        super()._apply(fn, recurse)
        if was_meta and not self.mask.is_meta:  # to_empty: what is there now is whatever the memory held
            self._draw_first_mask()
        cast = self._buffers.get("mask_scores")
        if scores is not None and cast is not None and cast.dtype != scores.dtype:
            # .half() and friends: a sum of many small steps must not lose its low bits.
            self.mask_scores = torch.empty_like(cast, dtype=scores.dtype).copy_(scores)
        self._refit_collection()
        give_back(self.weight, self.mask)
        _note_weight(self)
        return self

    def _draw_first_mask(self) -> None:
        """The mask that ``sparsify`` would have drawn on a device with memory."""
        if self._first_mask == "dense":
            self.set_mask(torch.ones_like(self.mask), check=False)
        elif isinstance(self._first_mask, Tensor):
            self.reset_mask(torch.Generator().set_state(self._first_mask))
        else:
            self.reset_mask()

    def _let_go(self) -> None:
        """Torch swaps tensors, where it is told to, only if nobody holds a weak reference to them."""
        if torch.__future__.get_swap_module_params_on_conversion():
            _LAYERS.pop(self.weight, None)
            forget_copies(self.weight)
            forget_tiles(self.mask)

    def _refit_collection(self) -> None:
        """Follow the weight to another device or dtype, with what has been collected."""
        if self._positions is not None:
            self._positions = self._positions.to(self.weight.device)
        if self._grad_sink is not None:
            grad = self._grad_sink.grad
            self._grad_sink = make_grad_sink(self.weight, self._positions)
            self._grad_sink.grad = None if grad is None else grad.to(self._grad_sink)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A dense checkpoint has no masks: the ones at hand stay. Scores come and go with the method that learns them.
        state_dict = dict(state_dict)
        mask = state_dict.get(prefix + "mask")
        if mask is not None and mask.shape == self.mask.shape and not mask.is_meta:
            try:
                if mask.dtype != torch.bool and ((mask != 0) & (mask != 1)).any():
                    raise ValueError(f"mask has dtype {mask.dtype} and values other than 0 and 1; expected torch.bool")
                self.pattern.check(mask.bool())
            except ValueError as error:
                error_msgs: list[str] = args[-1]  # of load_state_dict, which raises them all at the end
                error_msgs.append(f"layer {prefix.rstrip('.')!r}: {error}")
                del state_dict[prefix + "mask"]
            else:  # assign=True would take another dtype over
                state_dict[prefix + "mask"] = mask.bool()
        if not self.mask.is_meta and prefix + "mask" not in state_dict:
            state_dict[prefix + "mask"] = self.mask
            if prefix + "weight" in state_dict and not bool(self.mask.all()):
                warnings.warn(
                    "the state has weights of sparse layers without masks; those of the layers stay, and hide some of "
                    "them. Load a dense checkpoint before sparsify to choose masks by it (init='magnitude'), "
                    "and a sparse one into layers made sparse as its own were",
                    stacklevel=2,
                )
        if prefix + "mask_scores" in state_dict and self.mask_scores is None:
            self.set_mask_scores(torch.zeros_like(self.weight, dtype=torch.float32))
        elif prefix + "mask_scores" not in state_dict and self.mask_scores is not None:
            state_dict[prefix + "mask_scores"] = self.mask_scores
        self._let_go()
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing: list[str] = args[2]
        if self.mask.is_meta and prefix + "mask" in missing:  # no checkpoint of a dense model has one
            missing.remove(prefix + "mask")
        if self.mask.is_meta and not self.weight.is_meta:  # assign=True has brought the weight, and nobody a mask
            self.mask = torch.empty_like(self.mask, device=self.weight.device)
            self._draw_first_mask()
        scores = self._buffers.get("mask_scores")
        if scores is not None and not scores.is_meta and scores.dtype != torch.float32:
            self.mask_scores = scores.float()
        _note_weight(self)
        self._refit_collection()  # assign=True may have put a weight of another device or dtype in place

    @property
    def _drops_in_groups(self) -> bool:
        """Whether the pattern drops tiles, outputs or inputs as a whole, and so may be worth a kernel on a GPU."""
        return not isinstance(self.pattern, (Unstructured, NM))

    def _library_weight(self, input: Tensor) -> Tensor | None:
        """The effective weight where the product is PyTorch's own, else None.

        What an unstructured mask drops as a whole is not looked for: that would wait for the device at every change.
        """
        if self._drops_in_groups and not self._is_brief(input):
            return None
        return layer_weight(input, self.weight, self.mask, **self._sink_arguments())

    def _is_brief(self, input: Tensor) -> bool:
        """Whether a step takes so little work on a GPU that kernels of ours would come too late for it."""
        device = self.weight.device
        if torch.compiler.is_compiling() or not gpu.available(device):
            return False
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else input.dtype
        if not waits_for_host(self._rows(input), tuple(self.weight.shape), dtype, device):
            return False
        if not runs_directly(input, self.weight, self.mask):
            return False
        if gpu.is_capturing(device) or not library_is_best(device):
            return False
        if getattr(self, "groups", 1) == 1 and dtype != torch.float64:
            look(self.mask, self._positions)  # for a CUDA graph that may be captured after this, and must not wait
        return True

    def _rows(self, input: Tensor) -> int:
        """Rows of the product, about: tokens, or pixels of the output."""
        return input.numel() // max(self.weight.shape[1], 1)

    def _sink_arguments(self) -> dict[str, Any]:
        scores = self._parameters.get("mask_scores")  # as a buffer they get no gradient
        if scores is not None and self._wants_shared_gradient and self.weight.requires_grad:
            return {"mask_scores": None, "grad_sink": self.weight, "positions": None}
        return {"mask_scores": scores, "grad_sink": self._grad_sink, "positions": self._positions}


class SparseMaskedLinear(SparseMaskedModule, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` with a mask: ``y = x (mask * weight)^T + bias``.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        sparsity: fraction of groups of ``pattern`` that the random initial mask drops, in [0, 1).
        pattern: a :class:`~sparsebilevel.masks.Pattern` or its spelling.
    """

    _dense_class = nn.Linear
    _op = "masked_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        sparsity: float = 0.0,
        pattern: Pattern | str = "unstructured",
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        _attach_random_mask(self, sparsity, parse_pattern(pattern))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if (weight := self._library_weight(input)) is not None:
            return F.linear(input, weight, self.bias)
        return masked_linear(input, self.weight, self.mask, self.bias, **self._sink_arguments())


class SparseMaskedConv2d(SparseMaskedModule, nn.Conv2d):  # type: ignore[misc]
    """``nn.Conv2d`` with a mask.

    Args:
        in_channels ... dtype: as ``nn.Conv2d``, in the same order.
        sparsity: fraction of groups of ``pattern`` that the random initial mask drops, in [0, 1).
        pattern: a :class:`~sparsebilevel.masks.Pattern` or its spelling.
    """

    _dense_class = nn.Conv2d
    _op = "masked_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        sparsity: float = 0.0,
        pattern: Pattern | str = "unstructured",
    ) -> None:
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        nn.Conv2d.__init__(self, *geometry, device=device, dtype=dtype)
        _attach_random_mask(self, sparsity, parse_pattern(pattern))

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` or ``[C, H, W]``; any memory format."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        geometry = (self.stride, padding, self.dilation, self.groups)
        if (weight := self._library_weight(input)) is not None:
            return F.conv2d(input, weight, self.bias, *geometry)
        return masked_conv2d(input, self.weight, self.mask, self.bias, *geometry, **self._sink_arguments())

    def _rows(self, input: Tensor) -> int:
        return super()._rows(input) // (self.groups * math.prod(self.stride))

    def _window(self) -> Window | None:
        padding = (0, 0) if isinstance(self.padding, str) else self.padding  # "same" pads no 1x1
        return window_of(self.weight, (self.stride, padding, self.dilation, self.groups))


class FusedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, then ``+ residual``, then ReLU: one pass over memory where PyTorch takes three.

    On channels_last maps on the CPU, float32 or bfloat16 with float32 parameters; elsewhere it runs as PyTorch's own
    modules would. State-dict keys and settings are those of ``nn.BatchNorm2d``, and so is what others know of it:
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` would leave the residual and the ReLU out.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.
        relu: whether a ReLU follows.
    """

    relu: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        relu: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.relu = relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[B, C, H, W]``; residual: of that shape, or one that broadcasts to it.

        Raises:
            ValueError: another number of dimensions; in training one value per channel.
            RuntimeError: another number of channels; a residual that does not fit.
        """
        return normalize(self, input, residual, self.relu)[0]

    def extra_repr(self) -> str:
        """The settings."""
        return super().extra_repr() + (", relu=True" if self.relu else "")


def normalize(
    module: nn.BatchNorm2d, input: Tensor, residual: Tensor | None, relu: bool, uses: int = 1
) -> tuple[Tensor, ...]:
    """``module(input) + residual``, with ``relu`` no less than zero, in one pass; running statistics move.

    It comes in as many tensors as it has ``uses``, none of which writes to it.
    """
    tracked = not module.training or module.track_running_stats
    return _count_and_normalize(
        uses,
        input,
        module.running_mean if tracked else None,
        module.running_var if tracked else None,
        module.weight,
        module.bias,
        module.num_batches_tracked if module.training and module.track_running_stats else None,
        module.training or (module.running_mean is None and module.running_var is None),
        module.momentum,
        module.eps,
        residual,
        relu,
    )


def _count_and_normalize(
    uses: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batches: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, ...]:
    if input.dim() != 4:
        raise ValueError(f"input has shape {list(input.shape)}; expected [B, C, H, W]")
    if batches is not None:
        batches.add_(1)
    if momentum is None:  # the mean over all batches
        momentum = 0.0 if batches is None else 1.0 / float(batches)
    return batch_norm_for_uses(
        *(uses, input, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu)
    )


# Sparse layers by their weight, for those who hold weights and no model, as optimizers do. Nothing is kept alive.
_LAYERS: MutableMapping[Tensor, weakref.WeakSet[SparseMaskedModule]] = WeakTensorKeyDictionary()


def _note_weight(layer: SparseMaskedModule) -> None:
    weight = layer._parameters.get("weight")
    if weight is not None:
        _LAYERS.setdefault(weight, weakref.WeakSet()).add(layer)


def mask_of(weight: Tensor) -> Tensor | None:
    """The mask of the sparse layer whose weight this is; None without one, or if layers share it and have several."""
    masks = [
        layer.mask
        for layer in _LAYERS.get(weight, ())
        if isinstance(layer, SparseMaskedModule) and layer._parameters.get("weight") is weight  # no more after densify
    ]
    return masks[0] if masks and all(mask is masks[0] for mask in masks) else None


# Layers whose weight.grad is G. Nothing is kept alive.
_SHARING: weakref.WeakSet[SparseMaskedModule] = weakref.WeakSet()


def note_sharing(layer: SparseMaskedModule, enabled: bool) -> None:
    """Whether backward is to leave ``G`` in the weight's gradient, see :func:`sparsebilevel.optim.share_gradient`."""
    layer._wants_shared_gradient = enabled
    if enabled:
        _SHARING.add(layer)
        _watch_optimizers()
    else:
        _SHARING.discard(layer)


def is_gradient_shared() -> bool:
    """Whether any layer does."""
    return len(_SHARING) > 0


def layers_sharing_gradient() -> list[SparseMaskedModule]:
    """Those that there are, of whatever models."""
    # A layer that has been made dense is of another class.
    return [layer for layer in _SHARING if isinstance(layer, SparseMaskedModule) and layer.shares_gradient]


@functools.cache
def _watch_optimizers() -> None:
    """From now on, refuse steps that would take ``G`` for the gradient of a weight."""

    def refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not is_gradient_shared() or getattr(optimizer, "splits_gradients", False):
            return
        weights = {id(layer.weight) for layer in layers_sharing_gradient()}
        if any(id(p) in weights for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}, which does not know that a "
                "weight shares its gradient with its scores (share_gradient); expected one of sparsebilevel.optim"
            )

    register_optimizer_step_pre_hook(refuse)


def gradient_mask_of(weight: Tensor) -> Tensor | None:
    """The mask outside of which the gradient of the weight is zero, None where there is none."""
    sharing = any(layer.weight is weight for layer in layers_sharing_gradient())
    return None if sharing else mask_of(weight)


_SPARSE_CLASSES: dict[type[nn.Module], type[SparseMaskedModule]] = {
    nn.Linear: SparseMaskedLinear,
    nn.Conv2d: SparseMaskedConv2d,
}


def _check_positions(positions: Tensor, numel: int) -> None:
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"positions is {positions.dtype} of shape {list(positions.shape)}; expected int64 [capacity]")
    if positions.numel() and int(positions.max()) >= numel:
        raise ValueError(f"positions has {int(positions.max())}; expected less than {numel}, the weight's size")


def _attach_random_mask(layer: Any, sparsity: float, pattern: Pattern) -> Any:
    if isinstance(pattern, NM) and sparsity not in (0, float(pattern.sparsity)):  # 0 by default
        warnings.warn(f"{pattern} fixes the sparsity at {float(pattern.sparsity):g}, not {sparsity}", stacklevel=3)
    kept = layer_counts({"weight": layer.weight.shape}, sparsity, "uniform", pattern)["weight"]
    layer._add_mask(torch.ones_like(layer.weight, dtype=torch.bool), pattern, kept)
    layer.reset_mask()
    return layer


def _refuse_computed(name: str, layer: SparseMaskedModule) -> None:
    """What computes a weight has put itself between the layer and its Parameters, and would stay there."""
    if not layer._parameters.keys() >= {"weight", "bias"}:
        raise ValueError(
            f"layer {name!r} cannot be made dense: its weight or bias is computed (parametrize, weight_norm, "
            "spectral_norm, prune); store the values first, as torch.nn.utils.parametrize.remove_parametrizations does"
        )


@torch.no_grad()
def _convert_to_dense(layer: Any) -> nn.Module:
    weight = nn.Parameter(layer.effective_weight(), requires_grad=layer.weight.requires_grad)
    for name in ("mask", "mask_scores"):
        layer._buffers.pop(name, None)
        layer._parameters.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    for name in (
        "pattern",
        "num_kept",
        "measured_ratio",
        "measured_passes",
        "_first_mask",
        "score_support",
        "_positions",
        "_grad_sink",
        "_wants_shared_gradient",
    ):
        layer.__dict__.pop(name, None)
    _SHARING.discard(layer)
    layer.__class__ = layer._dense_class
    layer.weight = weight
    return layer


def _shallow_copy(module: Any) -> Any:
    """A module of the same class with dictionaries of its own, holding the same Parameters and buffers."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = {k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()}
    return clone


# -- whole models -----------------------------------------------------------------------------------------------------

Selector = str | type | nn.Module


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """``(name, layer)`` of every sparse layer, in model order; a module that occurs twice is given once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, SparseMaskedModule):
            yield name, module


def _select(model: nn.Module, argument: str, selectors: Selector | Collection[Selector]) -> set[int]:
    """Ids of the modules that ``selectors`` pick, and of all modules inside them."""
    chosen: set[int] = set()
    if not isinstance(selectors, (Selector, Collection)):
        raise ValueError(f"{argument}={selectors!r} is not allowed; expected names, glob patterns, types or modules")
    for selector in [selectors] if isinstance(selectors, Selector) else selectors:
        optional = isinstance(selector, type)  # a rule may find nothing, a name must exist
        if isinstance(selector, str):
            named = model.named_modules(remove_duplicate=False)
            found = [module for name, module in named if fnmatch.fnmatchcase(name, selector)]
            optional = any(c in selector for c in "*?[")
        elif isinstance(selector, type):
            found = [module for module in model.modules() if isinstance(module, selector)]
        else:
            found = [module for module in model.modules() if module is selector]
        if not found and not optional:
            names = [name for name, _ in model.named_modules() if name]
            raise ValueError(f"{argument} has {selector!r}, which no module matches; names are {names[:20]}")
        chosen |= {id(module) for root in found for module in root.modules()}
    return chosen


def _reasons_to_stay_dense(
    model: nn.Module, layers: Mapping[str, nn.Module], included: set[int] | None, excluded: set[int]
) -> dict[str, str]:
    """Layers that one would expect to become sparse and do not, and why."""
    chosen = {id(m) for m in layers.values()}
    foreign = {id(p) for m in model.modules() if id(m) not in chosen for p in m._parameters.values() if p is not None}
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_SPARSE_CLASSES)) or id(module) in excluded:
            continue
        if included is not None and id(module) not in included:
            continue
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            reasons[name] = "its size is not known yet; run a batch through the model first"
        elif nn.utils.parametrize.is_parametrized(module, "weight"):  # type: ignore[arg-type]
            reasons[name] = "its weight is computed (torch.nn.utils.parametrize)"
    for name, layer in layers.items():
        if layer._parameters.get("weight") is None:
            reasons[name] = "its weight is computed (weight_norm, spectral_norm, prune)"
        elif id(layer.weight) in foreign:
            reasons[name] = "another module shares its weight"
    return reasons


def _first_three(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _warn_of_single_groups(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float | Mapping[str, float],
    patterns: Mapping[str, Pattern],
    dense_layers: Collection[str],
) -> None:
    """A depthwise convolution has one channel a filter, which the pattern "channel" cannot take from it."""
    asked = dict.fromkeys(shapes, sparsity)
    if isinstance(sparsity, Mapping):
        asked = first_that_fits("sparsity", sparsity, shapes, dense_layers, default="0.9")
    to_prune = [name for name in asked if asked[name] and name not in dense_layers]
    single = [name for name in to_prune if patterns[name].num_groups(shapes[name]) == 1 < math.prod(shapes[name])]
    if single:
        warnings.warn(
            f"{_first_three(single)} {'stays' if len(single) == 1 else 'stay'} dense: to the pattern the whole weight "
            "is one group (another pattern, or exclude=, says what is meant)",
            stacklevel=3,
        )


def _warn_of_ends(
    model: nn.Module, weights: Mapping[str, Tensor], counts: Mapping[str, int], patterns: Mapping[str, Pattern]
) -> None:
    """What a network gives out is classes, and what it takes in colours: channels that it can hardly do without.

    ``patterns`` has not those of layers whose pattern was asked for by their names.
    """
    ends = [
        m.weight
        for m in model.modules()
        if isinstance(m, tuple(_SPARSE_CLASSES)) and m._parameters.get("weight") is not None
    ]
    for kind, at, axis, what in ((Filter, -1, 0, "outputs"), (Channel, 0, 1, "inputs")):
        name = list(weights)[at]
        size = weights[name].shape[axis]
        if isinstance(patterns.get(name), kind) and counts[name] < size and len(ends) > 1 and weights[name] is ends[at]:
            warnings.warn(
                f"pattern {patterns[name]} takes {size - counts[name]} of the {size} {what} of {name!r}, the "
                f"{'last' if at else 'first'} layer; leave it out (exclude=) if the network needs them",
                stacklevel=3,
            )


def _warn_of_attention(model: nn.Module, included: set[int] | None, excluded: set[int]) -> None:
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        and (included is None or id(module) in included)
        and id(module) not in excluded
    ]
    if names:
        warnings.warn(
            f"the projections of {_first_three(names)} stay dense: nn.MultiheadAttention reads their weights past any "
            "layer's forward (exclude=nn.MultiheadAttention says that this is meant)",
            stacklevel=3,
        )


def sparsify(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.9,
    distribution: str = "uniform",
    pattern: Pattern | str | Mapping[str, Pattern | str] = "unstructured",
    *,
    include: Selector | Collection[Selector] | None = None,
    exclude: Selector | Collection[Selector] = (),
    dense_first: bool = False,
    init: Literal["random", "magnitude", "dense"] = "random",
    rescale: bool = False,
    seed: int | None = None,
) -> nn.Module:
    """Give every ``nn.Linear`` and ``nn.Conv2d`` of ``model`` a mask, in place.

    Weights are not changed, unless ``rescale`` asks for it: what the mask hides is still stored, until a method says
    otherwise. Subclasses of the two layer types are left alone (their forward is their own), and so are, with a
    warning, the projections of ``nn.MultiheadAttention``, a layer whose weight another module shares or weight_norm and
    the like compute, and lazy layers that have no weight yet.

    Args:
        model: any module; Parameters, hooks and module identities are kept. A bare ``nn.Linear`` works too, but not one
            inside of an ``nn.TransformerEncoderLayer``, which in inference reads its weight past the layer's forward:
            give the encoder layer, and the ``nn.TransformerEncoder`` where it is in one.
        sparsity: target fraction of zeros, in [0, 1), or values by layer name or glob pattern, of which the first that
            fits holds: ``{"fc": 0, "layer1.*": 0.8, "*": 0.9}``.
        distribution: ``uniform``, ``er``, ``erk`` or ``global``, see :func:`~sparsebilevel.schedules.layer_counts`.
        pattern: which weights live and die together, see :mod:`sparsebilevel.masks`; or patterns by layer, in the form
            of ``sparsity``: ``{"head.*": "nm:2:4", "*": "unstructured"}``. ``nm`` fixes its layers' sparsity, and they
            stand outside the target.
        include: convert only these modules and what is inside them: names, glob patterns of names, types or modules.
        exclude: leave these as they are; same forms. Wins over ``include``.
        dense_first: convert the first layer but keep all its weights, as the literature does with ``uniform``.
        init: initial masks: ``random``, ``magnitude`` (largest weights; over the whole model if ``distribution`` is
            ``global``, layers of different patterns apart) or ``dense`` (all ones, for OMP, IMP, HYDRA, BiP and own
            methods; the others then drop weights at random, and say so).
        rescale: scale the weights of each output so that those kept have the norm that all had, and signals keep their
            size (sparsity-aware initialization; Evci et al., AAAI 2022). For training from scratch: without it a deep
            network that has no normalization layers learns slowly, or nothing. It changes nothing with ``filter``,
            which keeps all weights of an output or none.
        seed: of the random masks; None takes torch's global generator. Masks do not depend on the device. Under
            torch.distributed all ranks must draw the same ones, unless a method, which takes those of rank 0, follows.
            With ``rescale`` they must in any case where DDP has wrapped the model before, since weights differ then.
            On the meta device masks are drawn, the same, when ``to_empty`` gives them memory.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing to convert; sparsity outside [0, 1); unknown distribution, pattern, init or module names; a
            weight that the pattern does not fit; a model that is sparse already; ``rescale`` on the meta device.
    """
    parsed: Pattern | dict[str, Pattern]
    if isinstance(pattern, Mapping):
        parsed = {name: parse_pattern(p) for name, p in pattern.items()}
    else:
        parsed = parse_pattern(pattern)
    if init not in ("random", "magnitude", "dense"):
        raise ValueError(f"init={init!r} is not known; allowed: random, magnitude, dense")
    if isinstance(parsed, NM) and sparsity != float(parsed.sparsity):
        warnings.warn(f"{parsed} fixes the sparsity at {float(parsed.sparsity):g}, not {sparsity}", stacklevel=2)
    if any(True for _ in sparse_layers(model)):
        raise ValueError("model has sparse layers already; call densify first, or pass the new target to a method")
    included = None if include is None else _select(model, "include", include)
    if included is not None and not included:
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(f"include={include!r} matches no module; names are {names[:20]}")
    excluded = _select(model, "exclude", exclude)
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _SPARSE_CLASSES
        and (included is None or id(module) in included)
        and id(module) not in excluded
    }
    for name, reason in _reasons_to_stay_dense(model, layers, included, excluded).items():
        warnings.warn(f"{name!r} stays dense: {reason}", stacklevel=2)
        layers.pop(name, None)
    _warn_of_attention(model, included, excluded)
    if not layers:
        raise ValueError(f"model has no nn.Linear or nn.Conv2d to convert (include={include!r}, exclude={exclude!r})")

    owners: dict[int, str] = {}  # a weight used by several layers has one mask: that of the first of them
    for name, module in layers.items():
        owners.setdefault(id(module.weight), name)
    weights: dict[str, Tensor] = {name: layers[name].weight for name in owners.values()}
    meta = next((name for name, w in weights.items() if w.is_meta), None)
    if rescale and meta is not None:
        raise ValueError(f"rescale=True is not allowed: the weight of {meta!r} is on the meta device")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed={seed!r} is not allowed; expected a whole number or None")
    dense = next(iter(weights)) if dense_first else None
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    dense_layers = () if dense is None else (dense,)
    patterns = layer_patterns(parsed, shapes, dense_layers) | dict.fromkeys(dense_layers, Unstructured())
    counts = layer_counts(shapes, sparsity, distribution, patterns, dense_layers)
    _warn_of_single_groups(shapes, sparsity, patterns, dense_layers)
    named = parsed if isinstance(parsed, dict) else {}
    _warn_of_ends(model, weights, counts, {name: own for name, own in patterns.items() if name not in named})
    for name, own in patterns.items():
        asked = sparsity.get(name) if isinstance(sparsity, Mapping) else None
        if isinstance(own, NM) and asked not in (None, float(own.sparsity)):
            warnings.warn(f"{own} fixes the sparsity of {name!r} at {float(own.sparsity):g}, not {asked}", stacklevel=2)
    masks, first = _initial_masks(weights, counts, patterns, init, distribution == "global", dense, seed)
    if rescale:
        for name, weight in weights.items():
            _rescale(weight, masks[name])
    for module in layers.values():
        owner = owners[id(module.weight)]
        module.__class__ = _SPARSE_CLASSES[type(module)]
        module._add_mask(masks[owner].clone(), patterns[owner], counts[owner])
        if owner in first:
            module._first_mask = first[owner]
    model._ddp_params_and_buffers_to_ignore = _LeftToMethods(model)  # type: ignore[assignment]
    close_fast_paths(model)
    return model


@torch.no_grad()
def _initial_masks(
    weights: Mapping[str, Tensor],
    counts: dict[str, int],
    patterns: Mapping[str, Pattern],
    init: str,
    rank_globally: bool,
    dense: str | None,
    seed: int | None,
) -> tuple[dict[str, Tensor], dict[str, str | Tensor]]:
    """Masks by name, where and as their weights lie, and how to draw those on the meta device when they leave it.

    Ranking over the whole model settles ``counts`` anew.
    """
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    free = {name: w for name, w in weights.items() if name != dense}
    meta = [name for name, w in weights.items() if w.is_meta]
    first: dict[str, str | Tensor] = {name: "dense" for name in meta if init == "dense" or name == dense}
    drawn: dict[str, Tensor] = {}
    if init == "random":
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for n, w in free.items():
            if w.is_meta and generator is not None:
                first[n] = generator.get_state()
            if not w.is_meta or generator is not None:  # draws for other layers go on from here
                drawn[n] = random_mask(w.shape, counts[n], patterns[n], generator)
    elif init == "magnitude" and meta:
        raise ValueError(f"init='magnitude' is not allowed: the weight of {meta[0]!r} is on the meta device")
    elif init == "magnitude" and rank_globally:
        for pattern in dict.fromkeys(patterns[n] for n in free):
            group = {n: w.abs() for n, w in free.items() if patterns[n] == pattern}
            drawn |= global_masks(group, sum(counts[n] for n in group), pattern)
        counts.update({n: patterns[n].count(mask) for n, mask in drawn.items()})
    elif init == "magnitude":
        drawn = {n: patterns[n].mask(w.abs(), counts[n]) for n, w in free.items()}
    for name, mask in drawn.items():
        masks[name].copy_(mask)
    return masks, first


@torch.no_grad()
def _rescale(weight: Tensor, mask: Tensor) -> None:
    """Give the kept weights of each output the norm that all of them had; where none is kept, nothing changes."""
    before, after = weight.flatten(1).norm(dim=1), effective_weight(weight, mask).flatten(1).norm(dim=1)
    factors = torch.where(after > 0, before / after, 1.0)
    weight.mul_(factors.view(-1, *[1] * (weight.dim() - 1)))


class _LeftToMethods:
    """Names of tensors that DDP must not broadcast at every forward; it reads them when it wraps the model.

    Masks and scores change rarely and equally on every rank, and methods compare the masks' hashes when they do. Scores
    that the user made a Parameter are DDP's to reduce.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)  # which holds this one
        self._others = getattr(model, "_ddp_params_and_buffers_to_ignore", ())

    def __getstate__(self) -> tuple[nn.Module | None, Any]:
        return self._model(), self._others

    def __setstate__(self, state: tuple[nn.Module | None, Any]) -> None:
        model, self._others = state
        self._model = (lambda: None) if model is None else weakref.ref(model)

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        model = self._model()
        for name, layer in () if model is None else sparse_layers(model):
            for tensor in ("mask", "mask_scores"):
                if tensor not in layer._parameters:
                    path = f"{name}.{tensor}".lstrip(".")
                    yield from (path, f"_orig_mod.{path}")  # as torch.compile has it


# In inference these read ``linear1.weight`` past its forward, unless the attribute named here is false.
_FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


def close_fast_paths(model: nn.Module) -> None:
    """Let encoder layers run what is in them; again where layers were put there by hand."""
    for module in model.modules():
        for cls, switch in _FAST_PATHS.items():
            is_open = isinstance(module, cls) and "_open_fast_path" not in module.__dict__
            if is_open and any(True for _ in sparse_layers(module)):
                module.__dict__["_open_fast_path"] = getattr(module, switch)
                setattr(module, switch, False)


def _open_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for cls, switch in _FAST_PATHS.items():
            if isinstance(module, cls) and "_open_fast_path" in module.__dict__:
                setattr(module, switch, module.__dict__.pop("_open_fast_path"))


def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A dense model: the original classes and state-dict keys, zeros in place of what the masks hide.

    Args:
        model: a model with sparse layers (without any it is returned as it is, or copied).
        inplace: convert ``model`` itself. Its sparse weights become new Parameters, so that optimizers made before no
            longer hold them. By default a deep copy is converted and training can go on.

    Raises:
        ValueError: the weight or bias of a sparse layer is computed (parametrizations, pruning).
    """
    for name, layer in sparse_layers(model):
        _refuse_computed(name, layer)
    model = model if inplace else copy.deepcopy(model)
    layers = [layer for _, layer in sparse_layers(model)]
    done: list[tuple[Tensor, Tensor, Any]] = []
    for layer in layers:
        weight, mask = layer.weight, layer.mask
        _convert_to_dense(layer)
        for tied, of_tied, other in done:  # tied weights stay tied where their masks leave the same of them
            if tied is weight and (mask.is_meta or torch.equal(mask, of_tied)):
                layer.weight = other.weight
        done.append((weight, mask, layer))
    _open_fast_paths(model)
    _leave_layout(model)
    return model


def _leave_layout(model: nn.Module) -> None:
    """Give what :func:`~sparsebilevel.optimize_for_cpu` has rewritten its own forward back."""
    for module in model.modules():
        plain = getattr(type(module), "_plain_class", None)
        if plain is not None:
            module.__dict__.pop("_graphs", None)
            module.__class__ = plain
