"""RoIAlign (arXiv 1703.06870): torchvision's operator, and on a CPU that trains, the same by `grid_sample`.

torchvision's backward pass runs on one thread and was a third of a teacher's training step; grid_sample's takes a
quarter of its time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import roi_align


def align_rois(
    level_BCHW: Tensor, image_M: Tensor, boxes_M4: Tensor, side: int, stride: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """(M, C, side, side) from one level; boxes are xyxy in pixels of the input."""
    boxes_M4 = boxes_M4.to(level_BCHW.dtype)
    if level_BCHW.device.type == "cpu" and level_BCHW.requires_grad and sampling_ratio > 0:
        return _sampled(level_BCHW, image_M, boxes_M4 / stride, side, sampling_ratio, aligned)
    boxes_M5 = torch.cat([image_M[:, None].to(boxes_M4.dtype), boxes_M4], 1)
    pooled: Tensor = roi_align(level_BCHW, boxes_M5, side, 1 / stride, sampling_ratio, aligned)
    return pooled


def _sampled(
    level_BCHW: Tensor, image_M: Tensor, boxes_M4: Tensor, side: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Bilinear samples at the centres of each cell's sub-cells, averaged. Boxes in cells of the level.

    grid_sample takes one grid an image, so the RoIs of an image are stacked in rows, as many as the fullest image has.
    """
    batch, channels, rows, columns = level_BCHW.shape
    corner_M2, size_M2 = boxes_M4[:, :2] - 0.5 * aligned, boxes_M4[:, 2:] - boxes_M4[:, :2]
    if not aligned:
        size_M2 = size_M2.clamp(min=1)
    count = side * sampling_ratio
    steps = (torch.arange(count, dtype=boxes_M4.dtype) + 0.5) / count
    points_MN2 = corner_M2[:, None] + size_M2[:, None] * steps[None, :, None]
    limits = torch.tensor([columns, rows], dtype=boxes_M4.dtype)
    inside_MN2 = (points_MN2 >= -1) & (points_MN2 <= limits)  # RoIAlign reads 0 beyond, grid_sample the border
    scaled_MN2 = (2 * points_MN2 + 1) / limits - 1
    x_MNN = scaled_MN2[:, None, :, 0].expand(-1, count, -1)
    y_MNN = scaled_MN2[:, :, None, 1].expand(-1, -1, count)
    per_image = torch.bincount(image_M, minlength=batch)
    order = image_M.argsort(stable=True)
    slot_M = torch.empty_like(image_M)
    slot_M[order] = torch.arange(len(image_M)) - (per_image.cumsum(0) - per_image)[image_M[order]]
    fullest = int(per_image.max())
    grid = boxes_M4.new_zeros(batch, fullest, count, count, 2)
    grid[image_M, slot_M] = torch.stack([x_MNN, y_MNN], -1)
    flat = grid.view(batch, fullest * count, count, 2)
    found = functional.grid_sample(level_BCHW, flat, padding_mode="border", align_corners=False)
    found = found.view(batch, channels, fullest, count, count).transpose(1, 2)[image_M, slot_M]
    found = found * (inside_MN2[:, None, :, None, 1] & inside_MN2[:, None, None, :, 0])
    return functional.avg_pool2d(found, sampling_ratio) if sampling_ratio > 1 else found
