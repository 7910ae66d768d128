"""Change single expressions of losses, methods and schedules, and report the changes that no test notices.

    python scripts/mutate.py losses diffusion
    python scripts/mutate.py methods/d3sr.py methods/shared/vsd.py:115-140 --count 40 --seed 1

Targets are folders, files or lines of files below ``src/onestepsr``; without any, the three folders. A mutant differs
in one place of the syntax tree: an arithmetic sign, a constant, a comparison, a lost or an added ``detach``, a lost
``no_grad``, two swapped arguments. It runs in a temporary copy with the tests that import its module, or a module that
imports it, until the first failure or the time limit, which also counts as noticed. Exits with 1 if a mutant survives.
Mutants that compute the same are listed in ``EQUIVALENT``. The same seed selects the same mutants.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/onestepsr"
FOLDERS = ("losses", "diffusion", "methods")
PRELOADED = ("numpy", "pytest", "safetensors.torch", "scipy.signal", "torch", "diffusers", "peft", "accelerate")
"""Imported once, before a process is forked for each mutant; nothing of the package is."""
TENSORS = re.compile(r"(z|x|sr|fake|real|eps|gradient|estimate|target|logits|z_\w+|x0\w*|eps_\w+|\w+_logits)$")
"""Names that tensors have in these folders: their ``detach`` is a mutant wherever they are passed on."""
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARISON = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NO_GRAD = "torch.no_grad()"
SYMMETRIC = {"F.mse_loss", "F.l1_loss", "noise_prediction_loss"}
"""Functions whose first two arguments may change places; those of min and max may all."""
SHAPES = {
    "self._at",
    "self.coefficients",
    "expand_as",
    "noise",
    "random.normal",
    "torch.zeros_like",
    "torch.full_like",
    "len",
}
"""Functions that read shape, dtype and device of a tensor and not its values."""
EQUIVALENT: dict[tuple[str, str], str] = {
    ("losses/perceptual.py", f"{name}(features, {x}, {y}) -> {name}(features, {y}, {x})"): "the distance is symmetric"
    for name in ("lpips", "dists")
    for x, y in (("x", "y"), ("edges_x", "edges_y"))
} | {("losses/perceptual.py", "self._unit(target) -> self._unit(target.detach())"): "the result is detached"}
"""(file, change) of mutants that compute the same numbers, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one file."""

    file: str
    """Path below the package."""
    line: int
    change: str
    """Source before -> after."""
    source: str
    """Text of the changed file."""


# ---- Mutants of a syntax tree ----------------------------------------------------------------------------------------


def sites(tree: ast.Module) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """Nodes that are executed, with the nodes that may replace each of them."""
    skipped = {id(node) for owner in ast.walk(tree) for root in _not_executed(owner) for node in ast.walk(root)}
    constant = {id(node) for owner in ast.walk(tree) if _is_without_graph(owner) for node in ast.walk(owner)}
    for node in ast.walk(tree):
        if id(node) not in skipped:
            yield node, list(_replacements(node, graph=id(node) not in constant))


def _is_without_graph(owner: ast.AST) -> bool:
    """Tell whether ``owner`` is a ``no_grad`` block or function, in which ``detach`` changes nothing."""
    if isinstance(owner, ast.With):
        return ast.unparse(owner.items[0].context_expr) == NO_GRAD
    return isinstance(owner, ast.FunctionDef) and NO_GRAD in map(ast.unparse, owner.decorator_list)


def _not_executed(owner: ast.AST) -> Iterator[ast.AST]:
    """Parts of ``owner`` in which a change is none of the arithmetic: annotations, documentation, messages."""
    if isinstance(owner, ast.AnnAssign | ast.arg) and owner.annotation is not None:
        yield owner.annotation
    if isinstance(owner, ast.FunctionDef):
        yield from filter(None, [owner.returns])
    if isinstance(owner, ast.Raise | ast.JoinedStr | ast.ImportFrom | ast.Assert):
        yield owner
    if isinstance(owner, ast.FunctionDef | ast.ClassDef):
        yield from (decorator for decorator in owner.decorator_list if isinstance(decorator, ast.Call))
    if isinstance(owner, ast.Expr) and isinstance(owner.value, ast.Constant):
        yield owner
    if isinstance(owner, ast.Call) and ast.unparse(owner.func) in ("zip", "cast", "error_context"):  # strict=True
        yield from owner.keywords


def _replacements(node: ast.AST, *, graph: bool) -> Iterator[ast.AST]:
    changed = copy.deepcopy(node)
    match changed:
        case ast.BinOp() if type(changed.op) in ARITHMETIC and not _is_text(changed):
            changed.op = ARITHMETIC[type(changed.op)]()
            yield changed
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield changed.operand
        case ast.Compare():
            for index, operator in enumerate(changed.ops):
                other = copy.deepcopy(changed)
                other.ops[index] = COMPARISON[type(operator)]()
                yield other
        case ast.BoolOp():
            changed.op = ast.Or() if isinstance(changed.op, ast.And) else ast.And()
            yield changed
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.With() if _is_without_graph(changed):
            changed.items[0].context_expr = ast.parse("torch.enable_grad()", mode="eval").body
            yield changed
        case ast.FunctionDef() if _is_without_graph(changed):
            changed.decorator_list = [d for d in changed.decorator_list if ast.unparse(d) != NO_GRAD]
            yield changed
        case ast.Call():
            yield from _calls(changed, graph=graph)


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right))


def _calls(call: ast.Call, *, graph: bool) -> Iterator[ast.AST]:
    if graph and isinstance(call.func, ast.Attribute) and call.func.attr == "detach":
        yield call.func.value
        return
    symmetric, extreme = ast.unparse(call.func) in SYMMETRIC, ast.unparse(call.func) in ("min", "max")
    for index in range(int(symmetric), 0 if extreme else len(call.args) - 1):
        if not any(isinstance(side, ast.Starred) for side in call.args[index : index + 2]):
            other = copy.deepcopy(call)
            other.args[index], other.args[index + 1] = other.args[index + 1], other.args[index]
            yield other
    if not graph or ast.unparse(call.func) in SHAPES:
        return
    passed = [("args", k, a) for k, a in enumerate(call.args)]
    passed += [("keywords", k, word.value) for k, word in enumerate(call.keywords)]
    for kind, index, argument in passed:
        if isinstance(argument, ast.Name | ast.Attribute) and TENSORS.match(ast.unparse(argument).rpartition(".")[2]):
            other = copy.deepcopy(call)
            cut = ast.Call(ast.Attribute(argument, "detach", ast.Load()), [], [])
            if kind == "args":
                other.args[index] = cut
            else:
                other.keywords[index].value = cut
            yield other


def mutants_of(path: Path, first: int, last: int) -> Iterator[Mutant]:
    """Every mutant of a file between two of its lines."""
    text = path.read_text()
    name = path.relative_to(ROOT / PACKAGE).as_posix()
    tree = ast.parse(text)
    for node, replacements in list(sites(tree)):
        if not replacements or not first <= node.lineno <= last:
            continue
        for other in replacements:
            change = f"{_first_line(node)} -> {_first_line(other)}"
            if ast.unparse(node) != ast.unparse(other) and (name, change) not in EQUIVALENT:
                source = ast.unparse(ast.fix_missing_locations(_Replace(node, other).visit(copy_of(tree, node))))
                yield Mutant(file=name, line=node.lineno, change=change, source=source)


def _first_line(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} ..."


class _Replace(ast.NodeTransformer):
    """Exchange one node, marked by :func:`copy_of`."""

    def __init__(self, node: ast.AST, other: ast.AST) -> None:
        self.node, self.other = node, other

    def visit(self, node: ast.AST) -> ast.AST:
        return self.other if getattr(node, "marked", False) else self.generic_visit(node)


def copy_of(tree: ast.Module, node: ast.AST) -> ast.Module:
    """A copy of ``tree`` in which the copy of ``node`` is marked."""
    node.marked = True  # type: ignore[attr-defined]
    copied = copy.deepcopy(tree)
    del node.marked  # type: ignore[attr-defined]
    return copied


# ---- Tests of a module -----------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, as paths below it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onestepsr."):
            module = (node.module or "").removeprefix("onestepsr.").replace(".", "/")
            found |= {f"{module}.py"} | {f"{module}/{alias.name}.py" for alias in node.names}
    return found


def tests_of(file: str) -> list[list[str]]:
    """Test files in up to three groups: those in the folder of the module's name that import it, which are fast and
    notice most; others that import it; those that import a module of the three folders that does."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: path.stat().st_size)  # short ones first
    imports = {path.relative_to(ROOT).as_posix(): imported(path) for path in files}
    users = {
        path.relative_to(ROOT / PACKAGE).as_posix()
        for folder in FOLDERS
        for path in (ROOT / PACKAGE / folder).rglob("*.py")
        if file in imported(path)
    }
    direct = [test for test, names in imports.items() if file in names]
    own = [test for test in direct if test.startswith(f"tests/{file.partition('/')[0]}/")]
    rest = [test for test in direct if test not in own]
    inside = tuple(f"tests/{folder}/" for folder in FOLDERS)
    indirect = [test for test, names in imports.items() if names & users and test.startswith(inside)]
    return [group for group in (own, rest, [test for test in indirect if test not in direct]) if group]


