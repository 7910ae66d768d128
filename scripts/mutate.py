"""Change single expressions of losses, methods and schedules, and report the changes that no test notices.

    python scripts/mutate.py losses diffusion
    python scripts/mutate.py methods/d3sr.py methods/shared/vsd.py:115-140 --count 40 --seed 1

Targets are folders, files or lines of files below ``src/onestepsr``; without any, the three folders. A mutant differs
in one place of the syntax tree: the sign of a term, a lost term, swapped operands or arguments, a constant, a negated
condition, a bound of a range, a lost or an added ``detach``, a lost ``no_grad``.

The tests in the folders of the same names run once unchanged, which records the seconds of each and the lines that it
executes. Then everything is imported once, and each mutant is a fork of that process, in which the code of one function
is exchanged and the tests that execute the changed line run until the first failure, short ones first. What is computed
at import, such as the defaults of a configuration, needs a fork from before the import. Four times the processor time
of the unchanged tests counts as noticed. What survives is tried again with the tests of other folders.

``--results`` keeps the outcomes, so that a second run takes up where the first ended and tries only what is left and
what survived. ``scripts/equivalent_mutants.yaml`` lists, with the reason, mutants that compute the same. Exits with 1
if a mutant survives.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import re
import resource
import signal
import sys
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import yaml
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "onestepsr"
FOLDERS = ("losses", "diffusion", "methods")
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.yaml")
PRELOADED = ("numpy", "hypothesis", "safetensors.torch", "scipy.signal", "torch", "diffusers", "peft")
"""Imported before the first fork; nothing of the package is."""
MOST_MEMORY = 12 * 2**30
"""Address space of a mutant, in bytes: a changed size may ask for any amount."""
TENSORS = re.compile(r"(z|x|sr|fake|real|eps|gradient|estimate|target|logits|z_\w+|x0\w*|eps_\w+|\w+_logits)$")
"""Names that tensors have in these folders: their ``detach`` is a mutant wherever they are passed on."""
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
BOUNDS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
NO_GRAD = "torch.no_grad()"
ANY_ORDER = {"min", "max", "zip", "cast", "isinstance", "getattr", "hasattr", "partial", "issubclass"}
"""Calls whose arguments are not swapped: it changes nothing, or can only raise."""
SYMMETRIC = {"F.mse_loss", "F.l1_loss", "noise_prediction_loss"}
"""Calls whose first two arguments may change places."""
SHAPES = {"self._at", "self.coefficients", "expand_as", "noise", "random.normal", "torch.zeros_like", "torch.full_like"}
SHAPES |= {"len", "torch.ones_like"}
"""Calls that read shape, dtype and device of a tensor and not its values: ``detach`` changes nothing."""
EVEN = ("abs", "square")
"""Methods that have the same result for a difference and its negative."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one file."""

    file: str
    """Path below the package."""
    line: int
    function: str
    """Name in the file of the function or method that holds it; empty for what is computed at import."""
    change: str
    """Source before -> after, and "(2)" after the second of the same in a function."""
    node: int
    """Number of the changed node in the order of ``ast.walk``."""
    kind: int
    """Number of the replacement among those of the node."""

    @property
    def key(self) -> str:
        """Its key in the file of equivalent mutants, below the name of its file."""
        return f"{self.function}: {self.change}"

    def code(self) -> types.CodeType:
        """The file's code with the change."""
        tree = ast.parse((PACKAGE / self.file).read_text())
        node = list(ast.walk(tree))[self.node]
        other = list(replacements(tree, node))[self.kind]
        return compile(ast.fix_missing_locations(Exchange(node, other).visit(tree)), str(PACKAGE / self.file), "exec")


class Exchange(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, node: ast.AST, other: ast.AST) -> None:
        self.node, self.other = node, ast.copy_location(other, node) if hasattr(node, "lineno") else other

    def visit(self, node: ast.AST) -> ast.AST:
        """Every node but the one as it is."""
        return self.other if node is self.node else self.generic_visit(node)


