"""MobileNet-v2 for 32x32 images: Sandler et al. 2018 (arXiv 1801.04381), with the usual CIFAR strides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._init import init_conv_


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depth-wise convolution, 1x1 projection; a shortcut where the stride is 1.

    The shortcut is a 1x1 convolution with BN where the widths differ, as in the CIFAR ports.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y if self.shortcut is None else y + self.shortcut(x)


class MobileNetV2(nn.Module):
    """Seven stages of inverted residuals; `strides` gives the stride of each stage's first block.

    Input [N, in_channels, H, W], float; output [N, num_classes], logits. The activation is ReLU, as in the CIFAR
    ports, where the ImageNet network has ReLU6.
    """

    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))  # (t, c, n)

    def __init__(self, strides: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        blocks = []
        channels = 32
        for (expansion, width, depth), stride in zip(self.stages, strides, strict=True):
            for block in range(depth):
                blocks.append(InvertedResidual(channels, width, expansion, stride if block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)
        init_conv_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(self.avgpool(x).flatten(1))


def mobilenet_v2_cifar(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2:
    """The usual CIFAR port: strides 1, 1, 2, 2, 1, 2, 1."""
    return MobileNetV2((1, 1, 2, 2, 1, 2, 1), num_classes, in_channels)


def mobilenet_v2_dwnp(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2:
    """The variant in the code of DWNP: the third stage keeps its resolution, for 3.3 times the multiply-adds."""
    return MobileNetV2((1, 1, 1, 2, 1, 2, 1), num_classes, in_channels)
