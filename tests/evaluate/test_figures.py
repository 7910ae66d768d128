"""The papers' figures: the numbers behind them in closed form, and files that a reader can open."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import save, scene

from evaluation_results import NIQE, PSNR, make_result
from onestepsr.cli.main import main
from onestepsr.core.errors import UserError
from onestepsr.evaluate import figures
from onestepsr.evaluate.figures import edge_maps, middle_features, principal_plane, radar_rows, score_images
from onestepsr.evaluate.result import EvaluationResult, MetricRecord, ProtocolRecord, write_result
from onestepsr.losses.perceptual import sobel_magnitude
from onestepsr.models.loading import load_residual_generator
from onestepsr.models.resshift.generator import conditioned

pytest.importorskip("matplotlib")
SSIM = MetricRecord(title="SSIM-Y", higher_is_better=True)


def result(label: str, psnr: float, ssim: float, niqe: float) -> EvaluationResult:
    record = ProtocolRecord(name="osediff", metrics={"psnr": PSNR, "ssim": SSIM, "niqe": NIQE})
    images = {"a": {"psnr": psnr - 1, "ssim": ssim, "niqe": niqe}, "b": {"psnr": psnr + 1, "ssim": ssim, "niqe": niqe}}
    return replace(make_result(label, {"a": psnr}), protocol=record, images=images)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *words])
    return int(stopped.value.code or 0)


def test_a_chart_has_the_means_of_results_and_the_published_rows() -> None:
    ours = result("ours", 24.0, 0.7, 5.0)
    rows, records = radar_rows([ours], "osediff/realsr")
    assert list(records) == ["psnr", "ssim", "niqe"], "what ours has not is no axis"
    assert rows["ours"] == {"psnr": 24.0, "ssim": pytest.approx(0.7), "niqe": 5.0}
    assert rows["OSEDiff-1"]["niqe"] == 5.6476
    with pytest.raises(UserError, match="in several tables; a chart takes one, such as osediff/realsr"):
        radar_rows([ours], "realsr")
    with pytest.raises(UserError, match="two methods and three metrics"):
        radar_rows([ours], None)


def test_outwards_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    figures.radar(*radar_rows([result("x", 20.0, 0.5, 4.0), result("y", 30.0, 0.9, 8.0)], None), tmp_path / "x.png")
    (first, second) = (line.get_ydata() for line in drawn[0].axes[0].lines[:2])
    assert first == pytest.approx([0.1, 0.1, 1.0, 0.1]), "best only in NIQE, of which less is better"
    assert second == pytest.approx([1.0, 1.0, 0.1, 1.0])


def test_principal_axes_of_points_on_a_line() -> None:
    steps = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    plane, shares = principal_plane(steps[:, None] * torch.tensor([[3.0, 4.0, 0.0]]) + 7)
    assert shares.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert plane[:, 0].abs().tolist() == pytest.approx((5 * steps).abs().tolist(), abs=1e-5)
    assert plane[:, 1].abs().max() < 1e-5


def test_features_are_of_the_middle_block_and_change_with_the_image() -> None:
    images = [scene(72, 80, seed=seed) for seed in (0, 1)]
    features = middle_features(images, "random:d3sr-tiny", 100, 64, seed=0)
    assert features.shape[:2] == (2, 100)
    assert torch.equal(features[:1], middle_features(images[:1], "random:d3sr-tiny", 100, 64, seed=0))
    assert not torch.equal(features[0], features[1])
    with pytest.raises(UserError, match="80 x 72 pixels: --side 128 takes larger ones"):
        middle_features(images, "random:d3sr-tiny", 0, 128, seed=0)


def test_maps_are_of_the_image_and_of_its_edges() -> None:
    image = scene(64, 64)
    rows = edge_maps(image, "oriented")
    own, edges = rows["DISTS"], rows["edges: EA-DISTS"]
    assert np.array_equal(own[0].numpy(), image[0].permute(1, 2, 0).numpy())
    assert torch.equal(edges[0], sobel_magnitude(image)[0].clamp(0, 1).permute(1, 2, 0))
    assert len(own) == len(edges) > 2
    assert all(one.ndim == 2 for one in own[1:])


def test_the_teachers_estimates_are_those_of_one_evaluation() -> None:
    lr, hr = scene(16, 16), scene(64, 64)
    rows = score_images(lr, {"HR": hr}, "random:resshift-micro", [0, 2], seed=0)
    teacher = load_residual_generator("random:resshift-micro")
    with torch.no_grad():
        z_0, z_y = teacher.encode(hr), teacher.encode(teacher.enlarge(lr))
        noise = torch.randn(z_y.shape, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([2])
        z_t = teacher.schedule.q_sample(z_0, z_y, noise, t)
        estimate = conditioned(teacher.unet, lr)(teacher.schedule.scale_input(z_t, t), t)
        expected = teacher.decode(estimate)[0].clamp(0, 1).permute(1, 2, 0)
    assert len(rows["HR"]) == 3
    assert torch.allclose(rows["HR"][2], expected, atol=1e-5)
    with pytest.raises(UserError, match="step 4: 'random:resshift-micro' has the steps 0 to 3"):
        score_images(lr, {"HR": hr}, "random:resshift-micro", [4], seed=0)
    with pytest.raises(UserError, match="HR: 64 x 32 pixels do not belong to an LR image of 16 x 16"):
        score_images(lr, {"HR": hr[..., :32, :]}, "random:resshift-micro", [0], seed=0)


def test_every_figure_is_a_file(tmp_path: Path) -> None:
    for label, values in (("x", (20.0, 0.5, 4.0)), ("y", (30.0, 0.9, 8.0))):
        write_result(tmp_path / f"{label}.json", result(label, *values))
    results = [str(tmp_path / f"{label}.json") for label in "xy"]
    assert run("plot", "radar", *results, "-o", str(tmp_path / "radar.svg"), "--beside", "osediff/realsr") == 0
    assert run("compare", *results, "--plot", str(tmp_path / "radar.png")) == 0
    for folder in ("sr", "hr"):
        save(tmp_path / folder / "a.png", scene(64, 64, seed=len(folder)))
    save(tmp_path / "lr.png", scene(16, 16))
    sets = (str(tmp_path / "sr"), str(tmp_path / "hr"), "--backbone", "random:d3sr-tiny", "--side", "64")
    assert run("plot", "features", *sets, "-o", str(tmp_path / "features.pdf")) == 0
    image = str(tmp_path / "hr" / "a.png")
    assert run("plot", "edges", image, "--features", "oriented", "-o", str(tmp_path / "edges.png")) == 0
    names = ("--teacher", "random:resshift-micro", "--student", "random:resshift-micro", "--steps", "0,3")
    scores = tmp_path / "scores.png"
    assert run("plot", "scores", str(tmp_path / "lr.png"), "--hr", image, *names, "-o", str(scores)) == 0
    for name in ("radar.png", "edges.png", "scores.png"):
        with Image.open(tmp_path / name) as figure:
            assert min(figure.size) > 300
    assert (tmp_path / "radar.svg").read_text(encoding="utf-8").count("OSEDiff-1") == 1
    assert (tmp_path / "features.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plot", "edges", "a.png", "-o", "x.bmp"], "accepted endings: .png, .svg, .pdf"),
        (["plot", "edges", "a.png", "-o", "nowhere/x.png"], "its folder does not exist"),
        (["plot", "edges", "a.png", "--features", "vgg", "-o", "x.png"], "accepted: vgg16, efficientnet-lite0"),
        (["plot", "scores", "a.png", "--steps", "1,x", "-o", "x.png"], "expected whole numbers"),
    ],
)
def test_wrong_figures_are_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert message in capsys.readouterr().err
