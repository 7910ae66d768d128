"""The adapter to pyiqa, with a package of that name that behaves as pyiqa does where it matters."""

import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_images import scene

from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.evaluate.metrics import perceptual
from onestepsr.evaluate.metrics.catalog import METRICS

PACKAGE = '''
import random
import numpy as np
import torch

__version__ = "0.1.10"
created = []

class Metric:
    """Mean of four random pixels: draws from global generators, as MANIQA does."""
    def __call__(self, target):
        assert target.ndim == 4 and target.dtype == torch.float32
        if target.shape[-1] < 8:
            raise RuntimeError("Kernel size can't be greater than actual input size\\nmore")
        rows = np.random.randint(0, target.shape[-2], 2)
        column = random.randrange(target.shape[-1])
        noise = torch.rand(())
        return target[:, :, rows, column].mean().reshape(1, 1) + noise

def create_metric(name, as_loss=False, device=None):
    if name == "musiq":
        raise ConnectionError("no network\\nat all")
    created.append(name)
    np.random.seed(123); random.seed(123); torch.manual_seed(123)
    return Metric()
'''


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    perceptual._package.cache_clear()
    sys.modules.pop("pyiqa", None)
    yield
    perceptual._package.cache_clear()
    sys.modules.pop("pyiqa", None)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pyiqa.py"
    path.write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_a_value_does_not_depend_on_the_images_before_it(package: Path) -> None:
    measure = METRICS["maniqa-pipal"].load()
    first, second = scene(20, 24, 0), scene(20, 24, 1)
    alone = measure(second, second).item()
    both = measure(torch.cat([first, second]), first)
    assert (both.shape, both.dtype) == ((2,), torch.float64)
    assert both[1].item() == alone
    assert both[0].item() != alone


def test_global_generators_are_left_as_they_were(package: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    perceptual.load_iqa("clipiqa")(scene(16, 16))
    assert draws() == expected


def test_the_published_variants_are_asked_for(package: Path) -> None:
    names = ["maniqa-pipal", "maniqa", "clipiqa", "clipiqa+", "topiq_nr", "liqe", "ilniqe", "pi"]
    for name in names:
        METRICS[name].load()
    assert sys.modules["pyiqa"].created == names


def test_the_licence_is_shown_once(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        perceptual.load_iqa("clipiqa")
        perceptual.load_iqa("maniqa")
    assert [record.message for record in caplog.records] == [perceptual.NOTICE]
    assert "PolyForm Noncommercial" in perceptual.NOTICE


def test_what_goes_wrong_inside_is_one_line(package: Path) -> None:
    with pytest.raises(UserError, match=r"^pyiqa 0\.1\.10 cannot create 'musiq': no network$"):
        perceptual.load_iqa("musiq")
    with pytest.raises(UserError, match=r"^pyiqa's clipiqa: Kernel size can't be greater than actual input size$"):
        perceptual.load_iqa("clipiqa")(scene(16, 7))
    with pytest.raises(UserError, match="not finite"):
        perceptual.load_iqa("clipiqa")(scene(16, 16) / 0)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingExtra, match=r"pip install 'onestepsr\[iqa\]'"):
        perceptual.load_iqa("musiq")


@pytest.mark.parametrize("line", ["import torchvision_that_is_not_there", "raise RuntimeError('operator missing')"])
def test_a_package_that_cannot_be_imported_is_told_from_a_missing_one(package: Path, line: str) -> None:
    package.write_text(line)
    with pytest.raises(UserError, match="is installed but cannot be imported"):
        perceptual.load_iqa("musiq")
