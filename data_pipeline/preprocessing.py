"""The evaluation graph of `graph.py` in PyTorch's operators alone, so that an exported model holds it.

On decoded pixels it gives what DALI gives, but for ties of rounding to 8 bits, which are a grey level apart.

Shapes: B images, H x W their size, px side that comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.graph import ImageSettings


class Preprocessing(nn.Module):
    """Resize, centre crop and normalisation of images of any size, all images of a batch having the same.

    Resizing is two products with matrices that are computed from H and W, [px, H] and [W, px]; rows that the crop would
    cut away are never made. Runtimes differ in their operators for antialiased resizing, or lack them; not in products.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image: ImageSettings) -> None:
        super().__init__()
        self.image_px, self.short_px = image.image_px, image.short_px
        for name, numbers in (("mean", image.mean), ("std", image.std)):
            self.register_buffer(name, 255 * torch.tensor(numbers).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, H, W, 3], RGB -> normalised float32 [B, 3, px, px]."""
        levels = torch.round(self.resized(images))  # DALI resizes to 8 bits, too
        return (levels - self.mean) / self.std

    def resized(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, H, W, 3] -> resized and cropped, 0 to 255, not rounded, float32 [B, 3, px, px]."""
        height, width = images.shape[1:3]
        short = torch.minimum(_number(height), _number(width))
        rows, columns = self._resizing(height, short), self._resizing(width, short)
        return rows @ images.permute(0, 3, 1, 2).float() @ columns.T

    def _resizing(self, size: int, short: Tensor) -> Tensor:
        """Weights [px, size] with which the pixels of one side make up those that come out.

        A triangle as wide as a pixel that comes out is (Pillow's and DALI's antialiased linear filter); beyond the
        border its pixel is repeated. The scale is that of the short side, about the image's centre, and a half pixel of
        the crop goes to the right.
        """
        side, place = _number(size), torch.arange(size, dtype=torch.float64)
        scale = short / self.short_px
        resized = torch.floor(side / scale + 0.5)
        first = torch.floor((resized - self.image_px) / 2 + 0.5)
        out = first + 0.5 + torch.arange(self.image_px, dtype=torch.float64)
        centre = (side / 2 + (out - resized / 2) * scale)[:, None]
        width = scale.clamp(min=1)

        def triangle(at: Tensor) -> Tensor:
            return (1 - (at + 0.5 - centre).abs() / width).clamp(min=0)

        before, behind = (triangle(at).sum(dim=1, keepdim=True) for at in (-1 - place, side + place))
        weights = triangle(place) + before * (place == 0) + behind * (place == side - 1)
        return (weights / weights.sum(dim=1, keepdim=True)).float()


def _number(size: int) -> Tensor:
    """A size that is unknown while the model is traced, as a float64 scalar."""
    return torch.scalar_tensor(size, dtype=torch.float64)
