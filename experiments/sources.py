"""A digest of the source that computes a result, so that a changed program never serves its old results as new.

A digest covers the definitions that a function reaches: its own, those of the functions, classes and constants that it
names, and so on, within this repository. Docstrings, comments, annotations, layout and the words of errors do not
count, and neither do definitions that nothing reaches: a change of a picture or of a report leaves every digest as it
was. What the text does not name is not seen: a function that arrives in a field is covered where it is made, so a
digest begins there, too.
"""

import ast
import copy
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGES = "experiments", "glue_jax"
_DECIDE_NOTHING = frozenset({"experiments.config", "experiments.progress", "experiments.sources", "experiments.stages"})
"""Modules that no digest enters: a config's values are in every stage's fingerprint, the others decide no result."""


class _Module(NamedTuple):
    """A parsed module.

    Attributes:
        definitions: the statements that bind a name.
        imports: where a name comes from: a module, and a name there or None.
        others: the statements that bind no name and run whenever the module is imported.
    """

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str | None]]
    others: list[ast.stmt]


def is_ours(module: str) -> bool:
    """Returns whether a module is of a package that digests cover."""
    return module.partition(".")[0] in _PACKAGES


def name_of(thing: Callable[..., Any]) -> str:
    """Returns how `digest` calls a function or a class, as `module:name`: of a nested one, what encloses it."""
    module = thing.__module__
    if module == "__main__":
        # What `python -m` runs is imported under this name.
        spec = sys.modules["__main__"].__spec__
        module = spec.name if spec else module
    return f"{module}:{thing.__qualname__.split('.')[0]}"


@functools.cache
def digest(*names: str, leaving_out: Collection[str] = ()) -> str:
    """Returns a digest of all source that some definitions reach.

    Args:
        *names: where to begin, each as `module:name`.
        leaving_out: definitions, as `module:name`, where it does not go on: what they decide does not matter.

    Returns:
        16 hexadecimal digits. Where a definition stands does not matter, so it may move to another module.

    Raises:
        ValueError: a name that its module does not define.
    """
    for name in (*names, *leaving_out):
        module, _, defined = name.partition(":")
        if defined not in _parse(module).definitions:
            raise ValueError(f"{name!r} names no definition; expected 'module:name'")
    texts: list[str] = []
    seen, entered, waiting = set(leaving_out), set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        module, _, defined = name.partition(":")
        if module in _DECIDE_NOTHING:
            continue
        parsed = _parse(module)
        if not defined:
            waiting += [f"{module}:{each}" for each in (*parsed.definitions, *parsed.imports)]
            continue
        if defined in parsed.imports:
            origin, inner = parsed.imports[defined]
            if is_ours(origin):
                waiting.append(f"{origin}:{inner or ''}")
            else:
                texts.append(f"{defined} = {origin}:{inner}")
            continue
        statements = parsed.definitions.get(defined, [])
        if module not in entered:
            entered.add(module)
            statements = [*statements, *parsed.others]
        for statement in statements:
            texts.append(_text(statement))
            waiting += _references(module, parsed, statement)
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]


def _references(module: str, parsed: _Module, statement: ast.stmt) -> Iterator[str]:
    """The definitions that a statement names, as `module:name`."""
    whole, known = set(), {*parsed.definitions, *parsed.imports}
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute) and (found := _resolved(parsed, node)):
            whole.add(id(node.value))
            yield found
        elif isinstance(node, ast.Name) and node.id in known and id(node) not in whole:
            yield f"{module}:{node.id}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for origin, inner in _imports(node, module).values():
                if is_ours(origin):
                    yield f"{origin}:{inner or ''}"


def _resolved(parsed: _Module, node: ast.Attribute) -> str | None:
    """What `module.name` stands for, where `module` is an imported one of ours; None for any other attribute."""
    if not isinstance(node.value, ast.Name) or node.value.id not in parsed.imports:
        return None
    origin, inner = parsed.imports[node.value.id]
    if inner is not None or not is_ours(origin):
        return None
    there = _parse(origin)
    is_bound = node.attr in there.definitions or node.attr in there.imports
    return f"{origin}:{node.attr}" if is_bound else f"{origin}.{node.attr}:"


@functools.cache
def _parse(module: str) -> _Module:
    """A module, read once."""
    path = _file(module)
    tree = ast.parse(_TEXTS.get(path) or path.read_text())
    parsed = _Module({}, {}, [])
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            parsed.imports.update(_imports(statement, module))
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            parsed.definitions.setdefault(statement.name, []).append(statement)
        elif names := _assigned(statement):
            for name in names:
                parsed.definitions.setdefault(name, []).append(statement)
        elif not _is_text(statement) and not _is_main(statement):
            parsed.others.append(statement)
    return parsed


def _imports(node: ast.Import | ast.ImportFrom, module: str) -> dict[str, tuple[str, str | None]]:
    """What an import binds: each name's module, and the name there, or None for a module itself."""
    if isinstance(node, ast.Import):
        found = {alias.asname or alias.name.partition(".")[0]: alias for alias in node.names}
        return {name: (alias.name if alias.asname else name, None) for name, alias in found.items()}
    package = module if _file(module).name == "__init__.py" else module.rpartition(".")[0]
    origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return {
        alias.asname or alias.name: (f"{origin}.{alias.name}", None)
        if is_ours(origin) and _is_module(f"{origin}.{alias.name}")
        else (origin, alias.name)
        for alias in node.names
    }


def _assigned(statement: ast.stmt) -> list[str]:
    """The names that an assignment binds."""
    if isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Assign):
        targets = statement.targets
    else:
        return []
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _text(statement: ast.stmt) -> str:
    """A statement without what decides no result."""
    return ast.unparse(_Bare().visit(copy.deepcopy(statement)))


class _Bare(ast.NodeTransformer):
    """Takes docstrings, annotations and the words of errors away."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Keeps the kind of the error."""
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Takes a bare string away."""
        return None if _is_text(node) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Keeps the name and the value."""
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """Keeps the name."""
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Keeps all but what it returns."""
        node.returns = None
        return self.generic_visit(node)


def _is_text(statement: ast.stmt) -> bool:
    """Whether it is a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_main(statement: ast.stmt) -> bool:
    """Whether it runs a module as a command."""
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _is_module(name: str) -> bool:
    """Whether there is a module of that name."""
    return _file(name).exists()


def _file(module: str) -> Path:
    """Where a module's source lies, or would lie."""
    package, *rest = module.split(".")
    path = _root(package).joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _root(package: str) -> Path:
    """A package's folder."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


_TEXTS = {path: path.read_text() for package in _PACKAGES for path in _root(package).rglob("*.py")}
"""As this process imports them: a file that is edited while a run goes on is not what the run computes by."""
