"""Downloads that a broken connection or Ctrl-C cannot spoil: resumed, checked, then renamed.

- A file grows as `.NAME.part` beside its place, and takes its place when its size and its checksum are right.
- A download that broke off goes on from there (`Range: bytes=N-`, RFC 9110 section 14), now or later.
- Checksums come from a repository's listing, by the Hugging Face hub's tree API or GitHub's contents API.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Event
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from mala.cli import UserError

WAITS = (1, 2, 4, 8)  # seconds before each further try
TIMEOUT = 30  # seconds without a byte, after which a connection counts as broken
CHUNK = 2**16  # bytes
BUSY = (408, 429, 500, 502, 503, 504)  # answers that may be better a little later


@dataclass(frozen=True)
class File:
    """What can be fetched; None: not known. checksum: a SHA-256 or a git blob id, of 64 or 40 hex digits."""

    url: str
    size: int | None = None  # bytes
    checksum: str | None = None


def download_all(files: dict[Path, File], workers: int = 8) -> None:
    """Fetch each file to its path, several at a time, with one progress bar. The first error stops all."""
    sizes = [file.size for file in files.values()]
    total = None if None in sizes else sum(sizes)
    stop, pool = Event(), ThreadPoolExecutor(workers)
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        try:
            running = [pool.submit(download, file, path, bar, stop) for path, file in files.items()]
            for future in as_completed(running):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def download(file: File, path: Path, bar: tqdm, stop: Event) -> None:
    """Fetch a file to `path`, unless one of the size and the checksum that are known is there.

    `bar` counts the bytes; `stop`, once set, ends the download. Raises UserError if the file cannot be had or
    `path` not be written. Then, and after Ctrl-C, what has come stays as a part to go on from, unless it
    is wrong.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if path.is_file() and not _flaw(path, file):
            bar.update(path.stat().st_size)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(file.url, part, bar, stop)
        if flaw := _flaw(part, file):
            part.unlink()
            raise UserError(
                f"{file.url}: {flaw}; it is deleted: give the command again, or later if it has just changed"
            )
        os.replace(part, path)
    except OSError as error:  # of the disk: _fetch deals with the network's
        raise UserError(
            f"{error.filename or path}: {error.strerror}; make room, or name another folder to write to"
        ) from None


def _flaw(path: Path, file: File) -> str:
    """Say what is wrong with the file at `path`, "" if nothing is."""
    size = path.stat().st_size
    if file.size not in (None, size):
        return f"has {size:,} bytes, expected {file.size:,}"
    if not file.checksum:
        return ""
    is_sha256 = len(file.checksum) == 64
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != file.checksum:
        return f"has the checksum {digest.hexdigest()}, expected {file.checksum}"
    return ""


def _fetch(url: str, part: Path, bar: tqdm, stop: Event) -> str:
    """Add to `part` what it lacks of `url`, in several tries. Returns the answer's header `Link`."""
    bar.update(part.stat().st_size if part.exists() else 0)
    for pause in (0, *WAITS):
        stop.wait(pause)
        try:
            return _receive(url, part, bar, stop)
        except HTTPError as error:
            problem = f"the server answers {error.code} ({error.reason})"
            if error.code == 416:  # nothing comes after the part, so it is no part of this file: begin anew
                part.unlink(missing_ok=True)
            elif error.code not in BUSY:
                advice = "see in a browser whether it has moved, or try in an hour"
                raise UserError(f"{url}: {problem}; {advice}") from None
        except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            problem = f"the connection failed ({getattr(error, 'reason', error)})"
    raise UserError(f"{url}: {problem}; what came is kept: check the network and give the command again")


def _receive(url: str, part: Path, bar: tqdm, stop: Event) -> str:
    """Try once for `_fetch`. Raises urllib's errors, and ConnectionError if less comes than was announced."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "mala"} | ({"Range": f"bytes={have}-"} if have else {})
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the server does not know Range and sends the file from its beginning
            have = 0
        total = have + int(response.headers.get("Content-Length", 0))
        bar.total = bar.total or total
        with open(part, "ab" if have else "wb", buffering=0) as file:
            while chunk := response.read1(CHUNK):
                if stop.is_set():
                    raise UserError("the download was stopped: another file failed")
                have += file.write(chunk)
                bar.update(len(chunk))
        if have < total:  # http.client takes a body that ends early as complete
            raise ConnectionError(f"it broke off after {have:,} of {total:,} bytes")
        return response.headers.get("Link", "")


def list_files(url: str) -> dict[str, File]:
    """Read a JSON listing with all its pages: path in the repository -> file; `File.url` only from GitHub.

    url: https://huggingface.co/api/datasets/OWNER/NAME/tree/main/FOLDER?recursive=true, whose header `Link`
    names the next page, or https://api.github.com/repos/OWNER/NAME/contents/FOLDER. Raises UserError for any
    other answer.
    """
    files = {}
    while url:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page"
            link = _fetch(url, page, tqdm(disable=True), Event())
            text = page.read_bytes()
        try:
            for entry in json.loads(text):
                if entry["type"] == "file":
                    blob = entry.get("lfs") or entry  # with LFS git's own blob is only a pointer to the file
                    checksum = blob.get("oid") or blob["sha"]
                    files[entry["path"]] = File(entry.get("download_url") or "", blob["size"], checksum)
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{url}: found {text[:40]}, expected a JSON list of files; open it in a browser"
            ) from None
        following = re.search(r'<([^>]*)>; rel="next"', link)
        url = following[1] if following else ""
    return files
