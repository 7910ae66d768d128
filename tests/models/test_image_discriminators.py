"""Discriminators of images: shapes, what is frozen, what a pixel's logit depends on."""

import torch

from onestepsr.models.image_discriminators import ProjectedDiscriminator, UNetDiscriminator


def test_projected_logits_have_the_sizes_of_the_maps_and_reach_them_all() -> None:
    torch.manual_seed(0)
    network = ProjectedDiscriminator((4, 6, 8), width=8, hidden=8)
    maps = [torch.randn(2, c, s, s + 1, requires_grad=True) for c, s in ((4, 9), (6, 5), (8, 3))]
    logits = network(*maps)
    assert [tuple(one.shape) for one in logits] == [(2, 1, 9, 10), (2, 1, 5, 6), (2, 1, 3, 4)]
    finest = torch.autograd.grad(logits[0].sum(), maps, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in finest)  # coarse maps are mixed into finer ones
    coarsest = torch.autograd.grad(logits[2].sum(), maps, allow_unused=True)
    assert coarsest[2] is not None
    assert all(gradient is None for gradient in coarsest[:2])
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"channel_mixing", "scale_mixing"}
    assert all(name.startswith("heads") for name, parameter in network.named_parameters() if parameter.requires_grad)


def test_the_unet_has_a_logit_for_every_pixel() -> None:
    torch.manual_seed(0)
    network = UNetDiscriminator((8, 12, 16))
    image = torch.rand(1, 3, 16, 24, requires_grad=True)
    logits = network(image)
    assert logits.shape == (1, 1, 16, 24)
    (gradient,) = torch.autograd.grad(logits[0, 0, 3, 5], image)
    assert gradient[0, :, 3, 5].abs().sum() > 0
