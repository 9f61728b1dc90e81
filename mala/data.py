"""Token files, and what every training step sees of them.

A corpus is tokenised once, by as many processes as there are cores. Every corpus file, and every 256 MB of a large one, gets a
token file, which holds the tokens of its documents, `<s>` before each (and nowhere else), as little-endian uint16, or as uint32
where the vocabulary takes it. `index.json` says which came from what, so that only what changed is tokenised again:

    {"tokenizer": SHA-256, "dtype": "uint16", "languages": {"swh_Latn": [
        {"source": "swh_Latn.txt", "digest": SHA-256, "bytes": [0, null], "file": "swh_Latn.0.0.bin", "documents": 5,
         "tokens": 130}, ...]}}

Packing is MaLA-500's, but that nothing is cut away: everything of a language in a row, cut into blocks of `seq_len`, the last
one filled up from the beginning; attention reaches back over the borders of documents, too. How often a language is drawn is
decided when training begins, from the index.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from mala.checkpoint import COPY_BYTES, atomic_file, read_json, write_json
from mala.cli import UserError
from mala.corpus import LANGUAGE, Corpus, language_shares, read_documents
from mala.tokenizer import Tokenizer, WordPacker

POOL_BYTES = 2**22  # what is smaller is tokenised before other processes have started
PART_BYTES = 2**28  # a process's portion of a corpus file
PREFETCH = 2  # batches that are read ahead
Batch = TypeVar("Batch")


def cores() -> int:
    """How many cores this process may use: a scheduler's share of the machine, where it is limited to one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_digests(files: list[Path], known: dict[str, Any]) -> dict[str, list]:
    """path -> [bytes, time of the last change in ns, SHA-256 of the content] for every file.

    known: an earlier answer; a file of the same size and time is not read again. Only the content counts: a copy of a corpus
    has other times and is the same corpus.
    """

    def digest(file: Path) -> list:
        status = file.stat()
        entry = known.get(str(file.resolve()))
        if isinstance(entry, list) and entry[:2] == [status.st_size, status.st_mtime_ns]:
            return entry
        content = hashlib.sha256()
        with open(file, "rb") as opened:
            while block := opened.read(COPY_BYTES):
                content.update(block)
        return [status.st_size, status.st_mtime_ns, content.hexdigest()]

    with ThreadPoolExecutor(cores()) as threads:
        found = threads.map(digest, files)
        bar = tqdm(zip(files, found), desc="checking the corpus", total=len(files), unit="file", leave=False, disable=None)
        return {str(file.resolve()): entry for file, entry in bar}


def tokenise(corpus: Corpus, tokenizer: Tokenizer, digests: dict[str, list], root: Path) -> None:
    """Bring the token files in `root` up to date with a corpus's files that hold training documents (`open_streams` leaves out
    what is held out of them). What a killed run has finished is kept.

    digests: `file_digests` of the corpus's files. Raises UserError for a corpus file that cannot be read.
    """
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    made_by = {"tokenizer": hashlib.sha256(tokenizer.model).hexdigest(), "dtype": dtype}
    try:
        index = read_json(root / "index.json")
    except UserError:  # not there yet, or damaged: it is made again
        index = {}
    older = [part["file"] for parts in index.get("languages", {}).values() for part in parts]
    if {key: index.get(key) for key in made_by} != made_by:
        index = {"languages": {}}
    made = {part["file"]: part for parts in index["languages"].values() for part in parts}
    # Languages outside this corpus stay: another run may use them.
    languages = {language: parts for language, parts in index["languages"].items() if language not in corpus.files}
    jobs = []
    for job in _portions(corpus, digests):
        part = made.get(job.entry["file"], {})
        if {**part, **job.entry} == part and _size(root / part["file"]) == part["tokens"] * np.dtype(dtype).itemsize:
            languages.setdefault(job.language, []).append(part)
        else:
            jobs.append(job)
    write_json(root / "index.json", {**made_by, "languages": languages})  # no entry lacks its file after a kill
    for name in set(older) - {part["file"] for parts in languages.values() for part in parts}:
        if re.fullmatch(rf"{LANGUAGE.pattern}\.\d+\.\d+\.bin", name):
            (root / name).unlink(missing_ok=True)

    if not jobs:
        return
    jobs.sort(key=lambda job: -job.size)  # the largest first: none is left to one process at the end
    size = sum(job.size for job in jobs)
    with tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for job, (documents, tokens) in _in_parallel(jobs, root, WordPacker(tokenizer, dtype)):
            parts = languages.setdefault(job.language, [])
            parts.append({**job.entry, "documents": documents, "tokens": tokens})
            parts.sort(key=lambda part: [int(number) for number in part["file"].split(".")[1:3]])
            write_json(root / "index.json", {**made_by, "languages": dict(sorted(languages.items()))})
            bar.update(job.size)