# ---- Mutants of a syntax tree ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def unchanged(tree: ast.Module) -> tuple[set[int], set[int], set[int], set[int]]:
    """Ids of the nodes that are never changed, of those without a graph, of conditions that only raise an error, and of
    differences whose sign does not matter."""
    skipped: list[ast.AST] = []
    constant: list[ast.AST] = []
    checks: list[ast.AST] = []
    even: set[int] = set()
    for owner in ast.walk(tree):
        if isinstance(owner, ast.AnnAssign | ast.arg) and owner.annotation is not None:
            skipped.append(owner.annotation)
        if isinstance(owner, ast.FunctionDef):
            skipped += [owner.returns] if owner.returns else []
        if isinstance(owner, ast.Raise | ast.JoinedStr | ast.ImportFrom | ast.Assert):
            skipped.append(owner)
        if isinstance(owner, ast.FunctionDef | ast.ClassDef):
            skipped += [decorator for decorator in owner.decorator_list if isinstance(decorator, ast.Call)]
        if isinstance(owner, ast.Call) and ast.unparse(owner.func) in ("zip", "error_context"):  # strict=True
            skipped += owner.keywords
        if is_without_graph(owner):
            constant.append(owner)
        if isinstance(owner, ast.If) and isinstance(owner.body[-1], ast.Raise):
            checks.append(owner.test)
        if isinstance(owner, ast.Attribute) and owner.attr in EVEN:
            even.add(id(owner.value))
        if isinstance(owner, ast.BinOp) and isinstance(owner.op, ast.Pow) and ast.unparse(owner.right) == "2":
            even.add(id(owner.left))
    first, second, third = (
        {id(node) for root in roots for node in ast.walk(root)} for roots in (skipped, constant, checks)
    )
    return first, second, third, even


def is_without_graph(owner: ast.AST) -> bool:
    """Tell whether ``owner`` is a ``no_grad`` block, such a function, or a function with a backward pass of its own:
    ``detach`` changes nothing there."""
    if isinstance(owner, ast.ClassDef):
        return "torch.autograd.Function" in map(ast.unparse, owner.bases)
    if isinstance(owner, ast.With):
        return ast.unparse(owner.items[0].context_expr) == NO_GRAD
    return isinstance(owner, ast.FunctionDef) and NO_GRAD in map(ast.unparse, owner.decorator_list)


def replacements(tree: ast.Module, node: ast.AST) -> Iterator[ast.AST]:  # noqa: PLR0912  (one for each kind of node)
    """Nodes that may stand in the place of ``node``."""
    skipped, constant, checks, even = unchanged(tree)
    if id(node) in skipped:
        return
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        other = copy.copy(node)
        other.test = node.test.operand if is_not(node.test) else ast.UnaryOp(ast.Not(), node.test)
        yield other
    if id(node) in checks:
        return
    match node:
        case ast.BinOp(op=operator, left=left, right=right) if type(operator) in ARITHMETIC:
            if any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (left, right)):
                return
            yield ast.BinOp(left, ARITHMETIC[type(operator)](), right)
            if isinstance(operator, ast.Add):
                yield right  # the other term is lost with the sign
            elif isinstance(operator, ast.Div) or (isinstance(operator, ast.Sub) and id(node) not in even):
                yield ast.BinOp(right, operator, left)
        case ast.UnaryOp(op=ast.USub()):
            yield node.operand
        case ast.Compare(ops=[*operators]):
            for index, operator in enumerate(operators):
                if type(operator) in BOUNDS:
                    other = copy.copy(node)
                    other.ops = [*operators[:index], BOUNDS[type(operator)](), *operators[index + 1 :]]
                    yield other
        case ast.BoolOp(op=operator):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), node.values)
        case ast.comprehension(ifs=[condition]):
            other = copy.copy(node)
            other.ifs = [ast.UnaryOp(ast.Not(), condition)]
            yield other
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.With() if is_without_graph(node):
            grad = ast.parse("torch.enable_grad()", mode="eval").body
            yield ast.With([ast.withitem(grad), *node.items[1:]], node.body)
        case ast.FunctionDef() if is_without_graph(node):
            other = copy.copy(node)
            other.decorator_list = [d for d in node.decorator_list if ast.unparse(d) != NO_GRAD]
            yield other
        case ast.Call():
            yield from calls(node, graph=id(node) not in constant)


