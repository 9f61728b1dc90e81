"""Command lines: settings from a dataclass, a TOML file and flags; a user's mistake as one sentence.

A program describes its settings as a dataclass of `option`s. `parse` fills it from `--flags`, and from a
recipe, `--config FILE.toml`, if it has a field `config`. `parse_command` is for programs with subcommands.
"""

import argparse
import dataclasses
import difflib
import importlib
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

Settings = TypeVar("Settings")
REQUIRED = ...  # the default of a setting that must be given
LISTED = {str: "strings", int: "whole numbers"}  # for error messages


class UserError(Exception):
    """A mistake that the user can fix, in one sentence: where, what was found and expected, what to do."""


def option(default: Any, help: str, choices: Sequence[str] | None = None, limits: tuple = ()) -> Any:
    """Return a settings field. default: a value or REQUIRED. choices: allowed values. limits: least, most."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


def run(main: Callable[[], None]) -> None:
    """Call `main`. A user's mistake becomes a line on stderr and status 1. A bug keeps its traceback."""
    try:
        return main()
    except UserError as error:
        message = str(error)
    except OSError as error:  # such as a full disk or a read-only folder
        if error.filename is None and error.strerror is None:
            raise
        message = f"{error.filename or 'input or output'}: {error.strerror}"
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full; lower --batch-size, or use --device cpu"
    except KeyboardInterrupt:
        sys.exit(130)
    rank = int(os.environ.get("RANK", "0"))  # set by torchrun
    if rank:
        time.sleep(2)  # if all processes fail alike, process 0 says so first, and torchrun ends the others
        message = f"process {rank}: {message}"
    sys.exit(f"error: {message}")


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises `UserError` for a wrong flag, instead of exiting with status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def parse(settings: type[Settings], description: str, argv: list[str] | None = None) -> Settings:
    """Fill `settings`. A flag in `argv` wins over the recipe, and the recipe over the default."""
    parser = ArgumentParser(description=description, allow_abbrev=False)
    _add_flags(parser, settings)
    return _fill(settings, vars(parser.parse_args(argv)))


def parse_command(program: str, commands: dict[str, type], argv: list[str] | None = None) -> Any:
    """Fill the settings of the command that `argv` names first. Its help is the dataclass's docstring."""
    parser = ArgumentParser(prog=program)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, settings in commands.items():
        help = settings.__doc__.partition("\n")[0]
        _add_flags(subparsers.add_parser(name, help=help, description=help, allow_abbrev=False), settings)
    flags = vars(parser.parse_args(argv))
    return _fill(commands[flags.pop("command")], flags)


def _add_flags(parser: ArgumentParser, settings: type) -> None:
    hints = typing.get_type_hints(settings)
    own = settings.__annotations__  # listed before inherited ones
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in own):
        kind, is_list = _kind(hints[field.name])
        default, choices = field.default, field.metadata["choices"]
        if kind is bool:
            spec = {"action": argparse.BooleanOptionalAction}
        elif is_list:
            spec = {"type": _comma_separated(kind), "nargs": "+", "metavar": "A,B,…"}  # "a,b" or "a b"
        else:
            metavar = None if choices else {int: "N", float: "X"}.get(kind, "VALUE")
            spec = {"type": kind, "choices": choices, "metavar": metavar}
        spec["help"] = field.metadata["help"].replace("%", "%%")
        if default not in (None, REQUIRED, ()):
            spec["help"] += f" [{','.join(map(str, default)) if is_list else default}]"
        # SUPPRESS leaves out the flags that were not typed, so their defaults do not override the recipe.
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, required=default is REQUIRED, **spec)


def _fill(settings: type[Settings], flags: dict[str, Any]) -> Settings:
    flags = {name: sum(value, ()) if isinstance(value, list) else value for name, value in flags.items()}
    from_file = _read_toml(Path(flags["config"]), settings) if flags.get("config") else {}
    filled = settings(**(from_file | flags))
    limits = {field.name: field.metadata["limits"] for field in dataclasses.fields(settings)}
    check_ranges(filled, {name: ends for name, ends in limits.items() if ends})
    return filled


def _kind(hint: Any) -> tuple[type, bool]:
    """Return (type, whether it is a list): `int | None` -> (int, False), `tuple[str, ...]` -> (str, True)."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    return (typing.get_args(hint)[0], True) if typing.get_origin(hint) is tuple else (hint, False)


def _comma_separated(kind: type) -> Callable[[str], tuple]:
    """Return a type for argparse: "a,b" -> ("a", "b"), each converted to `kind`."""

    def split(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    split.__name__ = f"list of {LISTED[kind]}"  # for argparse's error message
    return split


def _read_toml(path: Path, settings: type) -> dict[str, Any]:
    """Read a recipe. Raises UserError for a key that `settings` lacks or a value of the wrong type."""
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ModuleNotFoundError:
        raise UserError(f"{path}: Python 3.10 needs tomli to read TOML; run `pip install tomli`") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe; the project's recipes are in configs/") from None
    except ValueError as error:  # neither TOML nor UTF-8
        raise UserError(f"{path}: not a TOML file: {error}") from None

    fields = {field.name: field for field in dataclasses.fields(settings) if field.name != "config"}
    hints = typing.get_type_hints(settings)
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(fields)}"
            raise UserError(f"{path}: unknown option {key!r}; {hint}")
        kind, is_list = _kind(hints[key])
        if kind is float and type(value) is int:
            value = float(value)
        choices = fields[key].metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{path}: {key} is {value!r}, expected one of {', '.join(choices)}")
        items = value if is_list and isinstance(value, list) else [value]
        if isinstance(value, list) != is_list or any(type(item) is not kind for item in items):
            expected = f"a list of {LISTED[kind]}" if is_list else kind.__name__
            raise UserError(f"{path}: {key} is {value!r}, expected {expected}")
        values[key] = tuple(value) if is_list else value
    return values


def check_ranges(settings: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise UserError for a setting outside its range. Both ends are allowed, and so is None."""
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value}, expected a number from {least:,} to {most:,}")


def choose_device(device: str, dtype: str, is_plan: bool = False) -> tuple[str, torch.dtype]:
    """Replace `auto`: CUDA and bfloat16 if there is a GPU, else CPU and float32. Raises UserError for CUDA
    without a GPU, except for a memory plan (`is_plan`), which may be for another machine."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not is_plan and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU; use --device cpu, or install the driver")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, dtype)


def check_folder(path: str | Path) -> None:
    """Raise UserError if `path`, a folder for results, is a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path}: expected a folder or the name of a new one, but found a file")
