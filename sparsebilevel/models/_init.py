"""Weight initialisation shared by the networks of this folder."""

from __future__ import annotations

import math

from torch import nn


def init_conv_(model: nn.Module) -> None:
    """Draw every convolution of `model` from N(0, 2 / fan_out), in place; biases become zero.

    This is He et al.'s initialisation (arXiv 1502.01852) in its backward form, as in the ResNet paper's code and in
    torchvision: with fan_out = out_channels / groups * kernel size, the variance of the *gradient* stays constant
    through ReLU layers, and batch normalisation keeps the forward pass in scale anyway. Dividing by `groups`, which
    `nn.init.kaiming_normal_` does not do, gives depth-wise kernels the same rule; otherwise they start several times
    smaller than their neighbours, and a global magnitude mask would remove them first.
    Linear and normalisation layers keep PyTorch's defaults.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
