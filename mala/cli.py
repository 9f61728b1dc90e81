"""What the command lines share: settings from a dataclass, a TOML file and flags; errors in one sentence.

A script describes its settings once, as a dataclass whose fields are made with `option(default, help)`.
`parse` turns it into `--flags`, reads `--config FILE.toml` if the dataclass has a field `config`, and returns the
filled dataclass. A flag wins over the file, the file over the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Settings = TypeVar("Settings")
LISTED = {str: "strings", int: "whole numbers"}


class UserError(Exception):
    """A mistake that the user can mend. Its text is one sentence: where, what was found, what was expected, what to do."""


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with a default, a help text and, where given, the only values that it takes."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def run(main: Callable[[], None]) -> None:
    """Call `main`; a user's mistake becomes one line on stderr and exit status 1, a bug keeps its traceback."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except OSError as error:  # a folder that cannot be written, a full disk: the user's to mend, and the system names it
        if error.filename is None and error.strerror is None:
            raise
        fail(f"{error.filename or 'input or output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> typing.NoReturn:
    """Print the sentence and exit with status 1."""
    rank = int(os.environ.get("RANK", "0"))  # of the processes that torchrun started
    if rank:
        time.sleep(2)  # a mistake that all processes find is said by the first: torchrun then ends the others
        message = f"process {rank}: {message}"
    sys.exit(f"error: {message}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a `UserError` (one sentence, status 1) and not a page of usage with status 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def parse(settings: type[Settings], description: str, argv: list[str] | None = None) -> Settings:
    """Fill the dataclass `settings` from defaults, then the TOML file that `--config` names, then the flags in `argv`."""
    parser = ArgumentParser(description=description, allow_abbrev=False)
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind = _kind(hints[field.name])
        default = "" if field.default is None else f" [{_show(field.default)}]"
        spec: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%") + default}
        if kind is bool:
            spec["action"] = argparse.BooleanOptionalAction
        else:
            spec["type"] = kind
            if kind is tuple:
                spec |= {"type": words(_element(hints[field.name])), "nargs": "+"}  # a,b or a b
            spec["choices"] = field.metadata["choices"]
            spec["metavar"] = None if spec["choices"] else {int: "N", float: "X", tuple: "A,B,…"}.get(kind, "VALUE")
        # SUPPRESS: only the flags that were typed appear, so that they can win over the file.
        parser.add_argument("--" + field.name.replace("_", "-"), dest=field.name, default=argparse.SUPPRESS, **spec)
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = tuple(itertools.chain(*value))
    config = flags.get("config")
    from_file = _read_toml(Path(config), settings, hints) if config else {}
    return settings(**{**from_file, **flags})


def _kind(hint: Any) -> type:
    """`int | None` -> int, `tuple[str, ...]` -> tuple, `bool` -> bool."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    return typing.get_origin(hint) or hint


def _element(hint: Any) -> type:
    """`tuple[int, ...]` -> int."""
    return typing.get_args(hint)[0]


def words(kind: type = str) -> Callable[[str], list]:
    """For argparse: "a,b" -> ["a", "b"], each of them a `kind`."""

    def split(text: str) -> list:
        return [kind(word.strip()) for word in text.split(",") if word.strip()]

    split.__name__ = f"list of {LISTED[kind]}"  # in argparse's error
    return split


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_toml(path: Path, settings: type, hints: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe, each a field of `settings` and of its type; anything else is an error that names it."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise UserError(f"{path}: Python 3.10 reads TOML through the package tomli: pip install tomli") from None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe; those of the project lie in configs/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None

    fields = {field.name: field for field in dataclasses.fields(settings) if field.name != "config"}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            raise UserError(f"{path}: unknown option {key!r}; {hint}")
        kind, choices = _kind(hints[key]), fields[key].metadata["choices"]
        if kind is tuple and isinstance(value, list) and all(type(word) is _element(hints[key]) for word in value):
            values[key] = tuple(value)
        elif kind is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not kind:
            expected = f"a list of {LISTED[_element(hints[key])]}" if kind is tuple else kind.__name__
            raise UserError(f"{path}: {key} is {value!r}, expected {expected}")
        if choices and value not in choices:
            raise UserError(f"{path}: {key} is {value!r}, expected one of {', '.join(choices)}")
    return values


def choose_device(device: str, dtype: str, is_plan: bool = False) -> tuple[str, torch.dtype]:
    """`auto` is CUDA where there is a GPU; its dtype is bfloat16 there and float32 on a CPU. Raises UserError where CUDA is
    asked for and there is no GPU, unless it `is_plan`: one can be made for a GPU elsewhere."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not is_plan and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here; use --device cpu, or install PyTorch for your GPU")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, dtype)


def check_folder(path: str | Path) -> None:
    """Raise UserError where results cannot go to the folder `path`, since it is a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path}: a file, expected a folder or the name of a new one")


MAX_ROWS = 40


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[Sequence[str]] = ()) -> None:
    """Columns of text, the first aligned to the left, the others to the right. Of very many rows the first and the last."""
    if len(rows) > MAX_ROWS:
        hidden = f"… {len(rows) - MAX_ROWS} more …"
        rows = [*rows[: MAX_ROWS // 2], [hidden, *[""] * (len(header) - 1)], *rows[-MAX_ROWS // 2 :]]
    rows = [*rows, *last]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
