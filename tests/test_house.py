"""Test the rules of the code: imports run downward, files are short, one way to fail and one to write."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [ROOT / "train.py", ROOT / "evaluate.py"]
PACKAGE = sorted(ROOT.glob("mala/**/*.py"))
FILES = sorted([*(file for file in PACKAGE if file.name != "__init__.py"), *SCRIPTS])
TOOLS = sorted(file for file in ROOT.glob("tools/*.py") if file.name != "__init__.py")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


names = [name_of(file) for file in FILES]


def house_map() -> list[list[str]]:
    """Return the rows of the map in README.md ("The house"), from the top, each as the list of its files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("\n## The house: a map of the code\n")[1].split("\n\n")[0]
    rows = [re.findall(r"[\w/]+\.py", line) for line in block.splitlines()]
    return [[name if (ROOT / name) in SCRIPTS else f"mala/{name}" for name in row] for row in rows if row]


def is_main_guard(node: ast.AST) -> bool:
    """Return whether a node is `if __name__ == "__main__":`. Its block runs only if the file is a command."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(node: ast.AST) -> set[str]:
    """Return the dotted names that are imported anywhere below `node`, except in a main guard."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if is_main_guard(child):
            continue
        if isinstance(child, ast.ImportFrom):
            assert not child.level, "an import from `.` hides what it imports"
            found |= {child.module, *(f"{child.module}.{alias.name}" for alias in child.names)}
        elif isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        found |= imports(child)
    return found


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_the_map_shows_every_file_once():
    shown = [file for row in house_map() for file in row]
    assert sorted(shown) == sorted(names)


@pytest.mark.parametrize("file", [*TOOLS, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=name_of)
def test_what_is_imported_is_there(file):
    """Check this also in scripts that no test runs."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("mala", "tools")):
            module = importlib.import_module(node.module)
            for alias in node.names:  # a submodule is an attribute only after some import of it
                name = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(name), name


@pytest.mark.parametrize("file", FILES, ids=names)
def test_imports_run_downward(file):
    level = {name: number for number, row in enumerate(house_map()) for name in row}
    own = name_of(file)
    imported = {f"{module.replace('.', '/')}.py" for module in imports(parse(file))} & set(names)
    upward = {name for name in imported if level[name] <= level[own]}
    assert not upward, f"{own} imports {upward}, but the map does not show that below it"


@pytest.mark.parametrize("file", FILES, ids=names)
def test_the_package_stands_without_tools(file):
    """Only the scripts import tools. A file of the package may do so only when it runs as a command."""
    for module in imports(parse(file)):
        if module.split(".")[0] == "tools":
            assert file in SCRIPTS, f"{name_of(file)} imports {module}"


@pytest.mark.parametrize("file", [*FILES, *TOOLS], ids=map(name_of, [*FILES, *TOOLS]))
def test_a_file_is_read_in_one_sitting_and_a_function_at_a_glance(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 350
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            assert node.end_lineno - first + 1 <= 80, f"{file.name}:{first}: {node.name}"


def test_the_package_is_small():
    assert len([entry for entry in (ROOT / "mala").iterdir() if entry.name != "__pycache__"]) <= 14
    texts = [file.read_text(encoding="utf-8") for file in [*PACKAGE, *SCRIPTS]]
    assert sum(text.count("# fmt: skip") for text in texts) < 15
    assert sum(len(text.splitlines()) for text in texts) <= 5500
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def calls(file: Path) -> list[tuple[int, str, ast.Call]]:
    """Return (line, name, call) for each call in a file: `torch.load`, `open`, `write_text`, …"""
    found = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Call)]
    return [(node.lineno, ast.unparse(node.func), node) for node in found]


ENDS = {
    "sys.exit": "mala/cli.py",
    "exit": "mala/cli.py",
    "os._exit": "mala/data.py",
}  # os._exit ends a worker process
WRITERS = (  # safe files; metrics.jsonl, line by line; parts of downloads
    "mala/storage/files.py",
    "tools/run_log.py",
    "tools/fetch.py",
)


@pytest.mark.parametrize("file", [*FILES, *TOOLS], ids=map(name_of, [*FILES, *TOOLS]))
def test_there_is_one_way_to_fail_and_one_way_to_write(file):
    for line, called, call in calls(file):
        place = f"{name_of(file)}:{line}"
        if called in ENDS:
            may = name_of(file) == ENDS[called]
            assert may, f"{place}: raise UserError for a user's mistake; only mala/cli.py ends the program"
        if called == "open":
            mode = (
                call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else "r"
            )
            may = mode in ("r", "rb") or name_of(file) in WRITERS
            assert may, f"{place}: write with atomic_file of mala/storage/files.py"
        if called.endswith(("torch.load", "pickle.load", "pickle.loads", "np.load")):
            safe = any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
                for keyword in call.keywords
            )
            assert called == "torch.load" and safe, f"{place}: a pickle can run any code"
