"""Downloads that survive a broken connection or Ctrl-C: they are resumed, checked, then renamed.

- A file is downloaded as `.NAME.part` in its folder. It gets its name once its size and checksum are right.
- An interrupted download resumes where it stopped (`Range: bytes=N-`, RFC 9110 section 14), even in a later
  run.
- Checksums come from a repository's file listing: the Hugging Face hub's tree API or GitHub's contents API.
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

WAITS = (1, 2, 4, 8)  # seconds to wait before each retry
TIMEOUT = 30  # seconds without a byte before a connection counts as broken
CHUNK = 2**16  # bytes read at a time
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth a retry


@dataclass(frozen=True)
class File:
    """A file to download. checksum: a SHA-256 (64 hex digits) or a git blob id (40). None: not known."""

    url: str
    size: int | None = None  # bytes
    checksum: str | None = None


def download_all(files: dict[Path, File], workers: int = 8) -> None:
    """Download each file to its path, several at a time, with one progress bar. The first error stops all."""
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
    """Download a file to `path`, unless a file of the right size and checksum is already there.

    - bar: counts the bytes.
    - stop: ends the download once it is set.

    Raises UserError if the file cannot be downloaded or `path` cannot be written. Then, and after Ctrl-C, the
    part that has arrived is kept for the next try, unless its size or checksum is wrong.
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
                f"{file.url}: {flaw}; it has been deleted: run the command again, later if it just changed"
            )
        os.replace(part, path)
    except OSError as error:  # from the disk: _fetch handles network errors
        raise UserError(
            f"{error.filename or path}: {error.strerror}; free space or use another folder"
        ) from None


def _flaw(path: Path, file: File) -> str:
    """Return what is wrong with the file at `path`, or "" if nothing is."""
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
    """Append to `part` what it lacks of `url`, with retries. Return the response's `Link` header."""
    bar.update(part.stat().st_size if part.exists() else 0)
    for pause in (0, *WAITS):
        stop.wait(pause)
        try:
            return _receive(url, part, bar, stop)
        except HTTPError as error:
            problem = f"the server answered {error.code} ({error.reason})"
            if error.code == 416:  # the file has no byte after the part, so the part is wrong: start again
                part.unlink(missing_ok=True)
            elif error.code not in BUSY:
                advice = "check in a browser whether it has moved, or try again in an hour"
                raise UserError(f"{url}: {problem}; {advice}") from None
        except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            problem = f"the connection failed ({getattr(error, 'reason', error)})"
    raise UserError(f"{url}: {problem}; the part is kept: check the network and run the command again")


def _receive(url: str, part: Path, bar: tqdm, stop: Event) -> str:
    """Make one try for `_fetch`. Raises urllib's errors, and ConnectionError if the body ends too early."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "mala"} | ({"Range": f"bytes={have}-"} if have else {})
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the server ignores Range and sends the whole file
            have = 0
        total = have + int(response.headers.get("Content-Length", 0))
        bar.total = bar.total or total
        with open(part, "ab" if have else "wb", buffering=0) as file:
            while chunk := response.read1(CHUNK):
                if stop.is_set():
                    raise UserError("the download was stopped because another file failed")
                have += file.write(chunk)
                bar.update(len(chunk))
        if have < total:  # http.client accepts a body that ends early
            raise ConnectionError(f"it broke off after {have:,} of {total:,} bytes")
        return response.headers.get("Link", "")


def list_files(url: str) -> dict[str, File]:
    """Read all pages of a JSON file listing. Return path in the repository -> File (only GitHub gives `url`).

    The url is one of these:
    - https://huggingface.co/api/datasets/OWNER/NAME/tree/main/FOLDER?recursive=true; its header `Link` names
      the next page;
    - https://api.github.com/repos/OWNER/NAME/contents/FOLDER.

    Raises UserError if the response is not such a listing.
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
                    blob = entry.get("lfs") or entry  # with Git LFS the blob is only a pointer to the file
                    checksum = blob.get("oid") or blob["sha"]
                    files[entry["path"]] = File(entry.get("download_url") or "", blob["size"], checksum)
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{url}: found {text[:40]}, expected a JSON list of files; open it in a browser to see why"
            ) from None
        following = re.search(r'<([^>]*)>; rel="next"', link)
        url = following[1] if following else ""
    return files
