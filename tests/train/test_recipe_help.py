"""The reference of recipe fields is complete, true to the recipes and to the page in the documentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from onestepsr.cli.main import main
from onestepsr.core.config import to_mapping
from onestepsr.methods.base import method_names
from onestepsr.train.recipe_help import COMMAND, RecipeField, as_markdown, as_text, fields_of, recipe_fields
from onestepsr.train.recipes import load_methods, load_run, recipe_names

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
load_methods()


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group."""

    rate: float = 1.0
    """How fast."""
    choice: Literal["near", "far"] | None = None
    """Which
    one, ``near`` for most."""


@dataclass(frozen=True, kw_only=True)
class Other:
    """Another group; it has other fields."""

    places: tuple[Path, ...] = ()
    """Where."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What is inherited."""

    size: int
    """How large."""
    name: str = "a"
    """Of the base."""


@dataclass(frozen=True, kw_only=True)
class Outer(Base):
    """All kinds of fields."""

    name: str = "b"
    """Of the heir."""
    inner: Inner = field(default_factory=lambda: Inner(rate=2.0))
    """A group that is always there."""
    optional: Inner | None = None
    """A group that may be left out."""
    either: str | Inner | Other = "preset"
    """A name or one of two groups."""
    forgotten: bool = False


def by_path(fields: list[RecipeField]) -> dict[str, RecipeField]:
    return {entry.path: entry for entry in fields}


def without_meaning(fields: list[RecipeField]) -> list[str]:
    return [entry.path for entry in fields if not entry.meaning.strip()]


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a resolved recipe by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def test_types_defaults_and_meanings_come_from_the_source() -> None:
    found = list(fields_of(Outer))
    told = {entry.path: (entry.kind, entry.value, entry.meaning) for entry in reversed(found)}  # the first of a path
    assert told["size"] == ("integer", "required", "How large.")
    assert told["name"] == ("text", "b", "Of the heir.")
    assert told["inner"] == ("group", "", "A group that is always there.")
    assert told["inner.rate"] == ("number", "2.0", "How fast.")
    assert told["inner.choice"] == ("near, far or null", "null", "Which one, `near` for most.")
    assert told["optional"] == ("group or null", "null", "A group that may be left out.")
    assert told["optional.rate"] == ("number", "1.0", "How fast.")
    assert told["either"] == ("text or group", "preset", "A name or one of two groups.")
    assert told["either.choice"][1] == "null"
    introduced = [entry.meaning for entry in found if entry.kind == "one such group"]
    assert introduced == ["A group.", "Another group; it has other fields."]
    assert told["either.places"] == ("list of paths", "[]", "Where.")


def test_values_of_a_recipe_replace_defaults_and_unused_groups_are_left_out() -> None:
    values = Outer(size=3, either=Other(places=(Path("here"),)))
    found = list(fields_of(Outer, values=values, recipe=True))
    assert by_path(found)["size"].value == "3"
    groups = ["inner", "inner.rate", "inner.choice", "optional", "either", "either.places"]
    assert [entry.path for entry in found] == ["size", "name", *groups, "forgotten"]
    assert "\neither.places  [here]                    list of paths\n    Where.\n" in as_text(found)


def test_a_field_without_a_docstring_is_found() -> None:
    assert without_meaning(list(fields_of(Outer))) == ["forgotten"]


@pytest.mark.parametrize("method", method_names())
def test_every_field_of_every_method_says_what_it_means(method: str) -> None:
    assert without_meaning(recipe_fields(method)) == []


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_of_every_recipe_has_its_field(name: str) -> None:
    run = load_run(name.partition("-")[0], name)
    found = by_path(recipe_fields(run.method, run))
    for path, value in leaves(to_mapping(run)).items():
        entry = found.get(path) or found[path.rpartition(".")[0]]  # weights by name stand in one field
        shown = yaml.safe_load(entry.value)
        assert shown == value or shown[path.rpartition(".")[2]] == value, path


@pytest.mark.parametrize(
    ("method", "path", "value"),
    [
        ("osediff", "config.perceptual.distance", "lpips"),
        ("resshift", "config.perceptual.features", "vgg16"),
        ("resshift", "config.denoiser.widths", "[48, 64, 96]"),
        ("tadsr", "config.discriminator.head.slope", "0.2"),
        ("d3sr", "config.extras.deepen.down_blocks", "null"),
        ("d3sr", "config.discriminator.adaptive.target", "0.6"),
        ("sinsr", "config.teacher", "required"),
        ("autoencoder", "train.optimizer.betas", "[0.9, 0.999]"),
        ("autoencoder", "data.degradation.gray_target", "true"),
        ("autoencoder", "data.degradation.second.kernels.sigma", "[0.2, 1.5]"),
    ],
)
def test_defaults_of_groups_within_groups(method: str, path: str, value: str) -> None:
    assert by_path(recipe_fields(method))[path].value == value


def test_the_page_in_the_documentation_is_what_the_command_prints() -> None:
    fresh = as_markdown()
    assert PAGE.read_text(encoding="utf-8") == fresh, f"write it again: {COMMAND} > docs/recipes.md"
    assert f"`{COMMAND} > docs/recipes.md`" in fresh


def test_the_page_has_every_field_of_every_method() -> None:
    page = as_markdown()
    for method in method_names():
        section = page.partition(f"## `config` of {method}\n")[2].partition("\n## ")[0]
        for entry in recipe_fields(method):
            assert f"| `{entry.path}` |" in (section if entry.path.startswith("config.") else page), entry.path


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments])
    said = capsys.readouterr()
    assert end.value.code == code
    return said.err if code else said.out


def test_the_command_explains_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "d3sr", "--fields").splitlines()
    index = next(index for index, line in enumerate(lines) if line.startswith("config.timestep "))
    assert lines[index].split() == ["config.timestep", "399", "integer"]
    assert lines[index + 1] == "    T_L, the fixed step of the UNet evaluation."
    assert lines[index].index("399") == next(line for line in lines if line.startswith("train.steps ")).index(
        "required"
    )


def test_the_command_shows_the_values_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "d3sr", "train.steps=7", "--recipe", "d3sr-tiny-sharp", "--fields")
    values = {line.split()[0]: line.split()[1] for line in shown.splitlines() if line[:1] not in ("", " ")}
    assert values["train.steps"] == "7"
    assert values["train.optimizers.critic.lr"] == "0.0004"
    assert values["config.extras.critic.matching"] == "2.0"
    assert "config.extras.deepen.down_blocks" not in values


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--fields") == as_markdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d3rs"], "unknown method 'd3rs': did you mean 'd3sr'"),
        (["d3sr", "train.steps=7"], "add --recipe FILE|NAME to see its values"),
        (["--recipe", "d3sr-tiny"], "--recipe needs a METHOD"),
        (["osediff", "--recipe", "d3sr-tiny"], "is for method 'd3sr', not 'osediff'"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in output(capsys, *arguments, "--fields", code=2)
