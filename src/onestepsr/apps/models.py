"""``onestepsr models``: which models there are, what a weights file holds, whether it is unaltered."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

models = typer.Typer(help="List, describe and verify models.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    app.add_typer(models, name="models")


@models.command(name="list")
def list_command(as_json: JsonFlag = False) -> None:
    """Name every model, the default one first."""
    from onestepsr.models.registry import list_models

    specs = list_models()
    if as_json:
        rows = [{"id": s.id, "summary": s.summary, "licence": s.licence, "scale": s.scale} for s in specs]
        typer.echo(json.dumps({"schema": 1, "models": rows}, indent=2))
        return
    for spec in specs:
        typer.echo(f"{spec.id}  x{spec.scale}  {spec.licence}  {spec.summary}")


@models.command()
def info(
    model: Annotated[str, typer.Argument(help="Name of a model, or path of a .safetensors file of ours.")],
    as_json: JsonFlag = False,
) -> None:
    """Describe MODEL: architecture, parameters, configuration, licence and where its weights are."""
    described = _describe(model)
    if as_json:
        typer.echo(json.dumps({"schema": 1, **described}, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(described, sort_keys=False, width=100), nl=False)


@models.command()
def verify(names: Annotated[list[str] | None, typer.Argument(help="Models to check; all by default.")] = None) -> None:
    """Check the weights of models against their SHA-256, and that they load."""
    from onestepsr.models import registry

    for name in names or [spec.id for spec in registry.list_models()]:
        checksum = registry.verify(name)
        registry.load_generator(name)
        typer.echo(f"{name}: ok, {f'sha256 {checksum}' if checksum else 'no weights'}")


def _describe(model: str) -> dict[str, Any]:
    from onestepsr.models import registry

    path = registry.resolve(model)
    architecture, config, tensors = registry.read_weights(path)
    described: dict[str, Any] = {"model": model}
    specs = {spec.id: spec for spec in registry.list_models()}
    if model in specs:
        described |= {"summary": specs[model].summary, "licence": specs[model].licence}
    return described | {
        "architecture": architecture,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": registry.file_sha256(path),
        "config": config,
    }
