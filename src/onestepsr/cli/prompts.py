"""``onestepsr prompts``: write a text about each photo of a folder, for training and for ``--prompt-file``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onestepsr.core.errors import UserError
from onestepsr.core.files import write_text
from onestepsr.core.progress import progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("prompts", no_args_is_help=True)(prompts)


def prompts(
    folder: Annotated[Path, typer.Argument(help="Folder of photos; its sub-folders count.")],
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Receives NAME.txt for NAME.jpg, for data.prompts.")],
    prompt_from: Annotated[
        str, typer.Option(help="Captioner or tagger that looks at each photo: a folder, blip, dape, or owner/name.")
    ] = "dape",
    low_resolution: Annotated[
        bool,
        typer.Option("--lr", help="These are LR images: OSEDiff's tagger sees them enlarged 4 times, as at inference."),
    ] = False,
    named_after: Annotated[
        Path | None, typer.Option(help="Name the texts after the photos in this folder, matched as evaluate does.")
    ] = None,
    otherwise: Annotated[
        str, typer.Option(help="Text of a photo in which nothing is recognised; without it, that photo fails.")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Look again at photos that have a text.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Write a text about each photo of FOLDER; photos that have one are left alone, so that the command continues.

    Ends with exit code 1 if a photo could not be read, or nothing was recognised in it.
    """
    from onestepsr.imaging.read import read_image, to_pil
    from onestepsr.inference.devices import resolve_device
    from onestepsr.prompts.sources import load_extractor

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, expected a folder")
    images = _named(folder, named_after)
    waiting = {name: path for name, path in images.items() if overwrite or not (out / f"{name}.txt").is_file()}
    extractor = load_extractor(prompt_from, resolve_device(device), scale=4 if low_resolution else 1)
    failed = 0
    for name, path in progress(list(waiting.items()), "Looking", line=lambda item: item[0]):
        try:
            text = extractor.describe(to_pil(read_image(path)).convert("RGB")) or otherwise
        except UserError as error:
            typer.echo(f"failed: {error}", err=True)
            failed += 1
            continue
        if text.strip():
            write_text(out / f"{name}.txt", text + "\n")
        else:
            typer.echo(f"failed: {path}: nothing was recognised; --otherwise gives such photos a text", err=True)
            failed += 1
    typer.echo(f"{len(images) - failed} of {len(images)} photos have a text in {out}")
    if failed:
        raise typer.Exit(1)


def _named(folder: Path, named_after: Path | None) -> dict[str, Path]:
    """The images by the names of their texts, which training and ``--prompt-file`` look for whatever the folder is."""
    from onestepsr.data.photos import find_images
    from onestepsr.evaluate.pairing import pair_by_name

    if named_after is None:
        pairs = [(path.stem, path) for path in find_images(folder)]
    else:
        found = pair_by_name(folder, named_after)
        if found.unmatched:
            raise UserError(f"{found.unmatched[0]}: no photo in {named_after} has this name")
        pairs = [(case.hr.stem, case.path) for case in found.cases if case.hr is not None]
    images: dict[str, Path] = {}
    for name, path in pairs:
        if name in images:
            raise UserError(f"{path} and {images[name]}: texts are found by name, which has to differ; rename one")
        images[name] = path
    return images
