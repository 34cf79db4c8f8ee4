"""Layers and units of EfficientNetV2 in plain NumPy, from the paper and TensorFlow's rules."""

import itertools
import math

import numpy as np


def convolution(images, kernel, stride=1):
    """TensorFlow's SAME convolution: images (B, H, W, C_in), kernel (kh, kw, C_in, C_out)."""
    batch, height, width, _ = images.shape
    kernel_height, kernel_width, _, features = kernel.shape
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    top = max((rows - 1) * stride + kernel_height - height, 0) // 2
    left = max((columns - 1) * stride + kernel_width - width, 0) // 2
    outputs = np.zeros((batch, rows, columns, features))
    for row, column, a, b in itertools.product(*map(range, (rows, columns, kernel_height, kernel_width))):
        y, x = row * stride + a - top, column * stride + b - left
        if 0 <= y < height and 0 <= x < width:
            outputs[:, row, column] += images[:, y, x] @ kernel[a, b]
    return outputs


def depthwise(images, kernel, stride=1):
    """Kernel (kh, kw, 1, C): a dense convolution that mixes no channels."""
    return convolution(images, kernel * np.eye(kernel.shape[-1]), stride)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def batch_norm(x, mean, var, scale, bias):
    return (x - mean) / np.sqrt(var + 1e-3) * scale + bias


def squeeze_excite(x, params):
    gate = x.mean((1, 2)) @ params["reduce"]["kernel"] + params["reduce"]["bias"]
    gate = sigmoid(silu(gate) @ params["expand"]["kernel"] + params["expand"]["bias"])
    return x * gate[:, None, None, :]


def stem(x, params, stats):
    return silu(_norm(convolution(x, params["conv"]["kernel"], 2), "bn", params, stats))


def head(x, params, stats):
    return silu(_norm(convolution(x, params["conv"]["kernel"]), "bn", params, stats)).mean((1, 2))


def classifier(x, params, _):
    return x @ params["dense"]["dense_kernel"] + params["dense"]["bias"]


def fused_once(x, params, stats, stride=1):
    """The Fused-MBConv with expansion 1."""
    return silu(_norm(convolution(x, params["project_conv"]["kernel"], stride), "project_bn", params, stats))


def fused(x, params, stats, stride=1):
    x = silu(_norm(convolution(x, params["expand_conv"]["kernel"], stride), "expand_bn", params, stats))
    return _norm(convolution(x, params["project_conv"]["kernel"]), "project_bn", params, stats)


def mbconv(x, params, stats, stride=1):
    x = silu(_norm(convolution(x, params["expand_conv"]["kernel"]), "expand_bn", params, stats))
    x = depthwise(x, params["depthwise_conv"]["depthwise_kernel"], stride)
    x = squeeze_excite(silu(_norm(x, "depthwise_bn", params, stats)), params["squeeze_excite"])
    return _norm(convolution(x, params["project_conv"]["kernel"]), "project_bn", params, stats)


def _norm(x, name, params, stats):
    return batch_norm(x, **stats[name], **params[name])
