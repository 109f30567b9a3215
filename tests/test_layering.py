"""Imports point downward only: the layer table of the package, and no cycles."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "zoscale"

LAYERS = [
    {"grouping"},
    {
        "config", "devices", "lanes", "local_job", "mesh", "meters", "noise", "passes", "phases", "stillness",
        "tracking",
    },
    {
        "agreement", "blackbox", "comparison", "launcher", "metrics", "preemption", "provenance", "run_directory",
        "shard_groups", "shards", "slurm", "tasks", "watchdog",
    },
    {"adapters", "data", "fingerprint", "partitions", "probes"},
    {"estimators", "models", "objectives"},
    {"optim", "evaluate", "placement"},
    {"forward", "methods", "nvme", "progress", "scoring"},
    {"backward", "rehearsal", "runtime"},
    {"step"},
    {"engine", "first_order", "release", "rounding", "run_meters"},
    {"assembly", "smoke"},
    {"plan", "recovery", "submit"},
    {"doctor", "run_report", "trainer"},
    {"evaluation_job", "run"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
LAZY = {"zoscale"}  # the package's own front names its modules lazily


def test_the_table_names_every_module() -> None:
    found = {
        path.stem if path.suffix else path.name
        for path in PACKAGE.iterdir()
        if path.name == "__main__.py" or path.name[0] not in "_."
    }
    assert found == set(LEVEL)


def test_imports_point_downward() -> None:
    upward = [
        f"{user} (layer {LEVEL[user]}) imports {used} (layer {LEVEL[used]})"
        for user, used in sorted(edges())
        if user != used and LEVEL[used] >= LEVEL[user]
    ]
    assert not upward


def test_there_is_no_cycle_between_files() -> None:
    graph = file_graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for used in sorted(graph[name]):
                visit(used, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_only_shards_reads_deepspeed_attributes() -> None:
    """Also through getattr: no name that starts with ds_ appears in the code of other modules."""
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            )
            if isinstance(name, str) and name.startswith("ds_") and name.isidentifier():
                readers.add(path.stem)
    assert readers == {"shards"}


def test_no_pickle_is_loaded() -> None:
    loaders = {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in loaders, f"{path.name}:{node.lineno}"


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }


def file_graph() -> dict[str, set[str]]:
    known = modules()
    return {name: {used for used in imports(path) if used in known and used != name} for name, path in known.items()}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in the file."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "zoscale":
            base = node.module.removeprefix("zoscale").lstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".lstrip(".")
                found.add(deeper if deeper in known else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("zoscale.") for alias in node.names if alias.name.startswith("zoscale.")}
    return found - {""}


def edges() -> set[tuple[str, str]]:
    return {(user.split(".")[0], used.split(".")[0]) for user, used_all in file_graph().items() for used in used_all}
