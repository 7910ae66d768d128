"""Real-ESRGAN's generator: the published layouts give one network, damaged files are refused, any size comes out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from onestepsr.core.errors import UserError
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models.realesrgan.checkpoints import FLOAT16, FLOAT32, load_realesrgan, looks_published
from onestepsr.models.realesrgan.networks import RealESRGANConfig, RealESRGANGenerator
from weights_by_name import fill_by_name

X4PLUS_PARAMETERS, X4PLUS_NCNN_BYTES = 16_697_987, 33_424_520


def small(blocks: int = 6) -> RealESRGANGenerator:
    network = RealESRGANGenerator(RealESRGANConfig(blocks=blocks))
    fill_by_name(network)
    return network.eval().requires_grad_(False)


def as_ncnn(network: nn.Module, flag: int) -> bytes:
    """The bytes that ncnn's converter writes for the convolutions of ``network``."""
    parts = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.numpy().astype("<f2" if flag == FLOAT16 else "<f4").tobytes()
            parts += [flag.to_bytes(4, "little"), weight, bytes(-len(weight) % 4), module.bias.numpy().tobytes()]
    return b"".join(parts)


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = RealESRGANGenerator()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 351
    assert sum(parameter.numel() for parameter in network.parameters()) == X4PLUS_PARAMETERS
    size = sum(4 + -(-2 * conv.weight.numel() // 4) * 4 + 4 * conv.bias.numel() for conv in convolutions)
    assert size == X4PLUS_NCNN_BYTES


@pytest.mark.parametrize("flag", [FLOAT16, FLOAT32])
def test_an_ncnn_file_gives_the_network_back(tmp_path: Path, flag: int) -> None:
    network = small()
    path = tmp_path / "weights.bin"
    path.write_bytes(as_ncnn(network, flag))
    found = load_realesrgan(path).state_dict()
    for key, value in network.state_dict().items():
        rounded = value.half().float() if flag == FLOAT16 and key.endswith("weight") else value
        torch.testing.assert_close(found[key], rounded, rtol=0, atol=0)


def test_an_official_checkpoint_gives_the_network_back(tmp_path: Path) -> None:
    network = small(blocks=2)
    path = tmp_path / "weights.pth"
    torch.save({"params": small(blocks=1).state_dict(), "params_ema": network.state_dict()}, path)
    assert looks_published(path)
    found = load_realesrgan(path)
    assert found.config.blocks == 2
    torch.testing.assert_close(found.state_dict(), network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("change", [lambda b: b[:-4], lambda b: b + b"1234", lambda b: b"\1" + b[1:], lambda b: b""])
def test_other_bytes_are_refused_in_one_line(tmp_path: Path, change) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(change(as_ncnn(small(), FLOAT16)))
    with pytest.raises(UserError, match=r"^\S+weights.bin: \d+ bytes that are no x4plus network") as error:
        load_realesrgan(path)
    assert "\n" not in str(error.value)


def test_foreign_pickles_are_no_network_of_this_kind(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(3)}, path)
    assert not looks_published(path)
    with pytest.raises(UserError, match="no weights of Real-ESRGAN"):
        load_realesrgan(path)


def test_the_residual_scales_by_hand() -> None:
    network = small(blocks=1)
    block = network.body[0].rdb1
    x = torch.randn(1, 64, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in network.body.parameters():
            parameter.zero_()
        block.conv5.bias.fill_(1.0)
    torch.testing.assert_close(block(x), x + 0.2)
    torch.testing.assert_close(network.body(x), x + 0.2 * (x + 0.2))


def test_upscaler_takes_a_file_of_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(as_ncnn(small(), FLOAT16))
    samples = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    whole = Upscaler.from_pretrained(path, device="cpu", dtype="float32")(samples)
    assert whole.size == (20, 28)
