"""Imports point down the floors of the design; siblings do not import each other; start-up stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import classiclm

ROOT = Path(classiclm.__file__).parent
FLOORS = {
    "errors": 0, "files": 0, "extras": 0,
    "config": 1, "recipe": 1, "nn": 1,
    "models": 2, "data": 2, "objectives": 2, "optim": 2,
    "train": 3, "generate": 3, "evaluate": 3, "lens": 3,
    "convert": 4, "registry": 4, "serve": 4,
    "claims": 5, "commands": 5,
}  # fmt: skip
ALLOWED = {
    ("nn", "generate"),  # the models' base class: `model.generate`, imported when called
    ("evaluate", "generate"),
    ("files", "errors"),
    ("extras", "errors"),
    ("recipe", "config"),
    ("commands", "claims"),
}
TOP = ("__init__", "__main__", "cli")  # the entry points may name anything


def imports_of(path: Path) -> set[str]:
    """The parts of classiclm that a file imports, late imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "classiclm":
            names += [f"classiclm.{alias.name}" for alias in node.names if alias.name in FLOORS]
        found |= {name.split(".")[1] for name in names if name.startswith("classiclm.")}
    return found


def modules() -> list[tuple[str, Path]]:
    paths = sorted(ROOT.rglob("*.py"))
    return [(path.relative_to(ROOT).parts[0].removesuffix(".py"), path) for path in paths]


def test_every_part_has_a_floor():
    assert {part for part, _ in modules()} - set(TOP) <= set(FLOORS)


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for part, path in modules()
        if part not in TOP
        for target in imports_of(path)
        if target != part and (part, target) not in ALLOWED and FLOORS[target] >= FLOORS[part]
    ]
    assert not wrong


def test_the_checker_sees_an_upward_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from classiclm.train import trainer\n    from classiclm import registry\n")
    assert imports_of(bad) == {"train", "registry"}


def test_the_trainer_knows_no_model_by_name():
    text = "".join(path.read_text().lower() for part, path in modules() if part == "train")
    assert "gpt" not in text
    assert "bert" not in text


def test_no_unsafe_loading_or_code_from_data():
    forbidden = {"pickle", "marshal", "shelve", "jinja2", "dill"}
    calls = {"eval", "exec", "compile"}
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert (ast.unparse(node.func)) not in {"torch.load", "yaml.load", "os.system", "np.load"}, path


def test_the_core_does_without_transformers():
    code = (
        "import sys, classiclm.commands.train, classiclm.commands.generate, classiclm.commands.evaluate\n"
        "print('transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_importing_the_package_is_light_and_its_names_are_lazy():
    code = "import sys, classiclm; a = 'torch' in sys.modules; classiclm.GPT2; print(a, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]
