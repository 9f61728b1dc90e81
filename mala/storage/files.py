"""Safe file writing: a file is written under a temporary name, flushed to disk, then renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mala.cli import UserError


@contextlib.contextmanager
def atomic_path(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Yield a new empty file or folder; rename it to `path` if the `with` block succeeds, else remove it."""
    if path.is_dir() and not is_folder:
        raise UserError(f"{path}: found a folder, expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    _remove(temporary)
    temporary.mkdir() if is_folder else temporary.touch()
    try:
        with named(path):
            yield temporary
            for written in (temporary, *temporary.rglob("*")):
                _flush(written)
        if path.is_dir():  # a rename cannot replace a folder that is not empty, so it moves out of the way
            _remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        _flush(path.parent)
        _remove(old)
    finally:
        _remove(temporary)


def atomic_directory(path: Path, replace: bool = False) -> contextlib.AbstractContextManager[Path]:
    """Yield a new folder, as `atomic_path` does. Raises UserError if `path` exists and not `replace`."""
    if path.exists() and not replace:
        raise UserError(f"{path}: the output folder exists already; name another one or remove it first")
    return atomic_path(path, is_folder=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # does nothing if `path` is a file
    path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file to the physical disk. Without this a renamed file may be empty after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that names `path`; the error of a full disk does not name it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free space or use another folder") from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing through `atomic_path`. Text is encoded as UTF-8."""
    with atomic_path(path) as new, open(new, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, expected: str = "a model or adapter folder") -> dict[str, Any]:
    """Read a JSON object. Raises UserError if there is none; `expected` is for its message."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; expected {expected}") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, deep nesting, huge numbers
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a JSON {type(value).__name__}, expected a JSON object")
    return value


def refuse_pointer(file: Path) -> None:
    """Raise UserError if a file is only a Git LFS pointer, because its content was never fetched."""
    with open(file, "rb") as opened:
        if opened.read(30).startswith(b"version https://git-lfs"):
            raise UserError(f"{file}: found a Git LFS pointer, expected the file itself; run `git lfs pull`")


def lock(folder: Path, wait: bool = False) -> IO:
    """Lock a folder until the returned file is closed or the process ends, even if it is killed. If another
    process holds the lock, wait for it, or raise UserError. On a system without flock this does nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder}: another run is writing here; wait for it or use another folder") from None
    except (ImportError, OSError):
        pass
    return file
