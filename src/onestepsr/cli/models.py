"""``onestepsr models``: list, describe, download, verify and convert models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from onestepsr.cli.options import refuse
from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from onestepsr.weights.catalog import ModelSpec

SCHEMA = 1
PARTS = ("generator", "discriminator")
FORMATS = ("safetensors", "osediff-pkl")
POSTERIORS = ("mean", "sample")
DTYPES = ("float32", "bfloat16", "float16")
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

models = typer.Typer(help="List, describe, download, verify and convert models.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    app.add_typer(models, name="models")


@models.command(name="list")
def list_command(as_json: JsonFlag = False) -> None:
    """List every model by kind, the default upscaler first, with the state of its weights."""
    from onestepsr.weights.catalog import list_models

    specs = list_models()
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "models": [_row(spec) for spec in specs]}, indent=2))
        return
    for kind in dict.fromkeys(spec.kind for spec in specs):
        typer.echo(f"{kind}s:")
        chosen = [spec for spec in specs if spec.kind == kind]
        width = max(len(spec.id) for spec in specs)
        for spec in chosen:
            factor = f"x{spec.scale}, " if kind == "upscaler" else ""
            typer.echo(f"  {spec.id:<{width}}  {spec.summary} [{factor}{spec.licence}, {spec.state}]")


@models.command()
def info(
    model: Annotated[str, typer.Argument(help="Name of a model, or path of a .safetensors file of ours.")],
    as_json: JsonFlag = False,
) -> None:
    """Describe MODEL without downloading it: what it is for, licence, file, addresses, parameters, configuration."""
    described = _describe(model)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, **described}, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(described, sort_keys=False, width=100), nl=False)


@models.command()
def download(names: Annotated[list[str], typer.Argument(help="Models to fetch, for example sd21-base vgg16.")]) -> None:
    """Bring the weights of models into the cache; what is there is read through, and replaced if damaged.

    A download that was interrupted goes on where it stopped if its server allows that; one from the Hugging Face hub
    begins again. ONESTEPSR_CACHE names the cache, ONESTEPSR_MIRROR a folder or an address to ask first, and
    ONESTEPSR_OFFLINE=1 forbids the network.
    """
    from onestepsr.weights.catalog import get_model

    specs = [get_model(name) for name in dict.fromkeys(names)]
    _for_each(specs, _download)


@models.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models to check; by default all whose weights are on this machine.")
    ] = None,
) -> None:
    """Check the weights of models against their SHA-256, and that upscalers load."""
    from onestepsr.weights.catalog import get_model, list_models

    if names:
        specs = [get_model(name) for name in dict.fromkeys(names)]
    else:
        specs = [spec for spec in list_models() if spec.is_here]
    _for_each(specs, _verify)


@models.command()
def convert(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="Backbone: diffusers folder, single-file checkpoint, name, or a file of ours. Or a published model of "
            "the ResShift family: its name, or its UNet's file with --as. Or OSEDiff's weights: name or file. Or "
            "SeeSR's folder, with unet and controlnet."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pkl with --to osediff-pkl.")],
    *,
    part: Annotated[
        str, typer.Option(help="generator: the whole backbone; discriminator: the half UNet that one is made of.")
    ] = "generator",
    published_as: Annotated[
        str | None, typer.Option("--as", help="Published model that SOURCE is, for example resshift-realsr-v3.")
    ] = None,
    autoencoder: Annotated[
        Path | None, typer.Option(help="File of its autoencoder; by default the one of the published model.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Of OSEDiff's weights: what they are added to; by default sd21-base. Of SeeSR: the diffusers folder "
            "of Stable Diffusion 2-base or 2.1-base, with its text encoder."
        ),
    ] = None,
    prompt_embedding: Annotated[
        Path | None, typer.Option(help="Of OSEDiff: file of the embedding for images that come without a prompt.")
    ] = None,
    posterior: Annotated[
        str | None,
        typer.Option(help="Of OSEDiff: its encoder gives the mean (the default), or a sample that --seed decides."),
    ] = None,
    to: Annotated[
        str, typer.Option(help="safetensors: a file of ours. osediff-pkl: OSEDiff's adapters as it publishes them.")
    ] = "safetensors",
    towards: Annotated[
        Path | None,
        typer.Option(help="A second backbone or generator of the same shape: the weights written lie between the two."),
    ] = None,
    share: Annotated[float, typer.Option(help="How far towards it, 0 to 1.")] = 0.5,
    even_contrast: Annotated[
        bool,
        typer.Option(
            "--even-contrast",
            help="For a generator on the tiny backbone: make detail equally strong at all 4x4 pixels of a latent "
            "position, measured in every image anew.",
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET if it exists.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the backbone or published model SOURCE as one weights file of ours, TARGET, and load that as a proof."""
    _check_choice("--part", part, PARTS)
    _check_choice("--posterior", posterior, POSTERIORS)
    _check_choice("--dtype", dtype, DTYPES)
    _check_choice("--to", to, FORMATS)
    if towards is None:
        refuse(context, ["share"], "needs --towards")
    if to == "osediff-pkl":
        own = ("source", "target", "to", "overwrite", "as_json")
        others = [str(each.name) for each in context.command.params if each.name not in own]
        refuse(context, others, "does nothing with --to osediff-pkl, which writes adapters as they are")
    import torch

    from onestepsr.models.convert import convert as write
    from onestepsr.models.convert import convert_to_published

    if to == "osediff-pkl":
        done = convert_to_published(source, target, overwrite=overwrite)
    else:
        done = write(
            source,
            target,
            part=cast(Any, part),
            published_as=published_as,
            autoencoder=autoencoder,
            backbone=backbone,
            prompt_file=prompt_embedding,
            posterior=cast(Any, posterior),
            seesr_prompts=_seesr_prompts(source, backbone),
            towards=towards,
            share=share,
            even_contrast=even_contrast,
            dtype=getattr(torch, dtype),
            overwrite=overwrite,
        )
    if as_json:
        document = {"schema": SCHEMA, "file": str(done.file), "architecture": done.architecture}
        typer.echo(json.dumps(document | {"parameters": done.parameters, "bytes": done.bytes}, indent=2))
    else:
        typer.echo(f"{done.file}: {done.architecture}, {done.parameters:,} parameters, {done.bytes:,} bytes")


