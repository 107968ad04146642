"""VGG-19 with batch normalisation for 32x32 images: Simonyan and Zisserman (arXiv 1409.1556), configuration E."""

from __future__ import annotations

from torch import Tensor, nn

from ._init import init_conv_


class VGG(nn.Module):
    """Five groups of 3x3 convolutions without bias, each with BN and ReLU and each group ended by 2x2 max-pooling.

    One linear layer follows, in place of the three of the ImageNet network: the form used in the pruning literature
    (20.0 M parameters with 10 classes). Input [N, in_channels, H, W] with H and W at least 32; output [N, num_classes].
    """

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for depth, width in zip(depths, widths, strict=True):
            for _ in range(depth):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_conv_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)).flatten(1))


def vgg19_bn_cifar(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-19-BN for 32x32 images: 16 convolutions and one linear layer of 512 inputs."""
    return VGG((2, 2, 4, 4, 4), (64, 128, 256, 512, 512), num_classes, in_channels)
