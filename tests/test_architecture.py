"""The house of docs and design: a folder imports only from those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedlens

SOURCE = Path(fedlens.__file__).parent
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))

PIECES = {"errors", "trees", "memory"}  # small shared pieces, open to all
ROOMS = ["language", "compiler", "privacy", "runtime", "data", "learning", "ledger", "report", "study", "compat", "cli"]
# A ledger is a format that stands alone: what computes may change without it, and it is read without JAX.
MAY_IMPORT = {room: set(ROOMS[:place]) | PIECES for place, room in enumerate(ROOMS)} | {
    "ledger": PIECES,
    "errors": set(),
    "memory": set(),
    "trees": {"errors"},
    "__init__": set(),  # names are loaded when they are used
}


def room_of(module: Path) -> str:
    """The folder that a module is in, or its own name at the top."""
    return module.parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """The folders and modules of fedlens that a module's import statements name, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"Expected absolute imports, found a relative one in line {node.lineno}."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fedlens" and rest != "__version__":
                # A name that the package re-exports counts as its module: fedlens.Ledger is fedlens.ledger.
                home = fedlens._HOMES.get(rest, name).removeprefix("fedlens").removeprefix(".")
                found.add(home.split(".")[0] or "__init__")
    return found


def test_there_are_modules():
    assert {room_of(module) for module in MODULES} >= {"language", "compiler", "runtime", "errors", "trees"}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_from_the_rooms_above_its_own(module):
    room = room_of(module)
    assert room in MAY_IMPORT, f"{module} is in no room of the house: add it to ROOMS."
    wrong = imported_rooms((SOURCE / module).read_text()) - MAY_IMPORT[room] - {room}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}, and may not"


def test_imports_are_found_in_every_form():
    source = (
        "import fedlens.data.digits\nfrom fedlens import trees, __version__, Ledger\n"
        "def f():\n    from fedlens.cli import main\n"
    )
    assert imported_rooms(source) == {"data", "trees", "ledger", "cli"}
    assert imported_rooms("import fedlens as fed") == {"__init__"}
