"""``onestepsr export``: a model as files of another engine or library, compared with the model before it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from onestepsr.core.errors import UserError

SCHEMA = 1
FORMATS = ("onnx", "openvino", "ncnn", "torch", "diffusers")
DTYPES = ("float32", "float16")


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("export")(export)


def export(
    model: Annotated[str, typer.Argument(help="Model alias or file, or random:NAME.")],
    out: Annotated[Path, typer.Argument(help="Folder for the files, which is made if it is missing.")],
    *,
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(FORMATS)}.")],
    dtype: Annotated[str, typer.Option(help="Weights in float32 or float16.")] = "float32",
    fidelity: Annotated[
        float | None, typer.Option(help="For d3sr-tiny: 0 (crisp) to 1 (faithful), fixed in the file.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Photo for the comparison, beside the packaged one; may be repeated.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference, of values in [0, 1]; by default that of the format.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Write MODEL as files for another engine into OUT, run these, and compare them with the model.

    onnx is for onnxruntime, chaiNNer and others; openvino for Intel; ncnn for Upscayl and realesrgan-ncnn-vulkan; torch
    for torch.export in C++; diffusers a folder with a pipeline, of models on Stable Diffusion. The comparison is on
    noise and photos at three odd sizes. Exit code 1 if a value differs by more than the tolerance; the files stay.
    """
    for option, value, accepted in (("--to", to, FORMATS), ("--dtype", dtype, DTYPES)):
        if value not in accepted:
            raise UserError(f"{option} '{value}': accepted: {', '.join(accepted)}")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise UserError(f"{out}: {'a file' if out.is_file() else 'not empty'}; name a new folder, or add --overwrite")
    for photo in image or ():
        if not photo.is_file():
            raise UserError(f"--image {photo}: no such file")

    import torch

    from onestepsr.export.diffusers_folder import load_trained
    from onestepsr.export.formats import TOLERANCES, compare, export_generator
    from onestepsr.models.loading import load_generator
    from onestepsr.weights.catalog import list_models

    if to == "diffusers" and fidelity is not None:
        raise UserError("--fidelity: for d3sr-tiny, which is no model on Stable Diffusion")
    generator = load_trained(model) if to == "diffusers" else load_generator(model, fidelity=fidelity, faster=False)
    licence = next((spec.licence for spec in list_models() if spec.id == model), "")
    kind = getattr(torch, dtype)
    exported = export_generator(generator, model, to, out, licence=licence, dtype=kind)  # type: ignore[arg-type]
    if dtype != "float32":
        generator = load_generator(model, fidelity=fidelity, faster=False)  # the exporter has rounded the first
    largest = TOLERANCES[to, kind] if tolerance is None else tolerance
    found = compare(exported, generator, image or ())
    passed = all(one.difference <= largest for one in found)
    if as_json:
        document: dict[str, Any] = {"schema": SCHEMA, "model": model, "format": to, "dtype": dtype}
        document |= {"files": [str(path) for path in exported.files], "tolerance": largest, "equal": passed}
        rows = [{"image": one.image, "size": list(one.size), "difference": one.difference} for one in found]
        typer.echo(json.dumps(document | {"comparisons": rows}, indent=2))
    else:
        for path in exported.files:
            typer.echo(f"{path}  {path.stat().st_size:,} bytes")
        for one in found:
            verdict = "ok" if one.difference <= largest else "OFF"
            typer.echo(f"  {one.image} {one.size[1]}x{one.size[0]}: largest difference {one.difference:.1e}  {verdict}")
        typer.echo(f"tolerance {largest:g}: {'equal' if passed else 'NOT equal'}")
    if not passed:
        raise typer.Exit(1)
