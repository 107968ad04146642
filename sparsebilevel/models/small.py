"""Networks that train in seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ._init import init_conv_


def digits_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Four 3x3 convolutions with BN and ReLU, global average pooling and a linear layer; about 66 000 parameters.

    Made for the 8x8 images of the `digits` data set: [N, 1, 8, 8] -> [N, 10]. Any height and width will do.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1)):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    init_conv_(model)
    return model


def mlp(num_classes: int = 10, in_channels: int = 64, *, hidden: Sequence[int] = (256, 256)) -> nn.Sequential:
    """Linear and ReLU layers of widths `hidden` and a last linear layer.

    The input, [N, ...], is flattened; `in_channels` counts the features of a sample, so C*H*W for an image (64 for
    `digits`, 784 for MNIST).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    features = in_channels
    for width in hidden:
        layers += [nn.Linear(features, width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))
