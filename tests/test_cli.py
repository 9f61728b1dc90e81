"""Test mala.cli: settings from defaults, a TOML file and flags."""

from dataclasses import dataclass

import pytest

from mala.cli import UserError, option, parse, run


@dataclass
class Settings:
    config: str | None = option(None, "a recipe")
    steps: int = option(10, "steps, 100 % of them")
    lr: float = option(0.1, "rate")
    limit: int | None = option(None, "limit")
    names: tuple[str, ...] = option(("a", "b"), "names")
    flag: bool = option(False, "flag")
    kind: str = option("one", "kind", choices=("one", "two"))


def test_defaults_then_file_then_flags(tmp_path):
    assert parse(Settings, "", []) == Settings()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('steps = 3\nlr = 1\nlimit = 5\nnames = ["x"]\nflag = true\nkind = "two"\n')
    filled = parse(Settings, "", ["--config", str(recipe), "--steps", "7", "--no-flag"])
    assert filled == Settings(str(recipe), 7, 1.0, 5, ("x",), False, "two") and type(filled.lr) is float
    assert parse(Settings, "", ["--names", "p,q", "--flag"]) == Settings(names=("p", "q"), flag=True)


BAD_FILES = {
    "step = 3": r"unknown option 'step'; did you mean 'steps'\?",
    "zzz = 3": r"unknown option 'zzz'; expected one of steps, lr",
    "config = 'x'": r"unknown option 'config'",
    "steps = '3'": r"steps is '3', expected int",
    "steps = 1.5": r"steps is 1\.5, expected int",
    "steps = true": r"steps is True, expected int",
    "names = 'a'": r"names is 'a', expected a list of strings",
    "names = [1]": r"names is \[1\], expected a list of strings",
    "kind = 'three'": r"kind is 'three', expected one of one, two",
    "kind = true": r"kind is True, expected one of one, two",
    "steps = ": r"not a TOML file: Invalid value",
    "[table]\nsteps = 3": r"unknown option 'table'",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_bad_recipe_is_one_sentence(content, tmp_path):
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.toml: " + BAD_FILES[content]):
        parse(Settings, "", ["--config", str(tmp_path / "recipe.toml")])


@pytest.mark.parametrize(
    "argv", [["--stepz", "3"], ["--steps", "x"], ["--kind", "three"], ["--st", "3"], ["extra"]]
)
def test_a_bad_flag_is_one_sentence(argv):
    with pytest.raises(UserError, match="--help"):
        parse(Settings, "", argv)
    with pytest.raises(UserError, match="there is no such recipe"):
        parse(Settings, "", ["--config", "/nowhere.toml"])


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Settings, "what it does", ["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "what it does" in printed and "steps, 100 % of them [10]" in printed


def test_run_turns_a_users_mistake_into_status_1_and_lets_a_bug_through():
    def fail(error):
        def main():
            raise error

        return main

    for error, text in [
        (UserError("x: found y"), "error: x: found y"),
        (PermissionError(13, "Permission denied", "/out"), "error: /out: Permission denied"),
        (OSError(28, "No space left on device"), "error: input or output: No space left on device"),
    ]:
        with pytest.raises(SystemExit) as caught:
            run(fail(error))
        assert caught.value.code == text  # a text means status 1
    with pytest.raises(ZeroDivisionError):
        run(fail(ZeroDivisionError()))
