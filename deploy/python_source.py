"""Names and signatures of a package, read off its Python files without importing it."""

import ast
import functools
import importlib.util
import inspect
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """Where a name is bound: the module and the statement.

    module: dotted name of the module.
    node:   a class, a function, an assignment, or the import of something of another package.
    """

    module: str
    node: ast.AST


class Package:
    """A package's Python files.

    folder: the package itself; its name is the folder's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name

    def path(self, module: str) -> Path | None:
        """File of a module by its dotted name; None if there is none."""
        base = self.folder.parent.joinpath(*module.split("."))
        found = (base / "__init__.py", base.with_suffix(".py"))
        return next((path for path in found if path.is_file()), None)

    @functools.cache  # noqa: B019 (a package lives as long as the process)
    def bindings(self, module: str) -> dict[str, ast.AST]:
        """The statement that binds each name at the top of a module, the last one counting."""
        path = self.path(module)
        if path is None:
            return {}
        return {name: node for node in _statements(parse(path)) for name in _bound(node)}

    def resolve(self, module: str, name: str) -> Definition | None:
        """What `from module import name` gives, or None; imports inside the package are followed.

        A submodule is given as its own syntax tree.
        """
        node = self.bindings(module).get(name)
        if node is None:
            if (path := self.path(f"{module}.{name}")) is not None:
                return Definition(f"{module}.{name}", parse(path))
            return self._starred(module, name)
        if isinstance(node, ast.ImportFrom):
            source = self._absolute(module, node)
            if source == self.name or source.startswith(self.name + "."):
                alias = next(a for a in node.names if (a.asname or a.name) == name)
                if (source, alias.name) != (module, name):
                    return self.resolve(source, alias.name)
        return Definition(module, node)

    def ancestors(self, found: Definition) -> list[Definition]:
        """A class and the classes of the package it derives from, nearest first."""
        assert isinstance(found.node, ast.ClassDef)
        result = [found]
        for base in found.node.bases:
            parent = self.resolve(found.module, ast.unparse(base).split("[")[0])
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                known = {each.node for each in result}
                result += [each for each in self.ancestors(parent) if each.node not in known]
        return result

    def member(self, found: Definition, name: str) -> ast.AST | None:
        """What binds an attribute of a class or of its instances; None if nothing does."""
        for each in self.ancestors(found):
            if name in (own := members(each.node)):
                return own[name]
        return None

    def _starred(self, module: str, name: str) -> Definition | None:
        """The same for what `from other import *` brings."""
        path = self.path(module)
        for node in _statements(parse(path)) if path else ():
            if not isinstance(node, ast.ImportFrom) or node.names[0].name != "*":
                continue
            if found := self.resolve(self._absolute(module, node), name):
                return found
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path, parts = self.path(module), module.split(".")
        inside = len(parts) + (path is not None and path.name == "__init__.py")
        return ".".join([*parts[: inside - node.level], *filter(None, [node.module])])


def installed(name: str) -> Path | None:
    """Folder of a package of this environment."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def unpack(wheel: Path, folder: Path, build: str) -> Path:
    """Write a wheel's Python files to `folder`, and return the package there.

    build: what its version ends in from now on; vLLM asks that for what it was built for, and then
           runs its layers, though nothing compiled.
    """
    name = wheel.name.split("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        for file in archive.namelist():
            if file.endswith(".py"):
                archive.extract(file, folder)
            elif file.endswith(".dist-info/METADATA"):
                text = archive.read(file).decode()
                target = folder / f"{name}-{build}.dist-info" / "METADATA"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(re.sub(r"(?m)^(Version: .*)$", rf"\1+{build}", text))
    return folder / name


@functools.cache
def receivers(folder: Path, method: str) -> frozenset[str]:
    """Last names of the expressions that a method is called on anywhere in a package."""
    calls, found = re.compile(rf"(\w+)\.{method}\("), set()
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(calls.findall(text)) if method in text else set()
    return frozenset(found)


@functools.cache
def parse(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def members(node: ast.AST) -> dict[str, ast.AST]:
    """What binds each attribute in the body of a class, or as `self.name = …` in its methods."""
    result: dict[str, ast.AST] = {}
    body = getattr(node, "body", [])
    for function in (each for each in body if isinstance(each, Function)):
        for inner in ast.walk(function):
            for target in _targets(inner):
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    result.setdefault(target.attr, inner)
    for statement in _statements(node):
        result |= dict.fromkeys(_bound(statement), statement)
    return result


def signature(function: ast.AST) -> inspect.Signature:
    """Parameters of a function; a default is shown as None."""
    assert isinstance(function, Function)
    given, kind = function.args, inspect.Parameter
    plain = [*given.posonlyargs, *given.args]
    without = len(plain) - len(given.defaults)
    parameters = [
        kind(
            each.arg,
            kind.POSITIONAL_ONLY if i < len(given.posonlyargs) else kind.POSITIONAL_OR_KEYWORD,
            default=kind.empty if i < without else None,
        )
        for i, each in enumerate(plain)
    ]
    if given.vararg:
        parameters.append(kind(given.vararg.arg, kind.VAR_POSITIONAL))
    for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        empty = kind.empty if default is None else None
        parameters.append(kind(each.arg, kind.KEYWORD_ONLY, default=empty))
    if given.kwarg:
        parameters.append(kind(given.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters)


def call_signature(package: Package, found: Definition) -> inspect.Signature | None:
    """What a function or class takes; None where it cannot be told."""
    if isinstance(found.node, Function):
        return signature(found.node)
    if not isinstance(found.node, ast.ClassDef):
        return None
    if "dataclass" in decorators(found.node):
        kind = inspect.Parameter
        fields = [each for each in found.node.body if isinstance(each, ast.AnnAssign)]
        parameters = [
            kind(
                ast.unparse(each.target),
                kind.POSITIONAL_OR_KEYWORD,
                default=kind.empty if each.value is None else None,
            )
            for each in fields
        ]
        return inspect.Signature(parameters)
    method = package.member(found, "__init__")
    return without_self(method) if isinstance(method, Function) else None


def without_self(method: ast.AST) -> inspect.Signature:
    """What a method takes when it is called on an object."""
    given = signature(method)
    static = "staticmethod" in decorators(method)
    return given if static else given.replace(parameters=[*given.parameters.values()][1:])


def misfit(accepts: inspect.Signature, call: ast.Call) -> str | None:
    """Why a call cannot be made, or None. What `*` and `**` bring is taken to be right."""
    starred = any(isinstance(each, ast.Starred) for each in call.args)
    named = {each.arg: None for each in call.keywords if each.arg is not None}
    open_ended = starred or len(named) < len(call.keywords)
    plain = [None for each in call.args if not isinstance(each, ast.Starred)]
    try:
        (accepts.bind_partial if open_ended else accepts.bind)(*plain, **named)
    except TypeError as error:
        return str(error)
    return None


def decorators(node: ast.AST) -> set[str]:
    """Names of a definition's decorators, without arguments and modules."""
    names = (ast.unparse(each).split("(")[0] for each in getattr(node, "decorator_list", []))
    return {name.rpartition(".")[2] for name in names}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Statements of a body, with those under `if`, `try` and `with`."""
    for field in ("body", "orelse", "finalbody", "handlers"):
        for statement in getattr(node, field, []):
            if isinstance(statement, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from _statements(statement)
            yield statement


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    names = (inner for target in _targets(node) for inner in ast.walk(target))
    return [inner.id for inner in names if isinstance(inner, ast.Name)]


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For) else []
