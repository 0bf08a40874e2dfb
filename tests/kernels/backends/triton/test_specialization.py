"""Numbers that Triton may not take for constants.

An argument that is 1 becomes a constant, which has no `to`, so a kernel that converts it would fail
for that value alone. Triton's interpreter does not show it.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
FILES = [
    *(ROOT / "kernels" / "precalib_kernels" / "backends" / "triton").glob("*.py"),
    *(ROOT / "offline_quantize" / "method").glob("*_triton.py"),
]


def kernels(text):
    """Functions with `triton.jit` that are launched, and what each keeps from becoming constant."""
    tree = ast.parse(text)
    launched = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
    }
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name not in launched:
            continue
        for mark in node.decorator_list:
            if "jit" in ast.unparse(mark):
                words = mark.keywords if isinstance(mark, ast.Call) else []
                kept = [word.value for word in words if word.arg == "do_not_specialize"]
                names = {
                    leaf.value
                    for value in kept
                    for leaf in ast.walk(value)
                    if isinstance(leaf, ast.Constant)
                }
                yield node, names


def converted(function):
    """Parameters that are converted as they are: `rows.to(…)`."""
    parameters = {argument.arg for argument in function.args.args}
    return {
        node.func.value.id
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in parameters
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_numbers_that_are_converted_are_not_specialized(file):
    for function, kept in kernels(file.read_text()):
        assert converted(function) <= kept, function.name


def test_kernels_are_found():
    found = [function.name for file in FILES for function, _ in kernels(file.read_text())]
    assert found.count("search_kernel") == 2
    assert {"trace_kernel", "push_kernel"} <= set(found)
    text = "@triton.jit\ndef f(n):\n    n.to(tl.int64)\n\nf[(1,)](1)\n"
    (function, kept), *_ = kernels(text)
    assert (converted(function), kept) == ({"n"}, set())
