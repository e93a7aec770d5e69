"""Which code a result depends on: the modules that another one imports, directly or not, and a digest of them."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent


def closure(*modules: str) -> dict[str, Path]:
    """The given modules and every module of this package that they import, at any place in their code.

    An __init__ that holds only a docstring is left out, since nothing depends on it.

    Returns:
        Module name to file, sorted by name.
    """
    found: dict[str, Path] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = _file(name)
            pending += imports(found[name])
    return {name: path for name, path in sorted(found.items()) if _code(path).body}


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of this package that a file imports, functions' own imports included."""
    return frozenset(imported(path.read_text(encoding="utf-8")))


def imported(source: str) -> Iterator[str]:
    """The same for source code, such as a notebook's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cim")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cim":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _file(inner).is_file() else node.module


def digest(*modules: str) -> str:
    """Short SHA-256 of the code of the modules' closure; comments, docstrings and layout do not change it."""
    text = "".join(f"{name}:{ast.dump(_code(path))}\n" for name, path in closure(*modules).items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _code(path: Path) -> ast.Module:
    """The syntax tree of a file without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
