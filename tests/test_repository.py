"""Checks on the repository itself: cheap import, one version, recipes that parse, documented commands and limits."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import onestepsr
from onestepsr.imaging import read
from onestepsr.imaging.formats import FORMATS
from onestepsr.train.recipes import load_run, recipe_names

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "onestepsr"
COMMANDS = (
    "upscale",
    "batch",
    "video",
    "train",
    "ablate",
    "evaluate",
    "benchmark",
    "degrade",
    "prompts",
    "serve",
    "models",
    "doctor",
)
HEAVY = ("torch", "diffusers", "peft", "accelerate", "transformers", "PIL", "numpy")


def loaded_by(statement: str) -> set[str]:
    """Heavy packages that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys\nprint(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import onestepsr") == set()


def test_the_command_line_starts_without_torch() -> None:
    assert loaded_by("import onestepsr.cli.main") == set()


def test_help_lists_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from onestepsr.cli.main import main; main(['--help'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in COMMANDS:
        assert f" {command} " in done.stdout


def test_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert onestepsr.__version__ == project["version"]


def test_every_pin_belongs_to_an_accepted_version() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]]
    for requirement in wanted:
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_every_file_beside_the_sources_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["onestepsr"]
    packaged = {path for pattern in patterns for path in SOURCES.glob(pattern)}
    files = {path for path in SOURCES.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(files) > 20
    assert sorted(files - packaged) == []


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_parse(name: str) -> None:
    method = name.partition("-")[0]
    assert load_run(method, name, []).method == method


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a file, those below fields and constants included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip()


def test_docstrings_are_noun_phrases_or_imperatives() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[:60]}"
        for path in sorted(SOURCES.rglob("*.py"))
        for line, text in docstrings(path)
        if re.match(r"(What|How|Whether|Who|Which)\b", text)
    ]
    assert found == []


def test_sources_use_the_terms_of_the_glossary() -> None:
    unwanted = re.compile(r"number format|lonely|Demand|settle\(|getattr\(generator,|\bgrey\b|(?<![\"'])\bpictures?\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in sorted(SOURCES.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if unwanted.search(line)
    ]
    assert found == []


def test_every_environment_variable_is_on_its_page() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    names = set(re.findall(r"ONESTEPSR_[A-Z_]+", sources)) | set(re.findall(r'environ\.get\("(\w+)"', sources))
    assert len(names) >= 8
    assert sorted(name for name in names if f"`{name}`" not in page) == []


def test_limits_of_images_are_on_their_page() -> None:
    page = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    sides = [entry.side_limit for entry in FORMATS.values()]
    for limit in (read.MAX_PIXELS, read.MAX_BYTES, *(n for n in sides if n < 2**31 - 1)):
        assert f"{limit:,}" in page
    for ending in read.EXTENSIONS:
        assert re.search(rf"\{ending}\b", page)


def test_examples_are_attributed() -> None:
    notes = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    images = [path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".jpg", ".png")]
    assert len(images) >= 6
    assert [name for name in images if f"`{name}`" not in notes] == []


def test_the_tour_quotes_the_sources() -> None:
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    sections = re.split(r"^## \d+\. `([^`]+)`", page, flags=re.MULTILINE)[1:]
    quotes = [
        (name, quote)
        for name, text in zip(sections[::2], sections[1::2], strict=True)
        for quote in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    ]
    assert len(quotes) >= 8
    missing = [quote for name, quote in quotes if quote not in (SOURCES / name).read_text(encoding="utf-8")]
    assert missing == []


def test_every_file_has_its_line_in_the_tree() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## The tree")[2]
    listed: list[str] = []
    folders: list[str] = []
    for line in re.findall(r"^( *)([\w.]+/?)(?= {1,}\S)", tree, flags=re.MULTILINE):
        depth, name = len(line[0]) // 2, line[1]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            listed.append("".join(folders) + name)
    files = [str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py")]
    top = ("__init__.py", "__main__.py")
    assert sorted(listed) == sorted(file for file in files if Path(file).name != "__init__.py" or file in top)


PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_name_files_and_code_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "tests", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    ]
    missing = [
        name
        for name in re.findall(r"`([\w/]+\.py)`", text)
        if not any(f"/{file}".endswith(f"/{name}") for file in files)
    ]
    layers = "core|imaging|diffusion|weights|models|losses|inference|prompts|methods|benchmark|evaluate|cli"
    for name in re.findall(rf"`((?:{layers})(?:\.\w+)+)(?:\(\))?`", text):
        parts = name.split(".")
        module = next(
            (n for n in range(len(parts), 1, -1) if SOURCES.joinpath(*parts[:n]).with_suffix(".py").is_file()), 0
        )
        source = SOURCES.joinpath(*parts[:module]).with_suffix(".py").read_text(encoding="utf-8") if module else ""
        if not module or any(not re.search(rf"\b{part}\b", source) for part in parts[module:]):
            missing.append(name)
    assert missing == []


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]  # pytest imports them as top-level modules
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


def test_the_tests_that_the_audit_names_exist() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+(?:\.py)?)`", (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")))
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    known = {*(path.name for path in files), *re.findall(r"def (test_\w+)", tests)}
    assert len(named) > 80
    assert named <= known, named - known