def is_not(node: ast.AST) -> bool:
    """Tell whether a condition is a negated one."""
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def calls(call: ast.Call, *, graph: bool) -> Iterator[ast.AST]:
    """A call with two arguments swapped, with an argument detached, or without the ``detach`` that it is."""
    if isinstance(call.func, ast.Attribute) and call.func.attr == "detach":
        if graph:
            yield call.func.value
        return
    name = ast.unparse(call.func)
    for index in range(int(name in SYMMETRIC), 0 if name in ANY_ORDER else len(call.args) - 1):
        if not any(isinstance(side, ast.Starred) for side in call.args[index : index + 2]):
            first, second = call.args[index : index + 2]
            yield ast.Call(call.func, [*call.args[:index], second, first, *call.args[index + 2 :]], call.keywords)
    if not graph or name in SHAPES:
        return
    for index, argument in enumerate(call.args):
        if is_tensor(argument):
            args = [*call.args[:index], detached(argument), *call.args[index + 1 :]]
            yield ast.Call(call.func, args, call.keywords)
    for index, word in enumerate(call.keywords):
        if is_tensor(word.value):
            words = [*call.keywords[:index], ast.keyword(word.arg, detached(word.value)), *call.keywords[index + 1 :]]
            yield ast.Call(call.func, call.args, words)


def is_tensor(node: ast.AST) -> bool:
    """Tell whether an argument is a tensor, by its name."""
    name = ast.unparse(node).rpartition(".")[2]
    return isinstance(node, ast.Name | ast.Attribute) and TENSORS.match(name) is not None


def detached(node: ast.expr) -> ast.Call:
    """``node.detach()``."""
    return ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])


def mutants_of(path: Path, first: int, last: int) -> Iterator[Mutant]:
    """Every mutant of a file between two of its lines."""
    tree = ast.parse(path.read_text())
    owners = {id(node): name for name, body in functions(tree, "") for part in body for node in ast.walk(part)}
    seen: Counter[str] = Counter()
    for number, node in enumerate(list(ast.walk(tree))):
        for kind, other in enumerate(replacements(tree, node)):
            before, after = (" ".join(ast.unparse(ast.fix_missing_locations(side)).split()) for side in (node, other))
            function, change = owners.get(id(node), ""), f"{shortened(before)} -> {shortened(after)}"
            seen[f"{function}: {change}"] += 1
            count = seen[f"{function}: {change}"]
            line = node.iter.lineno if isinstance(node, ast.comprehension) else node.lineno  # type: ignore[attr-defined]
            if before != after and first <= line <= last:
                yield Mutant(
                    file=path.relative_to(PACKAGE).as_posix(),
                    line=line,
                    function=function,
                    change=change if count == 1 else f"{change} ({count})",
                    node=number,
                    kind=kind,
                )


def functions(owner: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, list[ast.stmt]]]:
    """Names and bodies of functions and methods; what is nested in a function belongs to it."""
    for node in owner.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node.body


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= 120 else f"{text[:117]}..."


# ---- Tests -----------------------------------------------------------------------------------------------------------

Outcome = tuple[str, str]
"""One of the words of :data:`OUTCOMES`, and the test that failed."""
OUTCOMES = ("killed", "equivalent", "survived", "not run")


@dataclass
class Test:
    """What the run without a change says of one test."""

    name: str
    seconds: float
    """Processor time."""
    lines: dict[str, list[int]]
    """Lines of each file below the package that it executes."""


def test_files(targets: set[str]) -> list[str]:
    """Test files of the three folders, and others that import one of the files ``targets``."""
    inside = tuple(f"tests/{folder}/" for folder in FOLDERS)
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name, used = path.relative_to(ROOT).as_posix(), set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onestepsr."):
                module = (node.module or "").removeprefix("onestepsr.").replace(".", "/")
                used |= {f"{module}.py"} | {f"{module}/{alias.name}.py" for alias in node.names}
        if name.startswith(inside) or used & targets:
            found.append(name)
    return found


