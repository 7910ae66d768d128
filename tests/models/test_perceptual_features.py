"""AlexNet and the Inception network of FID: sizes, keys and the places where TensorFlow's arithmetic differs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.fid import BLOCKS, InceptionFeatures, MixedBlock
from onestepsr.models.perceptual_features import AlexNetFeatures
from weights_by_name import fill_by_name

pytestmark = pytest.mark.numeric

ALEXNET_WITHOUT_CLASSIFIER = 2_469_696
INCEPTION_WITHOUT_CLASSIFIER = 21_785_568


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        networks = AlexNetFeatures(), InceptionFeatures()
    counts = [sum(weight.numel() for weight in network.parameters()) for network in networks]
    assert counts == [ALEXNET_WITHOUT_CLASSIFIER, INCEPTION_WITHOUT_CLASSIFIER]


def test_keys_are_torchvisions() -> None:
    with torch.device("meta"):
        inception, alexnet = InceptionFeatures().state_dict(), AlexNetFeatures().state_dict()
    assert list(alexnet) == [f"features.{n}.{part}" for n in (0, 3, 6, 8, 10) for part in ("weight", "bias")]
    shapes = {
        "Conv2d_2a_3x3.bn.running_var": (32,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6c.branch7x7_2.conv.weight": (160, 160, 1, 7),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch3x3_2.conv.weight": (320, 192, 3, 3),
        "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
    }
    assert {key: tuple(inception[key].shape) for key in shapes} == shapes
    assert not any("branch_pool" in key for key in inception if key.startswith(("Mixed_6a", "Mixed_7a")))


def test_the_first_layers_of_alexnet_by_hand() -> None:
    network = AlexNetFeatures()
    fill_by_name(network)
    x = torch.rand(1, 3, 63, 70, generator=torch.Generator().manual_seed(0))
    weights = network.state_dict()
    normal = (x * 2 - 1 - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
        :, None, None
    ]  # the form that LPIPS has it in
    first = F.relu(F.conv2d(normal, weights["features.0.weight"], weights["features.0.bias"], 4, 2))
    second = F.conv2d(F.max_pool2d(first, 3, 2), weights["features.3.weight"], weights["features.3.bias"], 1, 2)
    maps = network(x)
    assert [m.shape[1] for m in maps] == list(AlexNetFeatures.channels)
    torch.testing.assert_close(maps[1], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[2], F.relu(second), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="at least 31 x 31"):
        network(x[..., :30, :])


def test_inception_gives_2048_features_from_the_sides_of_its_paper() -> None:
    torch.manual_seed(0)
    network = InceptionFeatures()
    shapes = {}
    for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3", *(block[0] for block in BLOCKS)):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    with torch.no_grad():
        features = network(torch.rand(1, 3, 299, 299) * 2 - 1)
    assert features.shape == (1, 2048)
    assert features.isfinite().all()
    assert (shapes["Conv2d_2b_3x3"], shapes["Conv2d_4a_3x3"]) == ((64, 147, 147), (192, 71, 71))
    assert (shapes["Mixed_5d"], shapes["Mixed_6e"], shapes["Mixed_7c"]) == ((288, 35, 35), (768, 17, 17), (2048, 8, 8))


def test_averages_leave_the_padding_out_and_the_last_block_takes_a_maximum() -> None:
    flat = torch.ones(1, 8, 5, 5)
    rising = torch.arange(25.0).reshape(1, 1, 5, 5).expand(-1, 8, -1, -1)
    for pool, x, expected in (
        ("average", flat, flat),
        ("maximum", rising, F.max_pool2d(rising, 3, 1, 1)),
        ("halving maximum", rising, F.max_pool2d(rising, 3, 2)),
    ):
        block = MixedBlock(8, {}, pool, 0 if pool == "halving maximum" else 8)  # type: ignore[arg-type]
        block.eval()
        if pool != "halving maximum":
            torch.nn.init.dirac_(block.branch_pool.conv.weight)
        torch.testing.assert_close(block(x), expected, rtol=1e-3, atol=1e-3)
    assert [block[3] for block in BLOCKS].count("maximum") == 1
    assert BLOCKS[-1][3] == "maximum"


def test_weights_are_read_without_classifier_and_counters(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in InceptionFeatures().state_dict().items()}
    state = {key: torch.full(shape, 0.001 * number) for number, (key, shape) in enumerate(shapes.items())}
    others = {"fc.weight": torch.zeros(1008, 2048), "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.zeros(())}
    torch.save(state | others, tmp_path / "fid.pth")
    loaded = InceptionFeatures.from_file(tmp_path / "fid.pth")
    assert not loaded.training
    assert all(value.equal(state[key]) for key, value in loaded.state_dict().items())
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
    del state["Mixed_7b.branch_pool.bn.bias"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"missing Mixed_7b.branch_pool.bn.bias"):
        InceptionFeatures.from_file(tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"not AlexNet weights .*missing features.0.bias"):
        AlexNetFeatures.from_file(tmp_path / "half.pth")