def _seesr_prompts(source: str, backbone: str | None) -> tuple[Tensor, Tensor] | None:
    """Embeddings of the empty text and of the negative prompt, if SOURCE is SeeSR and its backbone a folder."""
    from onestepsr.models.seesr.generator import NEGATIVE_PROMPT, looks_published

    if not looks_published(source) or backbone is None or not Path(backbone).is_dir():
        return None
    from onestepsr.prompts.embedder import PromptEmbedder

    empty, negative = PromptEmbedder(backbone).embed(["", NEGATIVE_PROMPT])
    return empty[None], negative[None]


def _check_choice(option: str, value: str | None, accepted: Sequence[str]) -> None:
    if value is not None and value not in accepted:
        raise UserError(f"{option} '{value}': accepted: {', '.join(accepted)}")


def _for_each(specs: list[ModelSpec], action: Callable[[ModelSpec], str]) -> None:
    """Act on every model and print the result; the failure of one of several is reported, and the rest is done."""
    failed = 0
    for spec in specs:
        try:
            typer.echo(f"{spec.id}: {action(spec)}")
        except UserError as error:
            if len(specs) == 1:
                raise
            typer.echo(f"failed: {error}", err=True)
            failed += 1
    if failed:
        typer.echo(f"{failed} of {len(specs)} models failed", err=True)
        raise typer.Exit(1)


def _download(spec: ModelSpec) -> str:
    from onestepsr.weights.download import download_all

    if not spec.files:
        return f"{spec.state}, nothing to download"
    return ", ".join(map(str, download_all(spec.downloads, replace=True)))


def _verify(spec: ModelSpec) -> str:
    from onestepsr.models.loading import load_generator
    from onestepsr.weights.catalog import verify

    checksum = verify(spec.id)
    if spec.kind == "upscaler":
        load_generator(spec.id)
    return f"ok, {f'sha256 {checksum}' if checksum else 'no weights'}"


def _row(spec: ModelSpec) -> dict[str, Any]:
    scale = spec.scale if spec.kind == "upscaler" else None
    row = {"id": spec.id, "kind": spec.kind, "summary": spec.summary, "licence": spec.licence, "scale": scale}
    return row | {"state": spec.state}


def _describe(model: str) -> dict[str, Any]:
    from onestepsr.weights.catalog import list_models
    from onestepsr.weights.download import has_cache_folder

    described: dict[str, Any] = {"model": model}
    spec = {spec.id: spec for spec in list_models()}.get(model)
    if spec is None:
        return described | _describe_weights(model)
    described |= {"kind": spec.kind, "summary": spec.summary, "licence": spec.licence}
    described |= {"licence_url": spec.licence_url, "notice": spec.notice} if spec.licence_url else {}
    described |= {"use": spec.use} if spec.use else {}
    described |= {"state": spec.state}
    if spec.bundled:
        return described | _describe_weights(model)
    files = [
        {
            "file": str(each.path) if has_cache_folder() else each.place,
            "bytes": each.bytes,
            "sha256": each.sha256,
            "sources": list(each.urls),
        }
        | ({"named_at": each.unlinked} if each.unlinked else {})
        | ({"made_by": each.made_by} if each.made_by else {})
        for each in spec.downloads
    ]
    return described | ({"files": files} if len(files) > 1 else dict(*files))


def _describe_weights(model: str) -> dict[str, Any]:
    from onestepsr.core.files import file_sha256
    from onestepsr.weights.catalog import resolve
    from onestepsr.weights.files import read_weights

    path = resolve(model)
    architecture, config, tensors = read_weights(path)
    return {
        "architecture": architecture,
        "parameters": _count(architecture, config, tensors),
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "config": config,
    }


def _count(architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """Parameters of the network without its buffers; of an unknown architecture, all values in the file."""
    import torch

    from onestepsr.models.architectures import ARCHITECTURES, build_network

    if architecture not in ARCHITECTURES:
        return sum(tensor.numel() for tensor in tensors.values())
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in tensors.items()}
        network = build_network(architecture, config, architecture, shapes)
    return sum(parameter.numel() for parameter in network.parameters())
