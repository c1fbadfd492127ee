"""Our RoIAlign on a CPU that trains is torchvision's, in values and gradients; levels follow HEAD's map."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from stages.detection.records import RoIs
from stages.detection.roi_align import align_rois
from stages.detection.roi_head import RoIHead, RoIHeadConfig


def boxes(count, height, width):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([width, height])
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60
    found = torch.cat([corner - size / 2, corner + size / 2], 1)
    limits = torch.tensor([width, height] * 2)
    return torch.cat([found.clamp(min=0).minimum(limits), torch.tensor([[0.0, 0, width, height]]).double()])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_equals_torchvision(aligned, ratio):
    rois = boxes(40, 96, 128)
    image = torch.arange(len(rois)) * 7 % 3
    maps = torch.randn(3, 4, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    found = align_rois(ours, image, rois, 7, 4, ratio, aligned)
    wanted = roi_align(theirs, torch.cat([image[:, None].double(), rois], 1), 7, 0.25, ratio, aligned)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    weight = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_pool_equals_torchvisions_multi_scale_pooling():
    head = RoIHead(RoIHeadConfig(hidden=8), 4, (4, 8, 16, 32), 2).double()
    rois = boxes(60, 512, 512)
    rois[::3] *= 0.1
    rois[1::3, 2:] += 200
    rois = rois.clamp(0, 512)
    image = torch.arange(len(rois)) % 2
    generator = torch.Generator().manual_seed(1)
    levels = tuple(
        torch.randn(2, 4, 512 // s, 512 // s, generator=generator, dtype=torch.float64) for s in head.strides
    )
    nothing = torch.zeros(len(rois), dtype=torch.int64)
    found = head.pool(levels, RoIs(rois, image, nothing, nothing, rois))
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    per_image = [rois[image == k] for k in (0, 1)]
    wanted = theirs({str(k): level for k, level in enumerate(levels)}, per_image, [(512, 512)] * 2)
    torch.testing.assert_close(torch.cat([found[image == 0], found[image == 1]]), wanted, rtol=1e-6, atol=1e-6)
