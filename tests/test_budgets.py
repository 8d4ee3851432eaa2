"""Size budgets: a file that outgrows its reader is split, a function likewise, and attention stays one thing."""

import ast
import inspect
import statistics
from pathlib import Path

import classiclm
from classiclm.nn import blocks
from classiclm.nn.attention import MultiHeadAttention

ROOT = Path(classiclm.__file__).parent
FILES = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def function_lengths() -> list[int]:
    nodes = [node for text in FILES.values() for node in ast.walk(ast.parse(text))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sorted(node.end_lineno - node.lineno + 1 for node in functions)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep ifs, loops, withs and tries go in a function."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        inner = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try) and not chained
        deepest = max(deepest, nesting(child, depth + inner))
    return deepest


def test_no_file_has_more_than_400_lines():
    assert {
        str(path.relative_to(ROOT)): text.count("\n") for path, text in FILES.items() if text.count("\n") > 400
    } == {}


def test_functions_are_short():
    lengths = function_lengths()
    assert statistics.median(lengths) <= 12
    assert lengths[int(0.9 * len(lengths))] <= 45
    assert lengths[-1] <= 60


def test_nesting_is_at_most_three():
    deep = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path, text in FILES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and nesting(node) > 3
    ]
    assert deep == []


def test_nn_stays_under_1200_lines():
    assert sum(text.count("\n") for path, text in FILES.items() if path.parent.name == "nn") <= 1200


def test_attention_takes_at_most_8_arguments():
    assert len(inspect.signature(MultiHeadAttention.__init__).parameters) - 1 <= 8


def test_blocks_have_no_switch_but_bias_and_no_more_than_6_classes():
    classes = [c for c in vars(blocks).values() if inspect.isclass(c) and issubclass(c, blocks.Block)]
    assert len(classes) - 1 <= 6
    parameters = inspect.signature(blocks.Block.__init__).parameters.values()
    assert [p.name for p in parameters if p.annotation is bool] == ["bias"]
    assert [p.name for p in parameters if p.annotation is str] == ["act"]
    assert all("__init__" not in vars(c) for c in classes if c is not blocks.Block)


def test_public_signatures_are_typed_and_public_names_documented():
    untyped, silent = [], []
    for path, text in FILES.items():
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                silent.append(f"{path.name}: {node.name}")
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                if node.returns is None or any(a.annotation is None for a in arguments):
                    untyped.append(f"{path.name}: {node.name}")
    assert untyped == []
    assert silent == []
