from pathlib import Path

import numpy as np
import pytest
import torch

from onestepsr.core.rng import generator
from onestepsr.data.degradation.kernels import Kernel, KernelConfig, bessel_j1, draw_kernel, draw_sinc_kernel

pytestmark = pytest.mark.numeric

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "degradation.npz")
SHAPES = {
    "iso": {"family": "gaussian", "sigma_x": 1.3, "sigma_y": 1.3},
    "aniso": {"family": "gaussian", "sigma_x": 2.5, "sigma_y": 0.8, "rotation": 0.7},
    "generalized_iso": {"family": "generalized", "sigma_x": 1.7, "sigma_y": 1.7, "beta": 0.6},
    "generalized_aniso": {"family": "generalized", "sigma_x": 2.2, "sigma_y": 1.1, "rotation": -1.2, "beta": 2.5},
    "plateau_iso": {"family": "plateau", "sigma_x": 1.5, "sigma_y": 1.5, "beta": 1.4},
    "plateau_aniso": {"family": "plateau", "sigma_x": 2.0, "sigma_y": 0.6, "rotation": 2.0, "beta": 1.9},
    "sinc": {"family": "sinc", "cutoff": 1.9},
}


@pytest.mark.parametrize("size", [7, 21])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_match_the_published_code(name, size):
    kernel = Kernel(size=size, **SHAPES[name]).tensor()
    np.testing.assert_allclose(kernel.numpy(), GOLDEN[f"kernel.{name}_k{size}"], rtol=0, atol=1e-12)


def test_sinc_kernel_of_low_cutoff_matches_the_published_code():
    kernel = Kernel(family="sinc", size=9, cutoff=np.pi / 3).tensor()
    padded = torch.nn.functional.pad(kernel, (6, 6, 6, 6))
    np.testing.assert_allclose(padded.numpy(), GOLDEN["kernel.sinc_k9_pad21"], rtol=0, atol=1e-12)


def test_bessel_function_has_its_known_values():
    # J1 at 1, its first zero, and a large argument (Abramowitz & Stegun, tables 9.1 and 9.5).
    x = torch.tensor([1.0, 3.8317059702075125, 50.0], dtype=torch.float64)
    expected = torch.tensor([0.4400505857449335, 0.0, -0.0975118281251751], dtype=torch.float64)
    torch.testing.assert_close(bessel_j1(x), expected, rtol=0, atol=1e-13)


def test_drawn_kernels_stay_inside_their_ranges_and_sum_to_one():
    config, rng = KernelConfig(), generator(0, "kernels")
    drawn = [draw_kernel(config, rng) for _ in range(400)]
    assert {kernel.family for kernel in drawn} == {"gaussian", "generalized", "plateau", "sinc"}
    for kernel in drawn:
        assert kernel.size in config.sizes
        assert float(kernel.tensor().sum()) == pytest.approx(1)
        if kernel.family == "sinc":
            assert (np.pi / 3 if kernel.size < 13 else np.pi / 5) <= kernel.cutoff <= np.pi
        else:
            assert 0.2 <= min(kernel.sigma_x, kernel.sigma_y) <= max(kernel.sigma_x, kernel.sigma_y) <= 3
        if kernel.family == "plateau":
            assert 1 <= kernel.beta <= 2


def test_family_shares_follow_the_weights():
    rng = generator(1, "shares")
    drawn = [draw_kernel(KernelConfig(), rng) for _ in range(3000)]
    share = {family: sum(kernel.family == family for kernel in drawn) / 3000 for family in ("sinc", "gaussian")}
    assert share["sinc"] == pytest.approx(0.1, abs=0.02)
    assert share["gaussian"] == pytest.approx(0.9 * 0.7, abs=0.03)
    round_share = sum(kernel.family != "sinc" and kernel.sigma_x == kernel.sigma_y for kernel in drawn) / 3000
    assert round_share == pytest.approx(0.9 * 0.69, abs=0.03)


def test_same_generator_same_kernel():
    first, second = (draw_sinc_kernel((7, 9), generator(3, "x")) for _ in range(2))
    assert first == second
    assert first != draw_sinc_kernel((7, 9), generator(4, "x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": (8,)}, "odd"),
        ({"sizes": ()}, "odd"),
        ({"sigma": (0.0, 1.0)}, "sigma"),
        ({"sinc_probability": 1.5}, "sinc_probability"),
        ({"beta_plateau": (1.2, 2.0)}, "beta"),
        ({"gaussian": (0.0, 0.0), "generalized": (0.0, 0.0), "plateau": (0.0, 0.0)}, "weights"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        KernelConfig(**settings)
