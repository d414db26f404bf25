"""A digest of the source that computes a result. A changed program then never uses its old results.

A digest covers all definitions that a function reaches within this repository: its own definition, those of the
functions, classes and constants that it names, and so on. Docstrings, comments, annotations, layout and the words of
errors do not count. Definitions that the function does not reach do not count either. So a change of a picture or of a
report does not change a digest. A digest does not see what the text does not name. For example, the text does not name
a function that is the value of a field. The place where the field is filled names it, so a digest also begins there.
"""

import ast
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGES = "experiments", "glue_jax"
_DECIDE_NOTHING = frozenset(
    {
        "experiments.protocol.config",
        "experiments.runtime.progress",
        "experiments.runtime.sources",
        "experiments.runtime.stages",
    }
)
"""Modules that no digest enters. The values of a config are in every stage's fingerprint; the others decide no
result."""
_AT_IMPORT = "at import"
"""This is no name that a module can bind."""


class _Module(NamedTuple):
    """A parsed module.

    Attributes:
        definitions: the statements that bind each name. Under `_AT_IMPORT` are those that bind no name, and run when
            the module is imported.
        imports: the origin of each imported name: a module, and a name there or None.
    """

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str | None]]


class _Definition(NamedTuple):
    """What a digest holds of a name.

    Attributes:
        text: the statements of the definition, without what decides no result.
        names: the names in the text, in their order there.
        beside: the names beside the text: in annotations, in the words of errors, and in what the import of its module
            runs.
    """

    text: str
    names: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def name_of(thing: Callable[..., Any]) -> str:
    """Returns the name of a function or a class for `digest`, as `module:name`. A nested one has the name around it."""
    return f"{_module_of(thing)}:{thing.__qualname__.split('.')[0]}"


def functions_in(value: Any) -> list[Callable[..., Any]]:
    """Returns the functions and classes of this repository that a value is made of, for `name_of`.

    Args:
        value: a function or a class, or a `functools.partial` or an instance of a dataclass that holds some. Anything
            else has none.

    Raises:
        ValueError: if a function was made within another one, with values that no digest sees.
    """
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [type(value), *(getattr(value, field.name) for field in dataclasses.fields(value))]
    elif callable(value) and _is_ours(_module_of(value)):
        if getattr(value, "__closure__", None):
            raise ValueError(
                f"{value.__qualname__} of {value.__module__} has values of the function around it, which no digest "
                "sees; expected a functools.partial"
            )
        return [value]
    else:
        parts = []
    return [function for part in parts for function in functions_in(part)]


@functools.cache
def digest(*names: str, leaving_out: Collection[str] = ()) -> str:
    """Returns a digest of all source that some definitions reach.

    The digest covers the text of each definition, and the definition that each name stands for. The module of a
    definition does not matter, so a definition may move to another module.

    Args:
        *names: the definitions to begin with, each as `module:name`.
        leaving_out: definitions that decide nothing here, each as `module:name`. The digest does not enter them.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: if a module does not define such a name.
    """
    for name in (*names, *leaving_out):
        module, _, defined = name.partition(":")
        if defined not in _parse(module).definitions:
            raise ValueError(f"{name!r} names no definition; expected 'module:name'")
    begin, texts = _reached(names, leaving_out)
    return hashlib.sha256(json.dumps([begin, list(texts.values())]).encode()).hexdigest()[:16]


def _reached(names: Collection[str], leaving_out: Collection[str]) -> tuple[list[int], dict[str, list[Any]]]:
    """The numbers of the definitions to begin with, and by each definition its text and the numbers of its names."""
    numbers: dict[str, int] = {}
    order: list[str] = []

    def number(name: str) -> int:
        name = _origin(name)
        if name not in numbers:
            numbers[name] = len(order)
            order.append(name)
        return numbers[name]

    begin, texts, beside = [number(name) for name in names], {}, []
    # The list grows meanwhile.
    for name in order:
        found = _Definition("") if name in leaving_out else _definition(name)
        texts[name] = [found.text, *map(number, found.names)]
        beside += found.beside
        # These come last, and without their numbers: an annotation decides only which methods there are.
        while beside and len(texts) == len(order):
            number(beside.pop(0))
    return begin, texts


def _module_of(thing: Any) -> str:
    """The module that defines a function or a class."""
    module = getattr(thing, "__module__", None) or ""
    if module == "__main__":
        # The module that `python -m` runs is imported under this name.
        spec = sys.modules["__main__"].__spec__
        module = spec.name if spec else module
    return module