# ---- Runs ------------------------------------------------------------------------------------------------------------


def run_tests(work: Path, tests: list[str], limit: float | None = None) -> tuple[str, float]:
    """Outcome ("passed", "failed" or "timeout") and seconds of tests in a copy of the project, in their own process.

    Without a limit it is the run before all mutants, which leaves the bytecode of everything for them.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(work)
        sys.dont_write_bytecode = limit is not None
        sys.path.insert(0, str(work / "src"))
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests])
        os._exit(int(code))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        spent = time.monotonic() - began
        if done:
            return ("passed" if status == 0 else "failed"), spent
        if limit is not None and spent > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", spent
        time.sleep(0.02)


def chosen(targets: list[str]) -> Iterator[Mutant]:
    """Mutants of targets such as ``losses``, ``methods/d3sr.py`` and ``methods/d3sr.py:90-120``."""
    for target in targets:
        name, _, lines = target.partition(":")
        path = ROOT / PACKAGE / name
        first, _, last = lines.partition("-")
        if not path.exists():
            raise SystemExit(f"{target}: no such file or folder below {PACKAGE}")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield from mutants_of(file, int(first or 1), int(last or first or 10**9))


def main() -> None:
    """Read the arguments, run the mutants, print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(FOLDERS))
    parser.add_argument("--count", type=int, help="number of mutants, drawn by the seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=4.0, help="time limit, in times of the unchanged tests")
    parser.add_argument("--quick", action="store_true", help="only the tests in the folder of the module's name")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    arguments = parser.parse_args()
    mutants = list(chosen(arguments.targets))
    if arguments.count is not None and arguments.count < len(mutants):
        drawn = sorted(random.Random(arguments.seed).sample(range(len(mutants)), arguments.count))
        mutants = [mutants[index] for index in drawn]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.file}:{mutant.line}: {mutant.change}")
        return
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copy(ROOT / "pyproject.toml", work)
        survivors = run_mutants(work, mutants, arguments.limit, quick=arguments.quick)
    print(f"{len(mutants)} mutants, {len(survivors)} survived")
    for mutant in survivors:
        print(f"survived: {mutant.file}:{mutant.line}: {mutant.change}")
    sys.exit(bool(survivors))