class Plugin:
    """Lets pytest collect, and hands the session to ``use`` instead of running it. Records executed lines."""

    def __init__(self, use: Callable[[Any, Plugin], None]) -> None:
        self.use = use
        self.lines: dict[str, set[int]] = defaultdict(set)
        self.shared: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        """Lines that fixtures of a whole test file execute; its first test sets them up for all."""

    def pytest_runtestloop(self, session: Any) -> bool:
        """Run ``use`` only."""
        self.use(session, self)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        """Put the lines of a fixture with a wider scope than one test apart."""
        own = self.lines
        if fixturedef.scope != "function":
            self.lines = self.shared[request.node.nodeid.partition("::")[0]]
        result = yield
        self.lines = own
        return result

    def trace(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        """Record a line of the package; leave functions from elsewhere alone."""
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        self.lines[frame.f_code.co_filename[len(str(PACKAGE)) + 1 :]].add(frame.f_lineno)
        return self.trace


def collect(files: list[str], use: Callable[[Any, Plugin], None]) -> None:
    """Import tests and all they need, then run ``use``."""
    options = ["-q", "-s", "-p", "no:cacheprovider", "--disable-warnings", "-m", "not slow"]
    pytest.main([*options, *files], plugins=[Plugin(use)])


def first_failure(session: Any, names: list[str]) -> str:
    """Run tests in this order until one fails; its name, or nothing."""
    items = {item.nodeid: item for item in session.items}
    for name, after in zip(names, [*(items[name] for name in names[1:]), None], strict=False):
        if any(report.failed for report in runtestprotocol(items[name], log=False, nextitem=after)):
            return name
    return ""


def collected_failure(names: list[str]) -> str:
    """Import the files of tests, one by one as importing takes long, and run them until one fails; its name."""
    failure = "import"

    def use(session: Any, _: Plugin) -> None:
        nonlocal failure
        failure = "import"  # also where a file cannot be collected any more
        if {item.nodeid for item in session.items} >= set(own):
            failure = first_failure(session, own)

    for file in dict.fromkeys(name.partition("::")[0] for name in names):
        own, failure = [name for name in names if name.startswith(f"{file}::")], "import"
        collect([file], use)
        if failure:
            break
    return failure


def recorded(files: list[str], kept: Path) -> list[Test]:
    """Run every test without a change, in a process of its own; ``kept`` keeps what it said of the same sources."""
    helpers = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    sources = sorted([*PACKAGE.rglob("*.py"), *helpers, *map(Path, files)])
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if known.get("version") != version:
        known = {"version": version}
    elif "\n".join(files) in known:
        return [Test(**test) for test in known["\n".join(files)]]
    found: list[Test] = []

    def run(session: Any, plugin: Plugin) -> None:
        for item, after in zip(session.items, [*session.items[1:], None], strict=True):
            plugin.lines, began = defaultdict(set), time.process_time()
            sys.settrace(plugin.trace)
            reports = runtestprotocol(item, log=False, nextitem=after)
            sys.settrace(None)
            spent = time.process_time() - began
            for report in reports:
                if report.failed:
                    raise SystemExit(f"{item.nodeid} fails without a change:\n{report.longreprtext[-3000:]}")
            lines = {file: sorted(numbers) for file, numbers in plugin.lines.items()}
            found.append(Test(item.nodeid, spent, lines))
        for test in found:
            for file, numbers in plugin.shared[test.name.partition("::")[0]].items():
                test.lines[file] = sorted({*test.lines.get(file, []), *numbers})

    def answer() -> str:
        collect(files, run)
        return json.dumps([asdict(test) for test in found])

    outcome = forked(answer, seconds=3600)[1]
    if not outcome.startswith("["):
        raise SystemExit(outcome)
    known["\n".join(files)] = json.loads(outcome)
    kept.write_text(json.dumps(known))
    return [Test(**test) for test in json.loads(outcome)]


def forked(work: Callable[[], str], seconds: float) -> Outcome:
    """Run ``work`` in a fork with this much processor time: "survived" or "killed", and what it returned."""
    inlet, outlet = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(inlet)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        signal.alarm(int(60 + 30 * seconds))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            answer = work()
        except BaseException as error:  # noqa: BLE001  (a mutant may raise anything)
            answer = f"{type(error).__name__}: {error}"
        with os.fdopen(outlet, "w") as file:
            file.write(answer)
        os._exit(0)
    os.close(outlet)
    with os.fdopen(inlet) as file:
        answer = file.read()
    status = os.waitpid(child, 0)[1]
    if status:
        return "killed", f"signal {signal.Signals(status & 127).name}"
    return ("killed" if answer else "survived"), answer


# ---- Runs ------------------------------------------------------------------------------------------------------------


class Run:
    """Mutants to try, the tests that try them, and the file of outcomes."""

    def __init__(self, mutants: list[Mutant], files: list[str], results: Path) -> None:
        self.mutants, self.files, self.results = mutants, files, results
        self.tests = recorded(files, results.with_suffix(".tests.json"))
        self.kills: Counter[tuple[str, str, str]] = Counter()
        self.sound: dict[str, bool] = {}
        """Tests that have noticed something, and whether each passes alone without a change."""

    def __call__(self) -> None:
        """Try all mutants, those that need an import of their own last."""
        seconds = sum(test.seconds for test in self.tests)
        print(f"{len(self.mutants)} mutants, {len(self.tests)} tests of {seconds:.0f} s", flush=True)
        child = os.fork()  # this process imports nothing of the package
        if child == 0:
            collect(self.files, lambda session, _: self.exchange(session))
            os._exit(0)
        os.waitpid(child, 0)
        for mutant in self.mutants:
            if not mutant.function:
                self.attempt(mutant, self.imported)

    def imported(self, mutant: Mutant | None, names: list[str]) -> str:
        """Run tests in a process that imports the changed file: the first failure, or nothing."""
        if mutant is not None:
            code, original, path = mutant.code(), SourceFileLoader.get_code, str(PACKAGE / mutant.file)
            SourceFileLoader.get_code = lambda loader, name: (  # type: ignore[method-assign]
                code if loader.path == path else original(loader, name)
            )
        return collected_failure(names)

    def exchange(self, session: Any) -> None:
        """Try the mutants of functions: package and tests are imported, each fork exchanges the code of one."""
        found: dict[tuple[str, str, int], list[types.FunctionType]] = defaultdict(list)
        for thing in gc.get_objects():
            if isinstance(thing, types.FunctionType):
                code = thing.__code__
                found[code.co_filename, code.co_qualname, code.co_firstlineno].append(thing)

        def changed(mutant: Mutant | None, names: list[str]) -> str:
            for code in nested(mutant.code()) if mutant is not None else ():
                if mutant is not None and code.co_qualname == mutant.function:
                    for function in found[code.co_filename, code.co_qualname, code.co_firstlineno]:
                        function.__code__ = code
            if failure := first_failure(session, names):
                return failure
            if mutant is None:
                return ""
            every = [test for test in self.tests if mutant.file in test.lines]
            seconds = int(time.process_time() + 20 + 4 * sum(test.seconds for test in every))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
            for item in session.items:  # a test file may have called the function when it was imported
                sys.modules.pop(item.module.__name__, None)
            return collected_failure([test.name for test in every])

        gc.freeze()  # what the forks share is not copied by their garbage collectors
        for mutant in self.mutants:
            if mutant.function:
                self.attempt(mutant, changed)

    def attempt(self, mutant: Mutant, run: Callable[[Mutant | None, list[str]], str]) -> None:
        """Run the tests that execute the line, those first that noticed other changes of the function, then short
        ones, and keep the outcome."""
        began, place = time.monotonic(), (mutant.file, mutant.function)
        tests = [test for test in self.tests if mutant.file in test.lines and self.sound.get(test.name, True)]
        tests = [test for test in tests if mutant.line in test.lines[mutant.file] or not mutant.function]
        limit = 20 + 4 * sum(test.seconds for test in tests)
        tests.sort(key=lambda test: (-self.kills[*place, test.name], test.seconds))
        names = [test.name for test in tests]
        outcome, test = forked(lambda: run(mutant, names), limit)
        if "::" in test and test not in self.sound:
            self.sound[test] = forked(lambda: run(None, [test]), limit)[0] == "survived"
            if not self.sound[test]:
                print(f"left out, fails alone without a change: {test}", flush=True)
                return self.attempt(mutant, run)
        self.kills[*place, test] += 1
        with self.results.open("a") as file:
            file.write(json.dumps([mutant.file, digest(mutant.file), mutant.key, outcome, test]) + "\n")
        said = f"{self.mutants.index(mutant) + 1}/{len(self.mutants)} {outcome} {time.monotonic() - began:.1f} s"
        print(f"{said} {mutant.file}:{mutant.line}: {mutant.key} ({test})", flush=True)
        return None


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and all that it holds."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


@functools.cache
def digest(file: str) -> str:
    """What tells one version of a file of the package from another."""
    return hashlib.sha256((PACKAGE / file).read_bytes()).hexdigest()[:12]


def chosen(targets: list[str]) -> Iterator[Mutant]:
    """Mutants of targets such as ``losses``, ``methods/d3sr.py`` and ``methods/d3sr.py:90-120``."""
    for target in targets:
        name, _, lines = target.partition(":")
        path = PACKAGE / name
        first, _, last = lines.partition("-")
        if not path.exists():
            raise SystemExit(f"{target}: no such file or folder below {PACKAGE.relative_to(ROOT)}")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield from mutants_of(file, int(first or 1), int(last or first or 10**9))


def outcomes(mutants: list[Mutant], results: Path) -> list[str]:
    """What is known of each mutant, as one of :data:`OUTCOMES`."""
    equivalent = yaml.safe_load(EQUIVALENT.read_text())
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(file, version, key): outcome for file, version, key, outcome, _ in rows}
    return [
        "equivalent"
        if mutant.key in equivalent.get(mutant.file, {})
        else known.get((mutant.file, digest(mutant.file), mutant.key), "not run")
        for mutant in mutants
    ]


