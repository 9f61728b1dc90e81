"""The house itself: imports run downward, files stay short, one way to fail and one way to write."""

import ast
import re

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("mala/*.py"), ROOT / "train.py", ROOT / "evaluate.py"])
FILES = [file for file in FILES if file.name != "__init__.py"]
names = [str(file.relative_to(ROOT)) for file in FILES]


def house_map() -> list[set[str]]:
    """The rows of the map in README.md, "The house", from the top: the files that each names."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## The house: a map of the code\n")[1].split("\n\n")[0]
    rows = [set(re.findall(r"(?:mala/)?\w+\.py", line)) for line in block.splitlines()]
    return [row for row in rows if row]


def imports(tree: ast.Module) -> set[str]:
    """The files of this project that one imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mala":
            found |= {f"mala/{alias.name}.py" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mala."):
            found.add(f"mala/{node.module.split('.')[1]}.py")
        elif isinstance(node, ast.Import):
            found |= {f"{alias.name.replace('.', '/')}.py" for alias in node.names if alias.name.split(".")[0] == "mala"}
    return found


def test_the_map_shows_every_file_once():
    shown = [file for row in house_map() for file in row]
    assert sorted(shown) == sorted(names)


@pytest.mark.parametrize("file", FILES, ids=names)
def test_imports_run_downward(file):
    rows = house_map()
    level = {name: number for number, row in enumerate(rows) for name in row}
    own = str(file.relative_to(ROOT))
    tree = ast.parse(file.read_text(encoding="utf-8"))
    upward = {name for name in imports(tree) if level[name] <= level[own]}
    assert not upward, f"{own} imports {upward}, which the map does not show below it"


@pytest.mark.parametrize("file", FILES, ids=names)
def test_a_file_is_read_in_one_sitting(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def calls(file) -> list[tuple[int, str, ast.Call]]:
    """(line, what is called, the call) of a file: `torch.load`, `open`, `write_text` …"""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(node.lineno, ast.unparse(node.func), node) for node in found]


@pytest.mark.parametrize("file", FILES, ids=names)
def test_there_is_one_way_to_fail_and_one_way_to_write(file):
    for line, called, call in calls(file):
        place = f"{file.name}:{line}"
        if called in ("sys.exit", "exit", "os._exit"):
            assert file.name in ("cli.py", "data.py"), (
                f"{place}: a user's mistake is a UserError; only mala/cli.py ends the program"
            )
        if called == "open":
            mode = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else "r"
            writers = ("checkpoint.py", "fetch.py", "log.py")  # safe files; a download's part; metrics.jsonl, line by line
            assert mode in ("r", "rb") or file.name in writers, f"{place}: write through atomic_file of mala/checkpoint.py"
        if called.endswith(("torch.load", "pickle.load", "pickle.loads", "np.load")):
            safe = any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)
            assert called == "torch.load" and safe, f"{place}: a pickle can run any code"