def _origin(name: str) -> str:
    """The definition that a name stands for, as `module:name`; for a module itself, `module:`."""
    module, _, defined = name.partition(":")
    if not _is_ours(module) or not defined or defined in _parse(module).definitions:
        return name
    origin, inner = _parse(module).imports.get(defined, (None, None))
    return name if origin is None else _origin(f"{origin}:{inner or ''}")


@functools.cache
def _definition(name: str) -> _Definition:
    """A definition, as `_origin` names it."""
    module, _, defined = name.partition(":")
    if not _is_ours(module):
        return _Definition(name)
    if module in _DECIDE_NOTHING:
        return _Definition("")
    parsed = _parse(module)
    if not defined:
        names = sorted({*parsed.definitions, *parsed.imports})
        return _Definition(" ".join(names), tuple(f"{module}:{each}" for each in names))
    statements = parsed.definitions.get(defined, [])
    bare = [_Bare().visit(copy.deepcopy(statement)) for statement in statements]
    names = dict.fromkeys(found for statement in bare for found in _references(module, parsed, statement))
    beside = [found for statement in statements for found in _references(module, parsed, statement)]
    if defined in parsed.imports:
        # The name is imported first, and then bound anew.
        origin, inner = parsed.imports[defined]
        beside.append(f"{origin}:{inner or ''}")
    parts = module.split(".")
    packages = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    beside += [f"{each}:{_AT_IMPORT}" for each in packages if _AT_IMPORT in _parse(each).definitions]
    return _Definition("\n".join(map(ast.unparse, bare)), tuple(names), tuple(beside))


def _references(module: str, parsed: _Module, statement: ast.stmt) -> Iterator[str]:
    """The names of ours and of imports that a statement has, as `module:name`, in its order."""
    whole, known = set(), {*parsed.definitions, *parsed.imports}
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute) and id(node) in whole:
            whole.add(id(node.value))
        elif isinstance(node, ast.Attribute) and (found := _resolved(parsed, node)):
            whole.add(id(node.value))
            yield found
        elif isinstance(node, ast.Name) and node.id in known and id(node) not in whole:
            yield f"{module}:{node.id}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for origin, inner in _imports(node, module).values():
                yield f"{origin}:{inner or ''}"


def _resolved(parsed: _Module, node: ast.Attribute) -> str | None:
    """What `module.name` stands for, where `module` is an imported one of ours; None for any other attribute."""
    if isinstance(node.value, ast.Name):
        origin, inner = parsed.imports.get(node.value.id, ("", None))
    elif isinstance(node.value, ast.Attribute):
        origin, _, inner = (_resolved(parsed, node.value) or "").partition(":")
        # `package.module`, where the package imports the module from itself.
        if inner and _is_module(f"{origin}.{inner}"):
            origin, inner = f"{origin}.{inner}", None
    else:
        return None
    if inner or not _is_ours(origin):
        return None
    there = _parse(origin)
    is_bound = node.attr in there.definitions or node.attr in there.imports
    is_module = not is_bound and _is_module(f"{origin}.{node.attr}")
    return f"{origin}.{node.attr}:" if is_module else f"{origin}:{node.attr}"


@functools.cache
def _parse(module: str) -> _Module:
    """A module, read once."""
    path = _file(module)
    tree = ast.parse(_TEXTS.get(path) or path.read_text())
    parsed = _Module({}, {})
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            parsed.imports.update(_imports(statement, module))
        elif not _is_text(statement) and not _is_main(statement):
            for name in _bound(statement) or [_AT_IMPORT]:
                parsed.definitions.setdefault(name, []).append(statement)
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
        if _is_ours(origin) and _is_module(f"{origin}.{alias.name}")
        else (origin, alias.name)
        for alias in node.names
    }


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        inner = (name for node in ast.walk(statement) if isinstance(node, ast.Global) for name in node.names)
        return [statement.name, *inner]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        nodes = ast.walk(statement)
        return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return []


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


def _is_ours(module: str) -> bool:
    """Whether a module is of a package that digests cover."""
    return module.partition(".")[0] in _PACKAGES


def _is_text(statement: ast.stmt) -> bool:
    """Whether it is a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_main(statement: ast.stmt) -> bool:
    """Whether it runs a module as a command."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


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
"""The texts as this process imports them: a file may be edited while a run goes on."""
