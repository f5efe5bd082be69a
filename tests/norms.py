"""What the tests of batch norm over ranks share: layers, networks, and two training steps of one rank."""

from __future__ import annotations

import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

CHANNELS = 4

# name -> batch norm, shape of a sample
LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(CHANNELS), (CHANNELS,)),
    "1d, sequence": (lambda: nn.BatchNorm1d(CHANNELS), (CHANNELS, 6)),
    "2d": (lambda: nn.BatchNorm2d(CHANNELS), (CHANNELS, 3, 5)),
    "2d, own settings": (lambda: nn.BatchNorm2d(CHANNELS, eps=0.1, momentum=0.7), (CHANNELS, 3, 5)),
    "2d, plain mean": (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), (CHANNELS, 3, 5)),
    "2d, not affine": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (CHANNELS, 3, 5)),
    "2d, no statistics": (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), (CHANNELS, 3, 5)),
    "3d": (lambda: nn.BatchNorm3d(CHANNELS), (CHANNELS, 2, 3, 2)),
    "timm's with activation": (lambda: BatchNormAct2d(CHANNELS, act_layer=nn.SiLU), (CHANNELS, 3, 5)),
}
NETWORKS = ("test_resnet", "test_efficientnet")  # the second has timm's batch norm with activation


def train(model, shape, sizes, dtype, rank=0, world=1):
    """Two training steps of one rank -> its outputs and input gradients, weight gradients, running statistics."""
    result = {}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        images = (3 + 2 * torch.randn(7, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        x = images.split(sizes)[rank].requires_grad_()
        y = model(x)
        # A weight a value, different for each image: batch norm's backward is zero for a plain sum.
        weights = torch.randn(7, *y.shape[1:], generator=generator, dtype=torch.float64).to(dtype).split(sizes)[rank]
        model.zero_grad()
        (y * weights).sum().backward()
        result |= {("output", step): y.detach(), ("input gradient", step): x.grad}
        for name, parameter in model.named_parameters():
            grad = parameter.grad.clone()
            if world > 1:
                dist.all_reduce(grad)  # the sum of all ranks' losses
            result["gradient", name, step] = grad
        result |= {("buffer", name, step): buffer.clone() for name, buffer in model.named_buffers()}
    return result


def build(name, dtype):
    """-> layer or network, shape of a sample. Weights and biases that do not hide in the default 1 and 0."""
    torch.manual_seed(0)
    if name in NETWORKS:
        model, shape = timm.create_model(name, num_classes=3), (3, 32, 32)
    else:
        layer, shape = LAYERS[name]
        model = layer()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(dtype), shape
