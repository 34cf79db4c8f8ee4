"""Shipped networks in PyTorch, written as by their authors or in the best-known ports; needs torch."""

from typing import Any

import torch
from torch import nn


def resnet18(num_classes: int, channels: int) -> Any:
    """ResNet-18 for small images, as in kuangliu/pytorch-cifar."""
    layers: list[nn.Module] = [*_conv(channels, 64, 3, 1), nn.ReLU()]
    inputs = 64
    for features, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(inputs, features, stride), _Block(features, features, 1)]
        inputs = features
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


def cnn(num_classes: int, channels: int) -> Any:
    """The small CNN of McMahan et al. (2017), for images of 32x32."""
    stages: list[nn.Module] = []
    for inputs, features in ((channels, 32), (32, 64)):
        stages += [nn.Conv2d(inputs, features, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    dense = nn.Flatten(), nn.LazyLinear(512), nn.ReLU(), nn.Linear(512, num_classes)
    return nn.Sequential(*stages, *dense)


NETWORKS = {"resnet18": resnet18, "cnn": cnn}


class _Block(nn.Module):
    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.main = nn.Sequential(
            *_conv(inputs, features, 3, stride), nn.ReLU(), *_conv(features, features, 3, 1)
        )
        same = stride == 1 and inputs == features
        self.shortcut = nn.Sequential() if same else nn.Sequential(*_conv(inputs, features, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.main(x) + self.shortcut(x))


def _conv(inputs, features, size, stride):
    conv = nn.Conv2d(inputs, features, size, stride, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(features)
