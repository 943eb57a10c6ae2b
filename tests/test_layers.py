"""The floors of the house: which room may import which."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "medsd"
LEAVES = {"config", "data", "models", "objectives", "evaluation", "hub"}
ALLOWED = dict.fromkeys(LEAVES, set()) | {"inference": LEAVES, "training": LEAVES | {"inference"}, "report": LEAVES | {"inference"}}
FORBIDDEN = {
    "data": {"diffusers", "transformers"},
    "objectives": {"pydicom", "nibabel", "diffusers", "PIL"},
    "evaluation": {"pydicom", "nibabel", "diffusers", "PIL", "pathlib"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_is_below_it(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imports(path):
        if module.startswith("medsd.") and room in ALLOWED:
            other = room_of(module)
            assert other in {room, "errors", "output", "runtime", "randomness"} | ALLOWED[room], f"{path.name} imports {module}"
        assert not module.startswith("recipes"), f"{path.name} imports {module}"
        assert module.split(".")[0] not in FORBIDDEN.get(room, set()), f"{path.name} imports {module}"


def test_only_the_command_line_imports_the_parser():
    users = {path.name for path in PACKAGE.rglob("*.py") if "tyro" in set(imports(path))}
    assert users == {"commandline.py"}


def test_intensity_knows_no_file_format():
    assert not {"pydicom", "nibabel", "PIL"} & set(imports(PACKAGE / "data" / "intensity.py"))


def test_no_circle_within_a_room():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        name = "medsd." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[name] = {module for module in imports(path) if module.startswith("medsd.")}
    while free := [name for name in graph if not graph[name] & graph.keys() - {name}]:
        for name in free:
            del graph[name]
    assert not graph
