"""The direction of imports, and what no module of the library may hold (architecture.md), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import openmm_hvpcg

ROOT = Path(openmm_hvpcg.__file__).parent
FOUNDATION = {
    "",
    "units",
    "errors",
    "_version",
    "storage",
    "progress",
    "cores",
    "quiet",
    "frames",
    "mapping",
    "prior_terms",
    "potential",
    "config",
}

#: Room (first part of a module's name) -> the rooms it may import beside itself; foundation is open to all.
MAY_IMPORT = {
    "atomistic": set(),
    "simulation": set(),
    "analysis": set(),
    "training": {"atomistic"},
    "doctor": {"simulation"},
    "study": {"atomistic", "training", "simulation", "analysis"},
    "cli": {"atomistic", "training", "simulation", "analysis", "study", "doctor"},
    "__main__": {"cli"},
    **{name: set() for name in FOUNDATION},
}

#: Single modules that may do more: what is exported is checked in OpenMM first.
EXCEPTIONS = {"training.export": {"simulation"}}

NUMPY_ALONE = ("mapping", "prior_terms", "training.labels.hvp", "training.labels.force_maps")


def find_modules() -> dict[str, ast.Module]:
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return modules


MODULES = find_modules()


def find_imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute names of all modules imported, inside functions too."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            found.add(node.module or "")
            # ``from package import module``
            found |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}".removeprefix("openmm_hvpcg.") in MODULES
            }
    return found


def find_own_imports(module: str) -> set[str]:
    """Names inside the package, "" for the package itself."""
    names = find_imports(ast.walk(MODULES[module]))
    return {n.removeprefix("openmm_hvpcg").removeprefix(".") for n in names if n.split(".")[0] == "openmm_hvpcg"}


def find_foreign_imports(nodes: Iterator[ast.AST]) -> set[str]:
    tops = {name.split(".")[0] for name in find_imports(nodes)}
    return tops - set(sys.stdlib_module_names) - {"openmm_hvpcg", "__future__"}


def walk_at_run_time(tree: ast.Module, skip: tuple[str, ...] = ()) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING`` and inside the functions named in ``skip``."""
    for node in ast.iter_child_nodes(tree):
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if guarded or (isinstance(node, ast.FunctionDef) and node.name in skip):
            continue
        yield node
        yield from walk_at_run_time(node, skip)  # type: ignore[arg-type]


def test_the_rooms_of_the_package_are_known() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    room = module.split(".")[0]
    allowed = FOUNDATION | {room} | MAY_IMPORT[room] | EXCEPTIONS.get(module, set())
    if room in FOUNDATION:
        allowed = FOUNDATION
    wrong = {name for name in find_own_imports(module) if name.split(".")[0] not in allowed}
    assert not wrong, f"{module} must not import {wrong}"


def test_foundation_modules_have_no_cycle() -> None:
    left = {name: find_own_imports(name) & FOUNDATION for name in FOUNDATION}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"imports go round in a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("module", NUMPY_ALONE)
def test_numpy_alone(module: str) -> None:
    methods = ("to_topology", "save_pdb") if module == "mapping" else ()
    assert find_foreign_imports(walk_at_run_time(MODULES[module], methods)) <= {"numpy"}
    assert {name.split(".")[0] for name in find_own_imports(module)} <= FOUNDATION


def test_openmmtorch_is_imported_in_one_module() -> None:
    found = [m for m, tree in MODULES.items() if "openmmtorch" in find_foreign_imports(ast.walk(tree))]
    assert found == ["simulation.backends"]


def test_torchscript_is_compiled_in_one_module() -> None:
    found = {m for m, tree in MODULES.items() if find_names(tree, "torch.jit.script", "torch.jit.trace")}
    # The doctor compiles a throw-away spring: it has to try TorchForce where there is no potential yet.
    assert len(found - {"doctor"}) == 1
    assert (found - {"doctor"}).pop() in ("training.export", "training.models.total")


def find_names(tree: ast.Module, *names: str) -> list[int]:
    """Lines where one of the dotted names is used."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in names
    ]


@pytest.mark.parametrize("module", MODULES)
def test_no_print_pickle_or_assert(module: str) -> None:
    tree = MODULES[module]
    assert not find_names(tree, "print", "exit", "quit", "breakpoint", "os._exit")
    assert not find_foreign_imports(ast.walk(tree)) & {"pickle", "cloudpickle", "dill"}
    assert not find_imports(ast.walk(tree)) & {"pickle", "shelve", "marshal"}
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_joblib_runs_processes_and_writes_no_files() -> None:
    users = {m for m, tree in MODULES.items() if "joblib" in find_foreign_imports(ast.walk(tree))}
    assert users == {"training.labels.held"}
    for module in users:
        assert not find_names(MODULES[module], "joblib.dump", "joblib.load", "joblib.Memory")
        assert not {n for n in find_imports(ast.walk(MODULES[module])) if n.startswith("joblib.")}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "--defaults"], ["run", "--help"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from openmm_hvpcg.cli import main; sys.argv = ['openmm-hvpcg', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "finally: print('MODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    shown, _, modules = done.stdout.partition("MODULES")
    assert shown.strip()
    heavy = {"torch", "openmm", "mdtraj", "lightning", "openmmtorch", "deeptime", "matplotlib", "zarr", "parmed"}
    assert not heavy & set(modules.split())
