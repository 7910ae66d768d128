"""``onestepsr evaluate plot``: the papers' figures of analysis, from images and models of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    help="Draw the papers' figures of analysis; needs pip install 'onestepsr[plots]'.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Out = Annotated[Path, typer.Option("-o", "--out", help="File of the figure: .png, .svg or .pdf.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]


@app.command(no_args_is_help=True)
def radar(
    files: Annotated[list[Path], typer.Argument(help="Files of 'onestepsr evaluate --json'.")],
    *,
    out: Out,
    beside: Annotated[
        str | None, typer.Option(help="Draw published rows too: a table and a dataset, such as osediff/realsr.")
    ] = None,
) -> None:
    """Draw metrics as a radar chart, as OSEDiff's Fig. 1: outwards is better, from the worst to the best shown."""
    from onestepsr.evaluate import figures
    from onestepsr.evaluate.result import read_result

    figures.check_figure(out, "--out")
    figures.radar(*figures.radar_rows([read_result(path) for path in files], beside), out)


@app.command(no_args_is_help=True)
def features(
    sr: Annotated[Path, typer.Argument(help="Folder of super-resolved images.")],
    hr: Annotated[Path, typer.Argument(help="Folder of real images.")],
    *,
    out: Out,
    backbone: Annotated[str, typer.Option(help="Whose UNet looks: sd21-base, or a model or file.")] = "sd21-base",
    timestep: Annotated[int, typer.Option(min=0, max=999, help="Diffusion step of the noise; 0 adds none.")] = 0,
    side: Annotated[int, typer.Option(min=64, help="Central square of each image that is looked at.")] = 512,
    images: Annotated[int, typer.Option(min=1, help="Images of each folder, the first ones.")] = 8,
    seed: Seed = 0,
) -> None:
    """Draw middle-block features of real and super-resolved images on two principal axes, as D3SR's Fig. 3."""
    from onestepsr.data.photos import find_images
    from onestepsr.evaluate import figures

    figures.check_figure(out, "--out")
    sides = [[_image(path) for path in find_images(folder)[:images]] for folder in (hr, sr)]
    real, made = (figures.middle_features(own, backbone, timestep, side, seed) for own in sides)
    title = f"{backbone}, step {timestep}: first {real.shape[1]} channels of the middle block"
    figures.features_figure(real, made, out, title=title)


@app.command(no_args_is_help=True)
def edges(
    image: Annotated[Path, typer.Argument(help="One image.")],
    *,
    out: Out,
    features: Annotated[str, typer.Option(help="Feature network: vgg16, efficientnet-lite0 or oriented.")] = "vgg16",
) -> None:
    """Draw the feature maps behind DISTS and EA-DISTS, as D3SR's Fig. 4: of an image and of its edges."""
    from onestepsr.evaluate import figures

    figures.check_figure(out, "--out")
    known = ("vgg16", "efficientnet-lite0", "oriented")
    if features not in known:
        raise UserError(f"--features {features}: accepted: {', '.join(known)}")
    rows = figures.edge_maps(_image(image), features)
    count = len(next(iter(rows.values())))
    figures.grid_figure(rows, ["input", *(f"map {number}" for number in range(1, count))], out)


@app.command(no_args_is_help=True)
def scores(
    lr: Annotated[Path, typer.Argument(help="The LR image.")],
    *,
    out: Out,
    teacher: Annotated[str, typer.Option(help="ResShift model that judges: name or file.")] = "resshift-realsr-v1",
    student: Annotated[str, typer.Option(help="One-step model whose result is judged: name or file.")] = "sinsr",
    hr: Annotated[Path | None, typer.Option(help="The HR image, for a row of its own.")] = None,
    steps: Annotated[str, typer.Option(help="Diffusion steps of the noise, counted from 0.")] = "0,2,5,9,13",
    seed: Seed = 0,
) -> None:
    """Draw what the teacher makes of noised results of student and teacher, as TAD-SR's Fig. 2."""
    import torch

    from onestepsr.evaluate import figures
    from onestepsr.models.loading import load_generator

    figures.check_figure(out, "--out")
    words = [word.strip() for word in steps.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--steps {steps}: expected whole numbers separated by commas")
    low, images = _image(lr), {}
    for label, name in (("student", student), ("teacher", teacher)):
        images[label] = load_generator(name)(low, rng=torch.Generator().manual_seed(seed)).float().clamp(0, 1)
    if hr is not None:
        images["HR"] = _image(hr)
    rows = figures.score_images(low, images, teacher, [int(word) for word in words], seed)
    figures.grid_figure(rows, ["result", *(f"t = {word}" for word in words)], out)


def _image(path: Path) -> Tensor:
    """An image file as RGB (1, 3, H, W) in [0, 1]."""
    from onestepsr.imaging.read import read_image, samples_to_tensor, to_eight_bits

    return samples_to_tensor(to_eight_bits(read_image(path)).pixels).expand(-1, 3, -1, -1)
