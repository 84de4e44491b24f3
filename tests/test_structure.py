"""The house's order: which room may ask which, and how long a file or a function may be."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "dit_jax"
LINES, FUNCTION_LINES = 400, 60

# Rooms from the ground up; each may import from itself and from what it names, and nothing else.
GROUND = {"config", "ground"}
NETWORKS = {"models", "diffusion", "samplers", "data", "text", "interop"} | GROUND
ROOMS = {
    "config": set(),
    "ground": {"config"},  # the modules beside the rooms: files, processes, conditions, ...
    "models": GROUND,
    "diffusion": GROUND,
    "samplers": {"diffusion"} | GROUND,
    "interop": {"models"} | GROUND,
    "text": {"interop"} | GROUND,
    "data": {"interop", "text"} | GROUND,
    "runs": NETWORKS,
    "evaluation": {"runs"} | NETWORKS,
    "generation": {"runs", "evaluation"} | NETWORKS,
    "training": {"runs", "generation"} | NETWORKS,
    "planning": {"training", "generation", "runs"} | NETWORKS,
    "commands": {"planning", "training", "generation", "evaluation", "runs"} | NETWORKS,
}
OLD_NAMES = {"dit_jax.diffusion.samplers"}  # where these were before: it hands them on
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module):
    """The room of dit_jax.x.y; modules beside the rooms are of the ground."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in ROOMS else "ground"


def imported(path):
    """Names of the modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dit_jax":
            inside = node.module == "dit_jax"
            yield from (f"dit_jax.{alias.name}" for alias in node.names) if inside else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("dit_jax."))


def module_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_no_room_asks_one_above_it():
    wrong = []
    for path in FILES:
        if path.parent == PACKAGE and path.name in ("__init__.py", "__main__.py"):
            continue  # the public names, and the way in
        if module_of(path) in OLD_NAMES:
            continue
        here = room_of(module_of(path))
        for module in imported(path):
            if (there := room_of(module)) not in ROOMS[here] | {here}:
                wrong.append(f"{module_of(path)} ({here}) imports {module} ({there})")
    assert not wrong, "\n".join(wrong)


def test_rooms_stand_on_each_other_and_not_in_a_circle():
    standing: set[str] = set()
    for room, below in ROOMS.items():  # in their order
        assert below <= standing | {room, "ground"}, room
        standing.add(room)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} in line {node.lineno}"
