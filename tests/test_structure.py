"""The package's own structure: rooms on floors, no cycles, small files, nothing hidden from DVC."""

import ast
from pathlib import Path

import pytest

from cim import code
from conftest import ROOT

SOURCE = ROOT / "src" / "cim"
MODULES = {
    ".".join(("cim", *path.relative_to(SOURCE).with_suffix("").parts)): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name != "__init__.py"
}
# From the ground up: a room imports only from rooms before it, or from itself.
FLOORS = (
    "errors", "files", "params", "runs", "code", "images", "processes", "rewards", "fastvlm", "world", "encoders",
    "data", "gallery", "scorer", "score_files", "captioners", "train", "evaluation", "report", "pipeline", "cli",
)  # fmt: skip


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_stands_in_a_known_room():
    assert {room(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_what_stands_below_it(module):
    own = FLOORS.index(room(module))
    above = {name for name in code.imports(MODULES[module]) if name != "cim" and FLOORS.index(room(name)) > own}
    assert not above


def test_only_the_registries_know_the_small_world():
    users = {
        room(module)
        for module, path in MODULES.items()
        if any(name.startswith("cim.world") for name in code.imports(path)) and room(module) != "world"
    }
    assert users <= {"data", "evaluation", "pipeline"}


def test_no_module_imports_itself_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in code.imports(MODULES[module]) & set(MODULES):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_inits_hold_a_docstring_and_nothing_else():
    for path in SOURCE.rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_files_and_the_whole_stay_small():
    lines = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert max(lines.values()) <= 300, max(lines, key=lines.get)
    assert sum(lines.values()) <= 11_275, "what can a library do, and what is no longer needed?"


def test_a_digest_changes_with_code_and_not_with_prose(tmp_path, monkeypatch):
    package = tmp_path / "cim"
    package.mkdir()
    monkeypatch.setattr(code, "ROOT", package)
    (package / "low.py").write_text('"""Words."""\nX = 1\n')
    (package / "top.py").write_text("def f():\n    from cim import low\n    return low.X\n")

    def digest() -> str:
        code.imports.cache_clear()
        code._code.cache_clear()
        return code.digest("cim.top")

    before = digest()
    (package / "low.py").write_text('"""Other words."""\n\n# A comment.\nX = 1\n')
    assert digest() == before
    (package / "low.py").write_text('"""Words."""\nX = 2\n')
    assert digest() != before


def test_the_closure_follows_functions_own_imports():
    names = code.closure("cim.data.dataset")
    assert {"cim.data.dataset", "cim.data.manifest", "cim.world.dataset", "cim.errors"} <= set(names)
    assert all(isinstance(path, Path) and path.is_file() for path in names.values())
