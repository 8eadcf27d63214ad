"""The house: a room imports only from rooms above it, and few files lie loose (docs/architecture.md)."""

import ast
from pathlib import Path

import gradshield

HOUSE = Path(gradshield.__file__).parent
ROOMS = (
    *("base", "data", "models", "scoring", "threshold", "report", "screen", "evaluation", "training", "defenses"),
    *("tune", "review", "study", "api", "cli"),
)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.Module) -> set[str]:
    """Modules that the file imports at run time."""
    typed = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
        for n in ast.walk(i)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "gradshield" else {node.module}
    return {name for name in found if name.startswith("gradshield.")}


def test_a_room_imports_only_from_rooms_above_it():
    wrong = []
    for file in HOUSE.rglob("*.py"):
        place = file.relative_to(HOUSE).with_suffix("").parts[0]
        if place in ("__init__", "__main__"):
            continue
        for name in imported(ast.parse(file.read_text(encoding="utf-8"))):
            if ROOMS.index(room_of(name)) > ROOMS.index(place):
                wrong.append(f"{file.relative_to(HOUSE)} imports {name}")
    assert not wrong


def test_at_most_five_files_lie_loose_and_no_two_modules_share_a_name():
    assert len(list(HOUSE.glob("*.py"))) <= 5
    names = [f.stem for f in HOUSE.rglob("*.py") if not f.stem.startswith("__")]
    assert not {name for name in names if names.count(name) > 1} - {"base", "registry"}  # a contract each


def test_no_test_module_imports_another():
    wrong = []
    for file in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{file.name} imports {m}" for m in modules if m.rpartition(".")[2].startswith("test_")]
    assert not wrong
