"""Which module may import which."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fhe", "weights", "jaxgpt2")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """The modules and names that a module imports anywhere, in functions and for types too: dotted and absolute."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def dependencies(module: str) -> set[str]:
    """The modules of ours that a module imports.

    `from package import name` depends on the module of that name if there is one, else on the package itself.
    """
    found = set()
    for name in imports(module):
        parts = name.split(".")
        known = [".".join(parts[:size]) for size in range(len(parts), 0, -1)]
        found |= set([one for one in known if one in FILES][:1])
    return found - {module}


def a_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or an empty list."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for other in sorted(graph[path[-1]]):
            if other in path:
                return [*path[path.index(other) :], other]
            if other not in done and (cycle := search([*path, other])):
                return cycle
        done.add(path[-1])
        return []

    return next((cycle for module in graph if module not in done and (cycle := search([module]))), [])


@pytest.mark.parametrize("package", ["fhe", "weights"])
def test_a_library_imports_nothing_else_of_ours(package):
    others = {other for module in FILES if module.split(".")[0] == package for other in dependencies(module)}
    assert {other.split(".")[0] for other in others} <= {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other(package):
    modules = [module for module in FILES if module.split(".")[0] == package]
    graph = {module: dependencies(module) & set(modules) for module in modules}
    assert a_cycle(graph) == []


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("tenseal", ("fhe/ckks/seal.py", "fhe/rlwe/client.py")), ("concrete", ("fhe/tfhe/concrete.py",))],
)
def test_one_file_for_each_engine_imports_its_library(library, allowed):
    files = {
        str(path.relative_to(ROOT))
        for module, path in FILES.items()
        if any(name.split(".")[0] == library for name in imports(module))
    }
    assert files == {name for name in allowed if (ROOT / name).exists()}


def test_cycles_are_found():
    assert a_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert a_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
