from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["launch", "shardemb", "planner"]  # each may import those after it
PLANNER_MAY_IMPORT = {"numpy", "scipy", "pydantic", "yaml", "typer", "rich"}
# The first is held to it by test_html_report.py, the second by the tests of imports here.
IN_A_FUNCTION = {("planner/page.py", "plotly"), ("planner/cost/fit.py", "torch")}
HEAVY = ("torch", "torchrec", "ray")


@pytest.mark.parametrize(
    "module",
    [
        "planner",
        "planner.cli",
        "planner.sweep",
        "planner.cost.calibrate",
        "planner.cost.learned",
        "planner.learned_plan",
        "shardemb.config",
        "shardemb.planning",
        "shardemb.profiler.placement_tasks",
        "launch.cli",
    ],
)
def test_a_plan_needs_no_torch(module: str):
    """What plans and reads configs starts without torch, torchrec or ray, so it starts fast."""
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str):
    """launch imports shardemb, shardemb imports planner, and nothing imports the other way."""
    above = set(LAYERS[: LAYERS.index(layer)])
    assert [found for found in _imports(layer) if found[1] in above] == []


def test_the_planner_imports_only_light_libraries():
    """Apart from itself and the standard library planner/ uses six libraries, none of them
    torch, also inside functions."""
    allowed = PLANNER_MAY_IMPORT | sys.stdlib_module_names | {"planner"}
    found = {found for found in _imports("planner") if found[1] not in allowed}
    assert found - IN_A_FUNCTION == set()


def _imports(layer: str) -> Iterator[tuple[str, str]]:
    """(file, top-level name) of every absolute import below `layer`, wherever in the file."""
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield str(file.relative_to(ROOT)), name.partition(".")[0]


def test_public_names_are_what_they_name():
    """Each is there, and no module of its name hides it once that is imported."""
    code = (
        "import importlib, shardemb, types\n"
        "for name in shardemb.__all__:\n"
        "    importlib.import_module(shardemb._PUBLIC[name])\n"
        "print([n for n in shardemb.__all__ if isinstance(getattr(shardemb, n), types.ModuleType)])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
