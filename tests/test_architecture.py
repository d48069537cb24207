"""The house: the docstring of `wsi_brush/__init__.py` is the order, and every import points up it."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

SPEC = importlib.util.find_spec("wsi_brush")
assert SPEC is not None
assert SPEC.origin is not None
PACKAGE = Path(SPEC.origin).parent
CHECKOUT = Path(__file__).parents[1]
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or not path.stem.startswith("__")]
FILES = [*sorted(PACKAGE.rglob("*.py")), *sorted((CHECKOUT / "plugins").rglob("*.py"))]
LONGEST = 420
BANNED = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
HEAVY = ("torch", "torchvision", "timm", "skimage", "scipy", "tifffile", "tiffslide", "openslide", "napari")


def order_in(docstring: str) -> list[str]:
    """The module names of a docstring: lines indented by four spaces, a name, blanks, what it is."""
    return re.findall(r"^ {4}([a-z_]\w*)\s{2,}\S", docstring, flags=re.MULTILINE)


def name_of(path: Path) -> str:
    """The listed name of a file: its own, or that of the folder that a module grew into."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def depth_of(path: Path) -> int:
    """How many folders below the package a file stands."""
    return len(path.relative_to(PACKAGE).parts) - 1


def siblings_of(source: str, depth: int = 0) -> Iterator[str]:
    """The listed modules that a file imports, at any depth: in functions, under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


def faults_in(source: str, depth: int = 0) -> Iterator[str]:
    """What a module of the package may not do, with the line it stands on."""
    for node in ast.walk(ast.parse(source)):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and node.level > depth + 1:
            yield f"{line}: import from above the package"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in names:
            if name.split(".")[0] in {
                "wsi_brush",
                "pickle",
                "cPickle",
                "dill",
                "joblib",
                "cloudpickle",
                "shelve",
                "marshal",
            }:
                yield f"{line}: import {name}"
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            yield f"{line}: torch.load"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "yaml.load"}:
            yield f"{line}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            yield from (f"{line}: {fault}" for fault in _faults_of_call(node))


def _faults_of_call(node: ast.Call) -> Iterator[str]:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if name in {"eval", "exec", "__import__"}:
        yield name
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        erases = keyword.arg == "mode" and value == "w" and method not in {"pad"} and name != "open"
        if erases or (keyword.arg == "overwrite" and value is True) or (keyword.arg == "allow_pickle" and value):
            yield f"{ast.unparse(node.func)}(..., {keyword.arg}={value!r})"


def test_the_docstring_lists_every_module() -> None:
    """Modules that are listed and not there yet are allowed; modules that are there and not listed are not."""
    order = order_in(ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text("utf-8")), clean=False) or "")
    assert len(order) > 10
    assert len(set(order)) == len(order)
    assert {name_of(path) for path in MODULES} <= set(order)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_up_the_list(path: Path) -> None:
    order = order_in((PACKAGE / "__init__.py").read_text("utf-8"))
    above = set(order[: order.index(name_of(path))])
    below = sorted(set(siblings_of(path.read_text("utf-8"), depth_of(path))) - above - {"__version__"})
    assert not below, f"{name_of(path)} imports {below}, which do not stand above it in wsi_brush/__init__.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_are_short_and_named_for_what_they_are(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST
    assert not BANNED & set(path.stem.split("_"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_unpickles_evaluates_or_erases(path: Path) -> None:
    assert list(faults_in(path.read_text("utf-8"), depth_of(path))) == []


def test_nothing_in_the_package_imports_the_plugin() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if "napari_wsi_brush" in path.read_text("utf-8")]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f():\n    import pickle", "import pickle"),
        ("import wsi_brush.grid", "import wsi_brush.grid"),
        ("from wsi_brush import grid", "import wsi_brush"),
        ("from ..grid import Grid", "above the package"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("from torch import load", "torch.load"),
        ("eval('1')", "eval"),
        ("zarr.open_group(path, mode='w')", "mode='w'"),
        ("zarr.create_array(path, overwrite=True)", "overwrite=True"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_planted_faults_are_found(source: str, fault: str) -> None:
    assert any(fault in line for line in faults_in(source))


def test_planted_imports_are_found() -> None:
    source = "from .grid import Grid\nif TYPE_CHECKING:\n    from . import cli\ndef f():\n    from .train.loop import g"
    assert set(siblings_of(source)) == {"grid", "cli", "train"}
    assert set(siblings_of("from .level import a\nfrom ..grid import Grid", depth=1)) == {"grid"}


def imported_by(code: str) -> set[str]:
    """The heavy packages in `sys.modules` after running `code` in a fresh interpreter."""
    script = f"{textwrap.dedent(code)}\nimport sys\nprint('loaded', *[n for n in {HEAVY!r} if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(out.stdout.splitlines()[-1].split()[1:])


def test_the_probe_sees_what_is_loaded() -> None:
    assert "scipy" in imported_by("import scipy")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert imported_by("import wsi_brush, wsi_brush.errors, wsi_brush.commit, wsi_brush.grid") == set()


def test_the_command_line_loads_nothing_heavy() -> None:
    if not (PACKAGE / "cli").is_dir():
        pytest.skip("wsi_brush.cli is not there yet")
    assert imported_by("import wsi_brush.cli") == set()
    help_text = """
        import sys
        from wsi_brush.cli import main
        sys.argv = ["wsi-brush", "--help"]
        try:
            main()
        except SystemExit as done:
            assert not done.code
    """
    assert imported_by(help_text) == set()


def test_importing_the_plugin_loads_no_torch() -> None:
    if not importlib.util.find_spec("napari_wsi_brush"):
        pytest.skip("the plugin is not installed")
    assert "torch" not in imported_by("import napari_wsi_brush.reader")


@pytest.mark.skipif(not os.environ.get("PYTHONSAFEPATH"), reason="only .ci/run asks for the installed package")
def test_the_installed_package_is_under_test() -> None:
    """With PYTHONSAFEPATH the checkout is not on the path, so what was not shipped is missed."""
    assert not PACKAGE.is_relative_to(CHECKOUT)
    assert "site-packages" in PACKAGE.parts
