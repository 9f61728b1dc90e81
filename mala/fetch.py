"""Downloads that a broken connection, Ctrl-C or a damaged byte cannot spoil: resumed, checked, then renamed.

- A file grows as `.NAME.part` beside its place, and takes its place when its size and its checksum are right.
- What dropped is asked for from where it broke off (`Range: bytes=N-`, RFC 9110 section 14), in this run or in the next.
- The listing of a repository brings the checksums: of the Hugging Face hub's tree API, or GitHub's contents API.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from tqdm import tqdm

from mala.checkpoint import named
from mala.cli import UserError

WAITS = (1, 2, 4, 8)  # seconds before each further try; begun anew whenever something came
TIMEOUT = 30  # seconds without a byte, after which a connection counts as dropped
CHUNK = 2**16  # bytes
BUSY = (408, 429, 500, 502, 503, 504)  # answers that may be better a little later
ADVICE = {403: "it allows no more requests, or none, so try in an hour", 404: "see in a browser where it has moved to"}


@dataclass(frozen=True)
class File:
    """A file to fetch. path: where it lies in a listing, or where it shall go; size in bytes; git_sha, which is git's blob id,
    and sha256 in hex. None: not known."""

    url: str
    path: str | Path
    size: int | None = None
    git_sha: str | None = None
    sha256: str | None = None


class Dropped(Exception):
    """A failure of the network that another try may mend."""


class Unreachable(Dropped):
    """There was no connection at all."""


class Bar(tqdm):
    """A progress bar that several threads move, and by which they are told to stop."""

    is_stopped = False

    def update(self, n: float = 1) -> bool | None:
        if self.is_stopped:
            raise UserError("the download was stopped: another file failed")
        with self.get_lock():
            return super().update(n)


def download(url: str, path: Path, size: int | None = None, git_sha: str | None = None, sha256: str | None = None,
             bar: tqdm | None = None) -> None:  # fmt: skip
    """Fetch `url` to `path`, unless the right file is there: one of that size and that checksum, where they are given.

    A wrong checksum is given one more try, from the first byte. Raises UserError where the file cannot be had; what has come of
    it stays as a part, to go on from, unless it is wrong. `bar` always shows how much there is, so it may go back.
    """
    bar = bar if bar is not None else tqdm(disable=True)
    if path.is_file() and not _flaw(path, size, git_sha, sha256):
        bar.update(_size(path))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    bar.update(_size(part))
    for is_last in (False, True):
        _persist(url, lambda: _receive(url, part, size, bar), bar, lambda: _size(part))
        flaw = _flaw(part, size, git_sha, sha256)
        if not flaw:
            break
        bar.update(-_size(part))
        part.unlink()
        if is_last:
            raise UserError(f"{url}: {flaw}, twice; it has just changed, or something on the way alters it: try again later")
    with named(path):
        os.replace(part, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _flaw(path: Path, size: int | None, git_sha: str | None, sha256: str | None) -> str:
    """What is wrong with a file, "" if nothing. The file is flushed to the disk on the way."""
    found = _size(path)
    if size is not None and found != size:
        return f"has {found:,} bytes, expected {size:,}"
    digest = hashlib.sha256() if sha256 else hashlib.sha1(b"blob %d\0" % found, usedforsecurity=False)
    expected = sha256 or git_sha
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(CHUNK) if expected else b"":
            digest.update(chunk)
    if expected and digest.hexdigest() != expected:
        return f"has the {'SHA-256' if sha256 else 'git blob id'} {digest.hexdigest()}, expected {expected}"
    return ""


def _persist(url: str, attempt: Callable[[], Any], bar: tqdm, progress: Callable[[], int] = lambda: 0) -> Any:
    """The result of `attempt`, tried again while it raises Dropped, until WAITS have passed since `progress` last grew."""
    first = furthest = progress()
    waits = iter(WAITS)
    while True:
        try:
            return attempt()
        except Dropped as error:
            have = progress()
            if have > furthest:  # ever: a server that begins anew each time, and breaks off, gets no further
                furthest, waits = have, iter(WAITS)
            in_vain = isinstance(error, Unreachable) and furthest == first  # there is no network, or no such machine
            pause = None if in_vain else next(waits, None)
            if pause is None:
                kept = f" (what came, {have:,} bytes, is kept)" if have else ""
                raise UserError(f"{url}: {error}{kept}; check the network and give the command again") from None
        until = time.monotonic() + pause
        while time.monotonic() < until:
            time.sleep(0.1)
            bar.update(0)  # raises where another thread has failed


def _open(url: str, have: int = 0) -> HTTPResponse | HTTPError:
    """The answer to a request for `url`, from byte `have` on. Raises Dropped, or UserError where another try is in vain."""
    headers = {"User-Agent": "mala"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and have:  # there is nothing from `have` on
            return error
        error.close()
        if error.code in BUSY:
            raise Dropped(f"the server answers {error.code} ({error.reason})") from None
        advice = ADVICE.get(error.code, "see in a browser why")
        raise UserError(f"{url}: the server answers {error.code} ({error.reason}), expected the file; {advice}") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # of a URLError
        is_unreachable = isinstance(reason, (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError))
        raise (Unreachable if is_unreachable else Dropped)(f"cannot be reached ({reason})") from None


def _read(response: HTTPResponse, size: int | None = None) -> bytes:
    """At most `size` bytes, b"" at the end; all where it is None."""
    try:
        return response.read1(size) if size else response.read()
    except (OSError, HTTPException) as error:  # a reset, a timeout, IncompleteRead
        raise Dropped(f"the connection broke off ({str(error) or type(error).__name__})") from None


def _receive(url: str, part: Path, size: int | None, bar: tqdm) -> None:
    """Add to `part` what it lacks of `url`. Raises Dropped where less comes than was announced."""
    have = _size(part)
    if have and have == size:
        return
    with _open(url, have) as response:
        found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if response.status == 416 and found and found[2] == str(have):
            return  # it was whole
        continues = response.status == 206 and found is not None and found[1] == str(have)
        if have and not continues:
            bar.update(-have)
            have = 0
            part.unlink()
            if response.status != 200:  # 416, or another range than asked for: the part is no beginning of this file
                return _receive(url, part, size, bar)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        if bar.total is None:
            bar.total = total
        with named(part), open(part, "ab") as file:
            while chunk := _read(response, CHUNK):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
        if total is not None and have < total:  # http.client takes a body that ends early as complete
            raise Dropped(f"the connection broke off after {have:,} of {total:,} bytes")


def list_files(url: str) -> list[File]:
    """The files that a JSON listing names, of all its pages; their `path` is the repository's, and GitHub gives their `url`.

    url: https://huggingface.co/api/datasets/OWNER/NAME/tree/main/FOLDER?recursive=true, of which the next page stands in the
    header `Link`, or https://api.github.com/repos/OWNER/NAME/contents/FOLDER. Raises UserError for any other answer.
    """
    files: list[File] = []
    while url:
        text, link = _persist(url, lambda: _read_page(url), tqdm(disable=True))  # noqa: B023, it is called at once
        try:
            files += [_listed(entry) for entry in json.loads(text) if entry["type"] == "file"]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{url}: found {text[:40].decode(errors='replace')!r}, expected a JSON list of files; open it in a browser"
            ) from None
        following = re.search(r'<([^>]*)>;[^,<]*\brel="?next\b', link)
        url = urljoin(url, following[1]) if following else ""
    return files


def _read_page(url: str) -> tuple[bytes, str]:
    with _open(url) as response:
        return _read(response), response.headers.get("Link", "")


def _listed(entry: dict[str, Any]) -> File:
    if lfs := entry.get("lfs"):  # the blob is only a pointer to the file then
        return File("", entry["path"], lfs["size"], sha256=lfs["oid"])
    return File(entry.get("download_url") or "", entry["path"], entry["size"], entry["oid"] if "oid" in entry else entry["sha"])


def download_all(files: Iterable[File], workers: int = 8) -> None:
    """Fetch many files at a time, with one progress bar. The first error is raised, and what is under way stops soon."""
    files = list(files)
    sizes = [file.size for file in files]
    bar = Bar(total=None if None in sizes else sum(sizes), unit="B", unit_scale=True, leave=False, disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        try:
            running = [pool.submit(download, f.url, Path(f.path), f.size, f.git_sha, f.sha256, bar) for f in files]
            for future in wait(running, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:  # also after an error, and after Ctrl-C
            bar.is_stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