@dataclass
class Job:
    """A portion of a corpus file: its lines from byte `first` to before `end`. entry: what the index will say of it."""

    language: str
    source: Path
    first: int
    end: int | None
    size: int
    entry: dict[str, Any]


def _portions(corpus: Corpus, digests: dict[str, list]) -> Iterator[Job]:
    """All files of a corpus's train split in order, the large ones in portions, where they have lines to cut at."""
    for language in corpus.languages:
        for number, source in enumerate(corpus.documents(language, "train").files):
            size, _, digest = digests[str(source.resolve())]
            step = PART_BYTES if source.suffix in (".txt", ".jsonl") and size > PART_BYTES else None
            for portion, first in enumerate(range(0, size, step) if step else [0]):
                end = first + step if step else None
                entry = {
                    "source": source.name,
                    "digest": digest,
                    "bytes": [first, end],
                    "file": f"{language}.{number}.{portion}.bin",
                }
                yield Job(language, source, first, end, min(step or size, size - first), entry)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _in_parallel(jobs: list[Job], root: Path, packer: WordPacker) -> Iterator[tuple[Job, tuple[int, int]]]:
    """(job, (documents, tokens)) of every job as it is finished."""
    if len(jobs) == 1 or sum(job.size for job in jobs) < POOL_BYTES:
        yield from ((job, _tokenise_portion(job, root, packer)) for job in jobs)
        return
    # On Linux a fork, as PyTorch's DataLoader does: a new interpreter would import PyTorch for seconds.
    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(len(jobs), cores()), start, _start_worker, (packer,)) as pool:
        try:
            running = {pool.submit(_work, job, root): job for job in jobs}
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool:
            raise UserError("a process that tokenised was killed (is the memory full?); the same command goes on") from None
        except BaseException:  # one bad file ends the work on the others at once
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


_packer: WordPacker  # of a worker process


def _start_worker(packer: WordPacker) -> None:
    global _packer
    _packer = packer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers

    def follow_parent() -> None:  # ends this worker when the main process was killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _work(job: Job, root: Path) -> tuple[int, int]:
    return _tokenise_portion(job, root, _packer)


def _tokenise_portion(job: Job, root: Path, packer: WordPacker) -> tuple[int, int]:
    """Write the token file of a job; returns how many documents and tokens these are."""
    documents = 0
    try:
        with atomic_file(root / job.entry["file"], "wb") as file:
            for text in read_documents(job.source, job.first, job.end):
                file.write(packer.pack(text))
                documents += 1
            return documents, file.tell() // packer.dtype.itemsize
    except UserError:
        if job.first:  # read from the beginning the mistake has its right line number
            deque(read_documents(job.source), maxlen=0)
        raise


