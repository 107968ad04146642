"""Residual networks for small images: He et al. 2016 (arXiv 1512.03385), section 4.2 and variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ._init import init_conv_

Shortcut = Literal["A", "B"]


class PadShortcut(nn.Module):
    """Option A, without parameters: take every `stride`-th pixel, and pad the new channels with zeros on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus shortcut, then ReLU. [N, C_in, H, W] -> [N, C_out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """3x3 stem with stride 1, stages of basic blocks, global average pooling and one linear layer.

    Args:
        widths: channels of each stage; every stage but the first halves height and width.
        depths: blocks of each stage.
        shortcut: "A" (zero padding) or "B" (1x1 convolution and BN), used where a block changes the shape.
        num_classes: size of the output.
        in_channels: channels of the input.

    Input [N, in_channels, H, W], float; output [N, num_classes], logits.
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], shortcut: Shortcut, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        stages = []
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_conv_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet_cifar(
    depth: int, num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "A", width: int = 16
) -> ResNet:
    """The three-stage CIFAR network of `depth` = 6n + 2 layers with `width`, 2 `width` and 4 `width` channels."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth={depth}: must be 6n + 2 with n >= 1, such as 20, 32, 44, 56 or 110")
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut={shortcut!r}: must be 'A' or 'B'")
    return ResNet((width, 2 * width, 4 * width), (blocks,) * 3, shortcut, num_classes, in_channels)


def resnet18_cifar(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 with the CIFAR stem: 3x3 convolution with stride 1 and no max-pooling."""
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), "B", num_classes, in_channels)


def resnet34_cifar(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-34 with the CIFAR stem: 3x3 convolution with stride 1 and no max-pooling."""
    return ResNet((64, 128, 256, 512), (3, 4, 6, 3), "B", num_classes, in_channels)
