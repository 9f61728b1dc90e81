"""Test the documents: code prints what they show, commands parse, and named files and functions exist."""

import ast
import doctest
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import evaluate
import train
from mala import cli
from tools import generate_command, get_benchmark, make_tiny_llama, merge_command, vocab_commands

DOCUMENTS = {
    str(file.relative_to(ROOT)): file for file in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(name: str) -> list[tuple[str, str]]:
    """Return (language, text) of each fenced block."""
    return [block[1:] for block in BLOCK.findall(DOCUMENTS[name].read_text(encoding="utf-8"))]


def test_the_walkthrough_runs_and_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    names, told = {}, []
    runner = doctest.DocTestRunner(verbose=False)
    for number, (language, text) in enumerate(blocks("docs/walkthrough.md"), 1):
        assert language == "pycon", f"block {number} is {language!r}: nothing would run it"
        block = doctest.DocTestParser().get_doctest(text, names, f"block {number}", "docs/walkthrough.md", 0)
        runner.run(block, out=told.append, clear_globs=False)
        names = block.globs
    assert runner.summarize(verbose=False).failed == 0, "".join(told)
    assert runner.tries > 100


def commands() -> list[tuple[str, str]]:
    """Return (document, command) for each command of this project in a shell block, joined to one line."""
    found = []
    for name in DOCUMENTS:
        for language, text in blocks(name):
            if language == "sh":
                lines = text.replace("\\\n", " ").replace(" && ", "\n").splitlines()
                found += [
                    (name, line)
                    for line in lines
                    if re.search(r"(?<![/\w])(train|evaluate)\.py|-m (mala|tools)\.", line)
                ]
    return found


@pytest.mark.parametrize("document, command", commands())
def test_every_command_is_understood(document, command, monkeypatch):
    """Parse the flags, and make all checks that need no files. Nothing runs."""
    words = shlex.split(command, comments=True)
    monkeypatch.chdir(ROOT)
    if "train.py" in words or "evaluate.py" in words:
        script = train if "train.py" in words else evaluate
        argv = words[words.index(script.__name__ + ".py") + 1 :]
        for flag in ("--model", "--adapter", "--data", "--out"):
            assert argv.count(flag) <= 1
        cli.parse(script.Settings, "", argv)
        return
    module = words[words.index("-m") + 1]
    argv = words[words.index("-m") + 2 :]
    plain = {"mala.generate": generate_command, "tools.make_tiny_llama": make_tiny_llama}
    if module in plain:
        cli.parse(plain[module].Settings, "", argv)
        return
    commands = {"mala.vocab": vocab_commands, "mala.lora": merge_command}
    commands["tools.get_benchmark"] = get_benchmark
    cli.parse_command(module, commands[module].COMMANDS, argv)


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_names_is_there(name):
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    for file in re.findall(r"`((?:mala|tests|benchmarks|configs|tools|docs|assets)/[\w./-]+\.\w+)`", text):
        assert (ROOT / file).exists(), f"{name}: there is no {file}"
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", BLOCK.sub("", text)):
        target = DOCUMENTS[name].parent / link if link else DOCUMENTS[name]
        assert "://" in link or target.exists(), f"{name}: there is no {link}"
        if anchor and "://" not in link:
            assert anchor in anchors(target), f"{name}: {link} has no heading #{anchor}"
    # Match `name` in `file.py`, `name` (`file.py`), `name`, `file.py`, and several names before a file.
    one_name = r"`(?![\w.]*\.py`)[\w.]+`"
    place = r"`((?:mala/(?:\w+/)*|tools/)?\w+\.py)`"
    for names, file in re.findall(rf"((?:{one_name}(?:, | and | or )?)+) ?(?:in |\()?{place}", text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for statement in tree.body:  # variables of the module, not of its functions
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                named = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
                defined |= {node.id for node in named if isinstance(node.ctx, ast.Store)}
        for one in re.findall(r"`([\w.]+)`", names):
            assert one.split(".")[-1] in defined, f"{name}: there is no {one} in {file}"
