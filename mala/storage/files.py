"""Safe files, never half-written: each is made beside its place, flushed to the disk, then renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mala.cli import UserError

COPY_BYTES = 2**24  # at a time: large enough for the speed of the disk


@contextlib.contextmanager
def atomic_path(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Yield a new file, or folder, beside `path`: it takes its place at the end of a block that succeeds."""
    if path.is_dir() and not is_folder:
        raise UserError(f"{path}: a folder, expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: the run after a kill removes what that left
    _remove(temporary)
    temporary.mkdir() if is_folder else temporary.touch()
    try:
        with named(path):
            yield temporary
            for written in (temporary, *temporary.rglob("*")):
                _flush(written)
        if path.is_dir():  # a rename cannot replace a folder that holds something
            shutil.rmtree(path)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        _remove(temporary)


def atomic_directory(path: Path, replace: bool = False) -> contextlib.AbstractContextManager[Path]:
    """`atomic_path` for a folder. Raises UserError if `path` exists, unless `replace`."""
    if path.exists() and not replace:
        raise UserError(f"{path}: the output folder exists; name another or remove it first")
    return atomic_path(path, is_folder=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # if it is a folder
    path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk itself: a file that was only renamed may be empty after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError with the path: the system does not name it if a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); make room or name another folder") from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """`atomic_path`, opened; text is UTF-8."""
    with atomic_path(path) as new, open(new, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, expected: str = "a model or adapter folder as the hub holds it") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if there is none; `expected` says what it belongs to."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; expected {expected}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply, 5,000 digits
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def refuse_pointer(file: Path) -> None:
    """Raise UserError if Git LFS, which was not asked for the content, left a pointer in a file's place."""
    with open(file, "rb") as opened:
        if opened.read(30).startswith(b"version https://git-lfs"):
            raise UserError(f"{file}: a Git LFS pointer, expected the file itself; run `git lfs pull`")


def lock(folder: Path, wait: bool = False) -> IO:
    """Lock a folder until the returned file is closed, at the latest when the process ends, in whatever way.
    If another process holds the lock, wait or raise UserError. A system without flock locks nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder}: another run is writing here; wait, or name another folder") from None
    except (ImportError, OSError):
        pass
    return file
