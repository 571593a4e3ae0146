"""The rules of the house: which way imports point, what is importable where, documented ops, clean tools."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fpn_kernels

ROOT = Path(__file__).parent.parent
FOLDERS = {"fpn_kernels": "kernels", "fpn_engine": "engine", "fpn_export": "export"}
ALLOWED = {
    "fpn_kernels": {"fpn_kernels"},
    "fpn_engine": {"fpn_engine", "fpn_kernels"},
    "fpn_export": {"fpn_export", "fpn_engine", "fpn_kernels"},
}
COMMAND_LINE = ROOT / "engine" / "fpn_engine" / "cli"
HELP_SECONDS = 10.0  # far above the third of a second it takes, far below an import of torch on a busy machine
FUNCTIONS = [name for name in fpn_kernels.__all__ if inspect.isfunction(getattr(fpn_kernels, name))]


def find_imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether the import stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module), inside
        yield from find_imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def find_wrong_imports(source: str, package: str, command_line: bool) -> list[str]:
    """Our packages that ``source``, a module of ``package``, may not import."""
    allowed = ALLOWED[package]
    wrong = []
    for module, inside in find_imports(ast.parse(source)):
        top = module.partition(".")[0]
        if top in FOLDERS and top not in allowed and not (command_line and inside):
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_point_one_way(package: str) -> None:
    paths = sorted((ROOT / FOLDERS[package]).rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        assert find_wrong_imports(path.read_text(), package, COMMAND_LINE in path.parents) == [], path


@pytest.mark.parametrize(
    ("source", "package", "command_line", "wrong"),
    [
        ("import fpn_engine.spec", "fpn_kernels", False, ["fpn_engine.spec"]),
        ("from fpn_export import build", "fpn_engine", False, ["fpn_export"]),
        ("def f():\n    from fpn_export import build", "fpn_engine", False, ["fpn_export"]),
        ("def f():\n    from fpn_export import build", "fpn_engine", True, []),
        ("if True:\n    from fpn_export import build", "fpn_engine", True, ["fpn_export"]),
        ("from fpn_kernels import nms", "fpn_export", False, []),
    ],
)
def test_wrong_imports_would_be_seen(source: str, package: str, command_line: bool, wrong: list[str]) -> None:
    assert find_wrong_imports(source, package, command_line) == wrong


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_starts_without_heavy_imports() -> None:
    heavy = run_python(
        "import sys, fpn_engine, fpn_engine.cli.app\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'PIL', 'pycocotools', 'fpn_export'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    assert heavy.split() == []
    # Until the signals are taken care of nothing slow is imported: Ctrl-C would end in a traceback.
    assert (
        run_python("import sys, fpn_engine.cli; print('typer' in sys.modules, 'rich' in sys.modules)")
        == "False False\n"
    )


def test_help_is_quick() -> None:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "fpn_engine", "--help"], check=True, capture_output=True)
    assert time.monotonic() - start < HELP_SECONDS


def test_kernels_do_without_triton() -> None:
    run_python(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(f'no {name} here', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch, fpn_kernels\n"
        "boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1]])\n"
        "assert fpn_kernels.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1]\n"
        "assert 'triton' not in sys.modules"
    )


def test_kernels_stand_alone() -> None:
    code = "import sys, fpn_kernels; print(*({'fpn_engine', 'fpn_export', 'onnxruntime'} & set(sys.modules)))"
    assert run_python(code).split() == []


def test_every_op_is_public() -> None:
    assert fpn_kernels.__all__ == sorted(fpn_kernels.__all__)
    assert len(FUNCTIONS) > 10


@pytest.mark.parametrize("name", fpn_kernels.__all__)
def test_every_op_is_documented(name: str) -> None:
    op = getattr(fpn_kernels, name)
    text = op.__doc__ or ""
    assert len(text) > 20
    if name in FUNCTIONS and inspect.signature(op).parameters:
        assert "Args:" in text
        assert "Returns:" in text


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "--no-cache"], ["ruff", "format", "--check", "--no-cache"], ["mypy"]],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_tools_find_nothing(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
