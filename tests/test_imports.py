"""Order of the packages: no upward imports, no cycles, no private names of other modules."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the bottom up; packages on one line do not import each other. Modules in none of them, such as native.py of
# deco_kernels, are below all of them.
ORDER = (
    ("deco_kernels.backends",),
    ("deco_kernels.ops",),
    ("deco_kernels.model",),
    ("deco_kernels.flow",),
    ("deco_kernels.testing", "deco_kernels.integrations"),
    ("deco_kernels.training", "deco_kernels.__main__"),
    ("benchmarks.names",),
    ("benchmarks.ops",),
    ("benchmarks.harness",),
    ("benchmarks.report",),
    ("benchmarks.models", "benchmarks.static", "benchmarks.profiling"),
    ("benchmarks.run",),
    ("benchmarks",),
    ("python",),
)


# Programs in python/ import a module there, "python.NAME", as NAME.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("deco_kernels", "benchmarks", "python")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
}


@functools.cache
def imports_of(importer: str) -> list[tuple[str, str]]:
    """(own module, imported name or "") of every import of a module, including imports in functions."""
    found = []
    for node in ast.walk(ast.parse(MODULES[importer].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = source_of(importer, node)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.append((full, "") if own(importer, full) in MODULES else (source, alias.name))
    return [(own(importer, module), name) for module, name in found if own(importer, module) in MODULES]


def source_of(importer: str, node: ast.ImportFrom) -> str:
    """Absolute name of the module of an import."""
    parts = importer.split(".") + [""] * (MODULES[importer].name == "__init__.py")
    return ".".join([*parts[: -node.level], *filter(None, [node.module])] if node.level else [str(node.module)])


def own(importer: str, module: str) -> str:
    """Name of a module in MODULES."""
    return f"python.{module}" if importer.startswith("python.") and f"python.{module}" in MODULES else module


def place_of(module: str) -> tuple[int, str]:
    """Index and name of the innermost package in ORDER that contains the module; (-1, "") if none does."""
    places = [(index, package) for index, packages in enumerate(ORDER) for package in packages]
    holding = [place for place in places if f"{module}.".startswith(f"{place[1]}.")]
    return max(holding, key=lambda place: len(place[1]), default=(-1, ""))


def upward_imports() -> list[str]:
    upward = []
    for importer in MODULES:
        for module, _ in imports_of(importer):
            (from_level, from_package), (level, package) = place_of(importer), place_of(module)
            if from_package != package and from_level <= level:
                upward.append(f"{importer} imports {module}")
    return upward


def test_nothing_imports_upward():
    assert not upward_imports()


def test_an_upward_import_is_found(tmp_path, monkeypatch):
    """Also between packages on one line, inside functions and from programs; downward imports are none."""
    planted = {
        "deco_kernels.ops.planted": "from deco_kernels import native\ndef f(): from deco_kernels.model import deco\n",
        "deco_kernels.testing.planted": "import deco_kernels.integrations.swap\n",
        "benchmarks.planted": "import demo\nfrom python import demo\n",
    }
    for name, text in planted.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setitem(MODULES, name, tmp_path / name)
    assert upward_imports() == [
        "deco_kernels.ops.planted imports deco_kernels.model.deco",
        "deco_kernels.testing.planted imports deco_kernels.integrations.swap",
        "benchmarks.planted imports python.demo",
    ]


def test_no_circle():
    """Modules are removed once all their imports are removed; the rest is in a cycle or above one."""
    left = {name: {module for module, _ in imports_of(name)} - {name} for name in MODULES}
    while removable := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in removable:
            del left[name]
    assert not left


def test_no_private_name_of_another_module():
    found = [
        f"{importer} imports {name} of {module}"
        for importer in MODULES
        for module, name in imports_of(importer)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not found


def test_relative_imports_are_seen():
    modules = {module for module, _ in imports_of("deco_kernels.backends.triton.adaln_block")}
    assert "deco_kernels.backends.triton.launching" in modules


def test_the_order_is_that_of_the_tree():
    assert place_of("deco_kernels.native")[0] < place_of("deco_kernels.backends.cuda.calls")[0]
    assert place_of("benchmarks.harness.timing")[0] < place_of("benchmarks.__main__")[0] < place_of("python.demo")[0]


# Private names of public interfaces: named tuples, os and nn.Module.
ALLOWED = {"_replace", "_asdict", "_fields", "_exit", "_parameters"}
OF_OTHERS = {"self", "cls", "torch", "driver"}  # allowed owners of private names: test classes, PyTorch, Triton


def private_names_in(test: Path) -> list[str]:
    """Private attributes that a test file reads, or sets with `monkeypatch.setattr(owner, "_name", ...)`."""

    def begins(node: ast.expr) -> str:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    found = []
    for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            owner, name = node.args[0], getattr(node.args[1], "value", "")
        else:
            continue
        if str(name).startswith("_") and not name.startswith("__") and name not in ALLOWED:
            found += [f"{test.relative_to(ROOT)}:{node.lineno} {name}"] if begins(owner) not in OF_OTHERS else []
    return found


def test_tests_reach_public_names_alone():
    assert not [found for test in sorted(ROOT.glob("tests/**/*.py")) for found in private_names_in(test)]
