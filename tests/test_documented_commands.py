"""Every command that a page, a recipe or a suite shows: it parses, and the settings that it names resolve."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from onestepsr.benchmark.complexity import NETWORKS
from onestepsr.cli.main import app
from onestepsr.evaluate.metrics.catalog import METRICS, select_metrics
from onestepsr.evaluate.protocols import get_protocol
from onestepsr.evaluate.tables import find_published
from onestepsr.models.architectures import RANDOM_GENERATORS, is_random
from onestepsr.train.ablation import load_suite, plan_runs
from onestepsr.train.recipes import load_run
from onestepsr.weights.catalog import list_models

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "architecture.md")  # its tree describes commands
YAML = [path for kind in ("recipes", "suites") for path in sorted((ROOT / "src" / "onestepsr" / kind).glob("*.yaml"))]
NAMES = "upscale|train|ablate|evaluate|benchmark|degrade|prompts|serve|video|batch|models|doctor"
COMMAND = re.compile(rf"(?:^|[\s;|(])onestepsr ((?:{NAMES})\b.*)")
BLOCK, INLINE = re.compile(r"```(?:bash|sh)?\n(.*?)```", re.DOTALL), re.compile(r"(?<!`)`(?!`)([^`]+)`")
OWN_FILES = re.compile(r"SUITE|VARIANT|METHOD|\bNAME\b|\.\.\.")
"""Words of a command that stands for many."""


def shown(path: Path) -> Iterator[str]:
    """Arguments of the commands in fenced blocks and inline code of a page, or in the comments of a YAML file."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.suffix == ".md":
        lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
        lines += [" ".join(code.split()) for code in INLINE.findall(BLOCK.sub("", text))]
    else:
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    for line in lines:
        found = COMMAND.search(line)
        if found and not OWN_FILES.search(line):
            yield found[1].partition(" | ")[0].partition(" > ")[0].partition("; ")[0]


COMMANDS = sorted({(path.relative_to(ROOT).as_posix(), command) for path in [*PAGES, *YAML] for command in shown(path)})


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Name of the command and its parameters, read by the command line's own parser; nothing is run."""
    command: Any = typer.main.get_command(app)
    name, context = "", command.make_context("onestepsr", list(words), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        if not rest:  # a group alone shows its help
            return name, {}
        own, command, rest = command.resolve_command(context, rest)
        name = f"{name} {own}".strip()
        context = command.make_context(own, rest, parent=context)
    return name if context.command is command else context.info_name, context.params


def test_there_are_many_commands_and_the_results_pages_have_theirs() -> None:
    assert len(COMMANDS) > 120
    pages = {page for page, _ in COMMANDS}
    assert {f"docs/results/{name}.md" for name in ("d3sr-tiny-losses", "tadsr-tiny", "complexity", "speed")} <= pages


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_documented_command_resolves(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONESTEPSR_OFFLINE", "1")
    words = [word for word in shlex.split(command, comments=True) if word != "--help"]
    if len(words) == 1 and words[0] != "doctor":  # the name of a command in a sentence
        return
    try:
        _, given = parsed(words)
    except Exception as error:
        if type(error).__name__ == "MissingParameter" and len(words) < 5:  # options in a sentence, without a folder
            return
        raise
    if given.get("method"):
        if given["recipe"] is not None:
            load_run(given["method"], given["recipe"], given["overrides"] or [])
    elif given.get("suite"):
        suite = load_suite(given["suite"], given["settings"] or [])
        plan_runs(suite, suite.chosen(given["only"].split(",") if given["only"] else []), [0], Path("out"))
    if given.get("metrics") not in (None, "help"):
        select_metrics(given["metrics"].split(","), with_reference=True)
    if given.get("protocol"):
        assert set(get_protocol(given["protocol"]).metrics) <= set(METRICS)
    if given.get("beside"):
        find_published(given["beside"])
    models = given.get("model") or []
    for model in [models] if isinstance(models, str) else models:
        known = {spec.id for spec in list_models()}
        file = Path(model).suffix != "" or "/" in model  # of the reader's own
        assert file or model in known or model in NETWORKS or (is_random(model) and model[7:] in RANDOM_GENERATORS), (
            model
        )


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "results").glob("*.md")), ids=lambda path: path.stem)
def test_a_results_page_says_where_its_command_starts_today(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for base in re.findall(r"Base recipe `([\w-]+)` with", text):
        suite = load_suite(page.stem, ["validation=elsewhere"])
        today = f"Today the command starts from `{suite.config.recipe}`"
        assert suite.config.recipe == base or today in text
