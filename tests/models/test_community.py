"""Models of other projects through spandrel.

spandrel imports torchvision for two of its architectures (rotation for LaMa, normalisation for RestoreFormer), and
torchvision's wheels do not load beside the CPU build of PyTorch. Where that is so, this file, and nothing else, puts a
stand-in of those three names into the process; none of the architectures that are tested here uses them.
"""

import sys
import types
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch import Tensor

from onestepsr import Upscaler
from onestepsr.benchmark.complexity import measure
from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.models.community import CommunityGenerator, is_foreign, load_community
from onestepsr.models.loading import load_network
from onestepsr.models.realesrgan.networks import RealESRGANConfig, RealESRGANGenerator
from onestepsr.weights.catalog import get_model


def never(*_: object) -> None:
    raise AssertionError("a stand-in was used")


def load_spandrel() -> types.ModuleType:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        functional = types.ModuleType("torchvision.transforms.functional")
        functional.InterpolationMode = Enum("InterpolationMode", ["NEAREST", "BILINEAR"])  # type: ignore[attr-defined]
        functional.rotate = functional.normalize = never  # type: ignore[attr-defined]
        fakes = {
            "torchvision": types.ModuleType("torchvision"),
            "torchvision.transforms": types.ModuleType("torchvision.transforms"),
            "torchvision.transforms.functional": functional,
        }
        sys.modules.update(fakes)
        try:
            return pytest.importorskip("spandrel")
        finally:
            for name in fakes:
                del sys.modules[name]
    return pytest.importorskip("spandrel")


spandrel = load_spandrel()


def compact(path: Path, scale: int = 2, channels: int = 3) -> Path:
    """A random network of the Compact architecture, in the file that its trainer writes."""
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    torch.manual_seed(0)
    network = SRVGGNetCompact(num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=scale)
    torch.save({"params": network.state_dict()}, path)
    return path


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_real_esrgan_through_spandrel_equals_our_own_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = RealESRGANGenerator(RealESRGANConfig(blocks=2, width=64, growth=32)).eval().requires_grad_(False)
    path = tmp_path / "RealESRGAN_x4.pth"
    torch.save({"params_ema": ours.state_dict()}, path)
    theirs = load_community(path)
    assert (theirs.architecture, theirs.scale, theirs.lr_multiple) == ("ESRGAN", 4, 1)
    lr = torch.rand(1, 3, 9, 14)
    with torch.inference_mode():
        assert difference(theirs(lr), ours(lr)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not get_model("realesrgan-x4plus").is_here, reason="weights are not on this machine")
def test_the_published_x4plus_does_too(tmp_path: Path) -> None:
    ours = load_network("realesrgan-x4plus").requires_grad_(False)
    path = tmp_path / "RealESRGAN_x4plus.pth"
    torch.save({"params_ema": ours.state_dict()}, path)
    lr = torch.rand(1, 3, 17, 13)
    with torch.inference_mode():
        assert difference(load_community(path)(lr), ours(lr)) < 1e-5


@pytest.mark.slow
def test_architectures_of_other_licences_are_known_where_they_are_installed(tmp_path: Path) -> None:
    pytest.importorskip("spandrel_extra_arches")
    from spandrel_extra_arches.architectures.FeMaSR.__arch.femasr import FeMaSRNet

    torch.manual_seed(0)
    theirs = FeMaSRNet(LQ_stage=True, scale_factor=4).eval().requires_grad_(False)
    torch.save({"params": theirs.state_dict()}, tmp_path / "FeMaSR.pth")
    network = load_community(tmp_path / "FeMaSR.pth")
    assert (network.architecture, network.scale, network.lr_multiple) == ("FeMaSR", 4, 16)
    lr = torch.rand(1, 3, 32, 16)
    with torch.inference_mode():
        assert difference(network(lr), theirs(lr)) < 1e-5
    assert network(lr[..., :21, :9]).shape == (1, 3, 84, 36)


def test_another_scale_goes_through_the_upscaler(tmp_path: Path) -> None:
    path = compact(tmp_path / "2x_Small.pth")
    network = load_network(path)
    assert isinstance(network, CommunityGenerator)
    assert network.scale == 2
    assert measure(str(path), 64).parameters == sum(parameter.numel() for parameter in network.parameters())
    upscaler = Upscaler.from_pretrained(path, "cpu", "float32")
    image = (torch.rand(23, 31, 3) * 255).byte().numpy()
    assert upscaler(image, scale=4, tile=16).size == (124, 92)


def test_gray_networks_give_gray(tmp_path: Path) -> None:
    network = load_community(compact(tmp_path / "gray.pth", scale=4, channels=1)).requires_grad_(False)
    sr = network(torch.rand(1, 3, 5, 6))
    assert sr.shape == (1, 3, 20, 24)
    assert difference(sr[:, 0], sr[:, 2]) == 0


def test_sizes_that_a_network_cannot_take_are_padded(tmp_path: Path) -> None:
    class Window(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-2:] == (16, 24)
            return x

    descriptor = types.SimpleNamespace(
        architecture=types.SimpleNamespace(name="Window"),
        purpose="Restoration",
        scale=1,
        input_channels=3,
        output_channels=3,
        model=torch.nn.Sequential(Window(), torch.nn.Conv2d(3, 3, 1)),
        _call_fn=lambda model, image: model(image),
        size_requirements=types.SimpleNamespace(minimum=16, multiple_of=8, square=False),
        supports_half=False,
        supports_bfloat16=False,
    )
    network = CommunityGenerator(descriptor, "window.pth")
    assert network.lr_multiple == 8
    network.to(torch.bfloat16)  # which it does not support
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert network(torch.rand(2, 3, 5, 17).bfloat16()).shape == (2, 3, 5, 17)
    descriptor.purpose = "FaceSR"
    with pytest.raises(UserError, match="restores aligned faces"):
        CommunityGenerator(descriptor, "face.pth")


def test_unknown_files_say_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd.pth"
    torch.save({"params": {"block.rbr_reparam.weight": torch.zeros(3, 4)}}, path)
    assert is_foreign(path)
    with pytest.raises(
        UserError, match=r"no architecture that spandrel knows: 1 weights, first .* \(3, 4\); it looks re-"
    ):
        load_community(path)
    torch.save({"a": 1}, path)
    with pytest.raises(UserError, match="holds no tensors"):
        load_community(path)
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match="no weights that can be read safely"):
        load_community(path)
    known = compact(tmp_path / "known.pth")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(MissingExtra, match=r"onestepsr\[community\]"):
        load_community(known)