class Stream:
    """The tokens of one language in a row, memory-mapped; they lie in one or more files. documents: how many these are."""

    def __init__(self, parts: list[np.ndarray], documents: int):
        self.parts, self.documents = parts, documents
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, from the first again after the last: (count,)."""
        taken = []
        while count:
            start %= len(self)
            part = int(np.searchsorted(self.ends, start, side="right"))
            begin = start - int(self.ends[part]) + len(self.parts[part])  # within the part
            taken.append(self.parts[part][begin : begin + count])
            start, count = start + len(taken[-1]), count - len(taken[-1])
        return np.concatenate(taken)

    def without_last(self, documents: int, bos_id: int) -> Stream:
        """The stream without its last documents. Each begins with `<s>`, so the end is searched for their beginnings."""
        parts, left = list(self.parts), documents
        while left:
            width = 2**16
            while np.count_nonzero(parts[-1][-width:] == bos_id) < left and width < len(parts[-1]):
                width *= 2
            begins = np.flatnonzero(parts[-1][-width:] == bos_id) + max(0, len(parts[-1]) - width)
            parts[-1] = parts[-1][: begins[-left] if left <= len(begins) else 0]
            left -= min(left, len(begins))
            if not len(parts[-1]):
                parts.pop()
        return Stream(parts, self.documents - documents)


def open_streams(corpus: Corpus, root: Path, bos_id: int) -> dict[str, Stream]:
    """language -> its stream of training tokens, for every language that has some, from what `tokenise` left in `root`.

    Raises UserError where none has any.
    """
    index = read_json(root / "index.json")
    streams = {}
    for language in corpus.languages:
        parts = index["languages"].get(language, [])
        maps = [np.memmap(root / part["file"], dtype=index["dtype"], mode="r") for part in parts if part["tokens"]]
        total = sum(part["documents"] for part in parts)
        _, end = corpus.documents(language, "train").part(total)  # a language's held-out documents are its last
        if end:
            streams[language] = Stream(maps, total).without_last(total - end, bos_id)
    if not streams:
        raise UserError(f"{corpus.root}: no language has a document in its train split (held-out share {corpus.held_out})")
    return streams


class Batches:
    """What every training step sees: a pure function of seed, step, rank and number of processes, with no state to save.

    A row of a batch is a block of one language: the language is drawn by `language_shares`, as MaLA-500 sampled Glot500-c,
    and a language's blocks come in a new random order each time all of them have been seen. A last, incomplete block is
    filled up from the language's beginning, so that no token is cut away; how many of its blocks are seen, its share decides.
    """

    def __init__(self, streams: dict[str, Stream], seq_len: int, batch_size: int, steps: int, alpha: float, seed: int):
        self.languages = list(streams)
        self.streams = list(streams.values())
        self.seq_len, self.batch_size = seq_len, batch_size
        shares = language_shares([stream.documents for stream in self.streams], alpha)
        rng = np.random.default_rng([seed, 0])
        self.language_of_row = rng.choice(len(self.languages), size=steps * batch_size, p=shares).astype(np.uint16)
        self.block_of_row = np.empty(steps * batch_size, dtype=np.uint32)
        by_language = np.argsort(self.language_of_row, kind="stable")  # the rows of the first language in order, and so on
        counts = np.bincount(self.language_of_row, minlength=len(self.languages))
        for index, rows in enumerate(np.split(by_language, np.cumsum(counts)[:-1])):
            blocks = -(-len(self.streams[index]) // seq_len)  # rounded up
            rng = np.random.default_rng([seed, 1, index])
            orders = [rng.permutation(blocks) for _ in range(-(-len(rows) // blocks))]
            self.block_of_row[rows] = np.concatenate(orders)[: len(rows)] if orders else 0

    def languages_of(self, step: int) -> list[str]:
        """The languages of the B rows of a step."""
        rows = self.language_of_row[step * self.batch_size : (step + 1) * self.batch_size]
        return [self.languages[language] for language in rows]

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens (B, T) int64, and targets (B, T) int64, the token after each."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What process `rank` of so many sees of a step: its part of the B rows, in order."""
        part = self.batch_size // processes
        first = step * self.batch_size + rank * part
        # T + 1 tokens a row: the block and, as the last one's target, the token that follows it.
        blocks = [self.streams[self.language_of_row[row]].take(int(self.block_of_row[row]) * self.seq_len, self.seq_len + 1)
                  for row in range(first, first + part)]  # fmt: skip
        blocks = torch.from_numpy(np.stack(blocks).astype(np.int64))  # (B / processes, T + 1)
        return blocks[:, :-1], blocks[:, 1:]


def read_ahead(load: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """load(step) for every step, read by a thread while the caller is busy with those before."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(load, step) for step in steps[:PREFETCH])
        for step in steps:
            batch = coming.popleft().result()
            if step + PREFETCH in steps:
                coming.append(thread.submit(load, step + PREFETCH))
            yield batch
