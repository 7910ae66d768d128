"""ResShift's UNet: the published names, numbers and masks at its published size; everything else on a small one."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import decibels
from torch import Tensor

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.machine import instructions, multiplies_bfloat16
from onestepsr.models import cpu_kernels
from onestepsr.models.cpu_kernels import PackedConvolution
from onestepsr.models.resshift.unet import (
    GroupNorm,
    SwinBlock,
    SwinConfig,
    SwinUNet,
    SwinUNetConfig,
    shifted_window_masks,
)
from onestepsr.weights.files import canonical_keys, fill, materialize
from weights_by_name import fill_by_name

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[2] / "golden" / "swin_unet.npz"
SMALL = SwinUNetConfig(
    image_size=16,
    latent_channels=4,
    lq_size=16,
    model_channels=32,
    channel_mult=(1, 2),
    res_blocks=1,
    norm_groups=16,
    swin=SwinConfig(width=48, head_width=16, mlp_ratio=2),
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


def small_network(config: SwinUNetConfig = SMALL) -> SwinUNet:
    """Random weights; the biases of attention large enough to matter."""
    torch.manual_seed(0)
    network = SwinUNet(config)
    for key, parameter in network.named_parameters():
        if key.endswith(("out_layers.3.weight", "relative_position_bias_table")):
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 4 else 1.0)
    return network


def small_inputs(n: int = 2, height: int = 16, width: int = 32, factor: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, height, width, generator=rng)
    return x, torch.arange(n) * 7, torch.randn(n, 3, factor * height, factor * width, generator=rng)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="no instructions for bfloat16, so weights are not packed")
def test_packed_weights_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "LEAST_WEIGHT", 0)
    plain = small_network().eval().requires_grad_(False).bfloat16().to(memory_format=torch.channels_last)
    made, inputs = copy.deepcopy(plain), small_inputs()
    made.speed_up()
    with torch.inference_mode():
        found, expected = made(*inputs), plain(*inputs)
        exact = copy.deepcopy(plain).float()(*inputs)
    if "amx_bf16" in instructions():  # the order of sums may depend on that of the weights, as agreement.agree says
        assert decibels(exact, found) > decibels(exact, expected) - 1.0
    else:
        assert torch.equal(found, expected)
    packed = [layer for layer in made.modules() if isinstance(layer, PackedConvolution)]
    assert packed
    assert all(layer.weight.is_meta for layer in packed)
    assert list(made.state_dict()) == list(plain.state_dict())


def at_published_size(golden: dict[str, np.ndarray], steps: list[int], inner: dict[str, Tensor]) -> np.ndarray:
    """Outputs of the published network by step; ``inner`` gets the maps of the second sample."""
    network = SwinUNet().eval()
    fill_by_name(network)
    for key in golden:
        if key.startswith("tap_t7_"):
            name = key.removeprefix("tap_t7_")
            keep = lambda module, inputs, output, name=name: inner.__setitem__(name, output[1:2])  # noqa: E731
            network.get_submodule(name).register_forward_hook(keep)
    x, lq = (torch.tensor(golden[key]).expand(len(steps), -1, -1, -1) for key in ("x", "lq"))
    with torch.inference_mode():
        return network(x, torch.tensor(steps), lq).numpy()


def test_outputs_and_inner_maps_equal_published_code(golden: dict[str, np.ndarray]) -> None:
    inner: dict[str, Tensor] = {}
    out = at_published_size(golden, [0, 7], inner)
    assert np.abs(out[0] - golden["out_t0"][0]).max() < 2e-5
    assert len(inner) == 9
    for name, values in inner.items():
        corner = values if values.ndim == 2 else values[:, :4, :8, :8]
        assert np.abs(corner.numpy() - golden[f"tap_t7_{name}"]).max() < 5e-5, name
        statistics = [values.double().mean(), values.double().std(correction=0), values.abs().max()]
        assert np.allclose(statistics, golden[f"tapstat_t7_{name}"], atol=1e-4), name


@pytest.mark.slow
def test_output_at_the_last_step_equals_published_code(golden: dict[str, np.ndarray]) -> None:
    assert np.abs(at_published_size(golden, [14], {})[0] - golden["out_t14"][0]).max() < 2e-5


def test_names_shapes_and_types_are_the_published_ones(golden: dict[str, np.ndarray]) -> None:
    with torch.device("meta"):
        network = SwinUNet()
    parameters = {key for key, _ in network.named_parameters()}
    entries = {
        f"{key} {'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')} "
        f"{'parameter' if key in parameters else 'buffer'}"
        for key, value in network.state_dict().items()
    }
    assert entries == {line.decode() for line in golden["entries"]}
    assert len(entries) == 564
    assert sum(parameter.numel() for parameter in network.parameters()) == 118_593_583


def test_masks_of_shifted_windows_are_the_published_ones(golden: dict[str, np.ndarray]) -> None:
    assert np.array_equal(shifted_window_masks(2, 2, 8), golden["mask_16x16"])
    assert np.array_equal(shifted_window_masks(3, 2, 8), golden["mask_24x16"])


def plain_attention(block: SwinBlock, x: Tensor, masks: Tensor, shift: int) -> Tensor:
    """The attention of a block, written window by window and head by head."""
    attention, heads = block.attn, block.attn.config.heads
    n, channels, height, width = x.shape
    shifted = x.roll((-shift, -shift), (2, 3))
    out = torch.empty_like(x)
    for sample in range(n):
        for index in range(height // 8 * (width // 8)):
            row, column = index // (width // 8) * 8, index % (width // 8) * 8
            tokens = shifted[sample, :, row : row + 8, column : column + 8].reshape(channels, 64).T
            q, k, v = F.linear(tokens, attention.qkv.weight, attention.qkv.bias).reshape(64, 3, heads, -1).unbind(1)
            results = []
            for head in range(heads):
                logits = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5 + masks[index]
                for i in range(64):
                    for j in range(64):
                        offset = (i // 8 - j // 8 + 7) * 15 + i % 8 - j % 8 + 7
                        logits[i, j] += attention.relative_position_bias_table[offset, head]
                results.append(logits.softmax(dim=1) @ v[:, head])
            window = F.linear(torch.cat(results, dim=1), attention.proj.weight, attention.proj.bias)
            out[sample, :, row : row + 8, column : column + 8] = window.T.reshape(channels, 8, 8)
    return out.roll((shift, shift), (2, 3))


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 4])
def test_attention_on_a_map_that_is_not_square(golden: dict[str, np.ndarray], shift: int) -> None:
    torch.manual_seed(0)
    block = SwinBlock(SwinConfig(width=8, head_width=8), norm_groups=4, side=16, shifted=shift > 0)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, 8, 24, 16)
    masks = torch.tensor(golden["mask_24x16"], dtype=torch.float32) * (shift > 0)
    after = x + plain_attention(block, block.norm1(x), masks, shift)
    expected = after + block.mlp(block.norm2(after))
    assert (block(x) - expected).abs().max() < 1e-5


def test_windows_do_not_shift_where_the_map_was_made_for_one_window() -> None:
    shifts = [module.shift for module in SwinUNet(SMALL).modules() if isinstance(module, SwinBlock)]
    assert shifts == [0, 4, 0, 0, 0, 0, 0, 0, 0, 4]  # levels of side 16 and 8 down, the middle, and up


@torch.no_grad()
def test_stored_masks_are_never_read() -> None:
    network = small_network()
    before = network(*small_inputs())
    for key, buffer in network.named_buffers():
        if key.endswith("attn_mask"):
            buffer.fill_(torch.nan)
    assert torch.equal(network(*small_inputs()), before)


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    network, (x, t, lq) = small_network(), small_inputs(3)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], lq[i : i + 1]) for i in range(3)])
    assert torch.allclose(network(x, t, lq), alone, atol=2e-5)


@torch.no_grad()
def test_step_and_condition_matter() -> None:
    network, (x, t, lq) = small_network(), small_inputs()
    out = network(x, t, lq)
    assert (network(x, t + 1, lq) - out).abs().max() > 1e-4
    assert (network(x, t, -lq) - out).abs().max() > 1e-2


@torch.no_grad()
def test_memory_format_changes_nothing() -> None:
    network, (x, t, lq) = small_network(), small_inputs()
    expected = network(x, t, lq)
    network.to(memory_format=torch.channels_last)
    out = network(x.contiguous(memory_format=torch.channels_last), t, lq)
    assert torch.allclose(out, expected, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision_is_close_and_gives_back_the_type_of_the_latent(dtype: torch.dtype, tolerance: float) -> None:
    network, (x, t, lq) = small_network(), small_inputs()
    expected = network(x, t, lq)
    out = network.to(dtype)(x, t, lq)
    assert out.dtype == torch.float32
    assert (out - expected).std() / expected.std() < tolerance
    assert network(x.to(dtype), t, lq.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype):
        mixed = network.float()(x, t, lq)
    assert (mixed - expected).std() / expected.std() < tolerance


def test_norms_keep_their_statistics_in_float32() -> None:
    x = (1000 + torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))).half()
    expected = F.group_norm(x.double(), 2)
    assert (GroupNorm(2, 8).half()(x) - expected).abs().max() < 3e-3


def test_every_parameter_learns_and_checkpointing_changes_no_gradient() -> None:
    network = small_network()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        network(*small_inputs()).square().mean().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in network.named_parameters()})
    assert [key for key, gradient in gradients[0].items() if not gradient.abs().sum() > 0] == []
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], atol=1e-6), key


def test_a_new_residual_block_is_its_shortcut() -> None:
    block = SwinUNet(SMALL).middle_block[0]
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(block(x, torch.randn(1, 128)), x)


@torch.no_grad()
def test_encoder_half_gives_middle_features_and_all_stages() -> None:
    middle, stages, emb = small_network().encode(*small_inputs())
    assert middle.shape == (2, 64, 8, 16)
    assert [stage.shape[1:] for stage in stages] == [(32, 16, 32), (32, 16, 32), (32, 8, 16), (64, 8, 16)]
    assert emb.shape == (2, 128)


@pytest.mark.parametrize(
    ("lq_size", "lq_channels", "widths", "first"),
    [(128, 3, [(16, 3), (32, 16)], 35), (256, 4, [(16, 4), (32, 16), (32, 32), (64, 32)], 67)],
)
def test_larger_conditions_are_halved_by_convolutions(
    lq_size: int, lq_channels: int, widths: list[tuple[int, int]], first: int
) -> None:
    with torch.device("meta"):
        network = SwinUNet(SwinUNetConfig(lq_size=lq_size, lq_channels=lq_channels))
        out = network(torch.zeros(1, 3, 64, 128), torch.zeros(1), torch.zeros(1, lq_channels, lq_size, 2 * lq_size))
    assert out.shape == (1, 3, 64, 128)
    state = network.state_dict()
    keys = [key for key in state if key.startswith("feature_extractor") and key.endswith("weight")]
    assert [key.split(".", 1)[1] for key in keys] == ["0.weight", "2.op.weight", "3.weight", "5.op.weight"][: len(keys)]
    assert [tuple(state[key].shape[:2]) for key in keys] == widths
    assert state["input_blocks.0.0.weight"].shape[1] == first


@torch.no_grad()
def test_condition_of_twice_the_size_runs() -> None:
    network = small_network(replace(SMALL, lq_size=32))
    assert network(*small_inputs(factor=2)).shape == (2, 4, 16, 32)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_checkpoints_of_training_load_strictly(prefix: str) -> None:
    network, other = small_network(), SwinUNet(SMALL)
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    other.load_state_dict(canonical_keys({"state_dict": state}), strict=True)
    x, t, lq = small_inputs()
    assert torch.equal(other(x, t, lq), network(x, t, lq))
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(canonical_keys(state), strict=True)


@torch.no_grad()
def test_weights_in_half_precision_fill_a_network_that_was_built_without_memory() -> None:
    network = small_network()
    with torch.device("meta"):
        other = SwinUNet(SMALL)
    state = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    fill(other, {key: partial(materialize, value) for key, value in state.items()}, "a file")
    assert {key: value.dtype for key, value in other.state_dict().items()} == {
        key: value.dtype for key, value in network.state_dict().items()
    }
    x, t, lq = small_inputs()
    assert torch.allclose(other(x, t, lq), network(x, t, lq), atol=0.02)


def test_sizes_that_do_not_fit_are_named() -> None:
    network, (x, t, lq) = small_network(), small_inputs()
    with pytest.raises(ValueError, match="multiples of 16, got 16x24"):
        network(x[..., :24], t, lq[..., :24])
    with pytest.raises(ValueError, match="of a 16x32 latent must be 16x32, got 16x16"):
        network(x, t, lq[..., :16])


def test_configuration_survives_a_file() -> None:
    assert from_mapping(SwinUNetConfig, to_mapping(SMALL)) == SMALL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": []}, "one entry per level"),
        ({"channel_mult": [1, 0]}, "at least 1"),
        ({"model_channels": 40}, "model_channels must be a multiple of norm_groups 32, got 40"),
        ({"model_channels": 31}, "must be even, got 31"),
        ({"swin": {"width": 48}}, "width must be a multiple of head_width 32, got 48"),
        ({"swin": {"width": 48, "head_width": 16}}, "swin.width must be a multiple of norm_groups 32, got 48"),
        ({"swin": {"window": 7}}, "window must be even"),
        ({"swin": {"depth": 0}}, "at least 1"),
        ({"image_size": 96}, "image_size must be a multiple of 64, got 96"),
        ({"image_size": 0}, "image_size must be a multiple of 64, got 0"),
        ({"lq_size": 32}, "lq_size must be image_size 64 times 1, 2, 4..., got 32"),
        ({"lq_size": 192}, "lq_size must be image_size 64 times 1, 2, 4..., got 192"),
    ],
)
def test_sizes_that_cannot_be_built_are_an_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_mapping(SwinUNetConfig, changes)


def test_memory_grows_with_width_and_precision() -> None:
    with torch.device("meta"):
        published, small = SwinUNet(), SwinUNet(SMALL)
    costs = [
        network.network_cost(dtype).bytes_per_position
        for network, dtype in ((small, torch.float32), (published, torch.bfloat16), (published, torch.float32))
    ]
    assert costs[0] < costs[2]
    assert costs[1] < costs[2]