def run_mutants(work: Path, mutants: list[Mutant], limit: float, *, quick: bool) -> list[Mutant]:
    """Run each mutant in ``work``; returns those that no test noticed."""
    survivors: list[Mutant] = []
    usual: dict[str, float] = {}  # seconds of each group of tests without a change
    for number, mutant in enumerate(mutants, start=1):
        path, outcome, began = work / PACKAGE / mutant.file, "survived", time.monotonic()
        original = path.read_text()
        for tests in tests_of(mutant.file)[: 1 if quick else None]:
            group = " ".join(tests)
            if group not in usual:
                outcome, usual[group] = run_tests(work, tests)
                if outcome != "passed":
                    raise SystemExit(f"{group} fails without a change:\n{(work / 'log').read_text()[-3000:]}")
                print(f"{usual[group]:.0f} s without a change: {group}", flush=True)
            path.write_text(mutant.source)
            outcome, _ = run_tests(work, tests, limit * usual[group] + 10)
            path.write_text(original)
            if outcome != "passed":
                break
        if outcome in ("passed", "survived"):
            outcome = "SURVIVED"
            survivors.append(mutant)
        place, spent = f"{mutant.file}:{mutant.line}", time.monotonic() - began
        print(f"{number}/{len(mutants)} {outcome} {spent:.1f} s  {place}: {mutant.change}", flush=True)
    return survivors


if __name__ == "__main__":
    main()