def main() -> None:
    """Read the arguments, run the mutants, print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(FOLDERS))
    parser.add_argument("--count", type=int, help="number of mutants, drawn by the seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "mutants.jsonl", help="file of outcomes")
    parser.add_argument("--quick", action="store_true", help="leave out the tests of other folders")
    parser.add_argument("--list", action="store_true", help="print the mutants with their outcomes and run none")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # what asks a model hub by mistake fails at once
    mutants = list(chosen(arguments.targets))
    if arguments.count is not None and arguments.count < len(mutants):
        drawn = sorted(random.Random(arguments.seed).sample(range(len(mutants)), arguments.count))
        mutants = [mutants[index] for index in drawn]
    known = outcomes(mutants, arguments.results)
    left = [mutant for mutant, outcome in zip(mutants, known, strict=True) if outcome in ("survived", "not run")]
    if left and not arguments.list:
        for name in PRELOADED:
            importlib.import_module(name)
        importlib.import_module("torch").set_num_threads(1)
        os.chdir(ROOT)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        files = test_files({mutant.file for mutant in left})
        folders = tuple(f"tests/{mutant.file.partition('/')[0]}/" for mutant in left)
        Run(left, [file for file in files if file.startswith(folders)], arguments.results)()
        known = outcomes(left, arguments.results)
        left = [mutant for mutant, outcome in zip(left, known, strict=True) if outcome == "survived"]
        if left and not arguments.quick:
            Run(left, [file for file in files if not file.startswith(folders)], arguments.results)()
        known = outcomes(mutants, arguments.results)
    for mutant, outcome in zip(mutants, known, strict=True):
        if arguments.list or outcome == "survived":
            print(f"{outcome}: {mutant.file}:{mutant.line}: {mutant.key}")
    print(f"{len(mutants)} mutants: " + ", ".join(f"{known.count(outcome)} {outcome}" for outcome in OUTCOMES))
    sys.exit("survived" in known)


if __name__ == "__main__":
    main()
