"""Token files, and what every training step sees of them.

A corpus is tokenised once, by as many processes as there are cores. Every corpus file gets a token file: the
tokens of its documents, before each what begins a document (`<s>`), as little-endian uint16, or as uint32 if
the vocabulary takes it; then, as uint32, how many tokens each document has. `index.json` says which came from
what, so that only what changed is tokenised again:

    {"tokenizer": SHA-256, "dtype": "uint16", "languages": {"swh_Latn": [{"source": "swh_Latn.txt", "digest":
        SHA-256, "file": "swh_Latn.0.bin", "documents": 5, "tokens": 130, "bytes": 280, …}, …]}}

Packing is MaLA-500's, but that nothing is cut away: everything of a language in a row, cut into blocks of
`seq_len`, the last one filled up from the beginning. Attention reaches over the borders of documents.
"""

import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mala.cli import UserError
from mala.storage.corpus import LANGUAGE, Corpus, language_shares
from mala.storage.corpus_formats import Reading, read_documents
from mala.storage.files import COPY_BYTES, atomic_file, read_json, write_json
from mala.words.tokenizer import Tokenizer

POOL_BYTES = 2**22  # what is smaller is tokenised before other processes have started
PREFETCH = 2  # batches that are read ahead
Batch = TypeVar("Batch")


def cores() -> int:
    """How many cores this process may use: a scheduler's share of the machine, if it is limited to one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_digests(files: list[Path], known: dict[str, Any]) -> dict[str, list]:
    """path -> [bytes, time of change in ns, SHA-256]. known: an earlier answer, to read only what changed."""

    def digest(file: Path) -> list:
        status, entry = file.stat(), known.get(str(file.resolve()))
        if isinstance(entry, list) and entry[:2] == [status.st_size, status.st_mtime_ns]:
            return entry
        content = hashlib.sha256()
        with open(file, "rb") as opened:
            while block := opened.read(COPY_BYTES):
                content.update(block)
        return [status.st_size, status.st_mtime_ns, content.hexdigest()]

    bar = tqdm(files, desc="checking the corpus", unit="file", leave=False, disable=None)
    with ThreadPoolExecutor(cores()) as threads:
        return {str(file.resolve()): entry for file, entry in zip(bar, threads.map(digest, files))}


@dataclass
class TokenFile:
    """A token file to be made, of one corpus file."""

    language: str
    source: Path
    size: int  # of the source, in bytes
    entry: dict[str, Any]  # what the index will say of it
    reading: Reading


def tokenise(corpus: Corpus, tokenizer: Tokenizer, digests: dict[str, list], root: Path) -> None:
    """Bring the token files in `root` up to date with a corpus's files that hold training documents. They
    hold what is held out of these files, too; `open_streams` leaves it out. A killed run goes on where it
    was. digests: `file_digests` of the corpus. Raises UserError for a corpus file that cannot be read."""
    made_by = {"tokenizer": hashlib.sha256(tokenizer.model).hexdigest(), "dtype": token_dtype(tokenizer).name}
    try:
        index = read_json(root / "index.json")
    except UserError:  # not there yet, or damaged: it is made again
        index = {}
    older = {part["file"]: part for parts in index.get("languages", {}).values() for part in parts}
    usable, languages = {}, {}
    if made_by.items() <= index.items():  # languages outside this corpus stay: another run may use them
        usable = {name: part for name, part in older.items() if "text_bytes" in part}  # once not counted
        languages = {name: parts for name, parts in index["languages"].items() if name not in corpus.files}
    missing = []
    for language in corpus.languages:
        for number, source in enumerate(corpus.documents(language, "train").files):
            size, _, digest = digests[str(source.resolve())]
            entry = {"source": source.name, "digest": digest, "file": f"{language}.{number}.bin"}
            entry |= asdict(corpus.reading)
            part, file = usable.get(entry["file"], {}), root / entry["file"]
            if entry.items() <= part.items() and file.exists() and file.stat().st_size == part["bytes"]:
                languages.setdefault(language, []).append(part)
            else:
                missing.append(TokenFile(language, source, size, entry, corpus.reading))
    write_json(root / "index.json", {**made_by, "languages": languages})  # a kill leaves no wrong entry
    for name in older.keys() - {part["file"] for parts in languages.values() for part in parts}:
        if re.fullmatch(rf"{LANGUAGE.pattern}\.[\d.]+\.bin", name):
            (root / name).unlink(missing_ok=True)

    missing.sort(key=lambda job: -job.size)  # the largest first: none is left to one process at the end
    size = sum(job.size for job in missing)
    with tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for job, part in _in_parallel(missing, root, tokenizer):
            parts = languages.setdefault(job.language, [])
            parts.append(part)
            parts.sort(key=lambda part: int(part["file"].split(".")[1]))
            write_json(root / "index.json", {**made_by, "languages": dict(sorted(languages.items()))})
            bar.update(job.size)


def _in_parallel(jobs: list[TokenFile], root: Path, tokenizer: Tokenizer) -> Iterator[tuple[TokenFile, dict]]:
    """Make token files; yields each with its entry in the index as it is finished."""
    if len(jobs) <= 1 or sum(job.size for job in jobs) < POOL_BYTES:
        yield from ((job, _write_tokens(job, root, tokenizer)) for job in jobs)
        return
    # On Linux a fork, as PyTorch's DataLoader does: a new interpreter would import PyTorch for seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(len(jobs), cores()), context, _start_worker, (tokenizer,)) as pool:
        try:
            running = {pool.submit(_write_tokens, job, root): job for job in jobs}
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool:
            reason = "a process that tokenised was killed (is the memory full?)"
            raise UserError(f"{reason}; the same command goes on") from None
        except BaseException:  # one bad file ends the work on the others at once
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


_tokenizer: Tokenizer  # of a worker process


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers

    def follow_parent() -> None:  # ends this worker when the main process was killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")


def _write_tokens(job: TokenFile, root: Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Write a token file; returns its entry in the index, with how many documents and tokens it holds."""
    tokenizer, lengths, text_bytes = tokenizer or _tokenizer, array("I"), 0
    with atomic_file(root / job.entry["file"], "wb") as file:
        for text in read_documents(job.source, job.reading):
            tokens = np.array(tokenizer.encode(text, bos=True), token_dtype(tokenizer))
            file.write(tokens.tobytes())
            lengths.append(len(tokens))
            text_bytes += len(text.encode())
        file.write(np.array(lengths, "<u4").tobytes())
        counts = {"documents": len(lengths), "tokens": sum(lengths), "text_bytes": text_bytes}
        return {**job.entry, **counts, "bytes": file.tell()}


class Stream:
    """The tokens of a language's `documents` in a row, memory-mapped from one or more files. It is drawn by
    weight times size^alpha; its size is the number of documents, if none is given."""

    def __init__(self, parts: list[np.ndarray], documents: int, size: float = 0, weight: float = 1):
        self.parts, self.documents, self.size, self.weight = parts, documents, size or documents, weight
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


def open_part(file: Path, dtype: str, documents: int, tokens: int, first: int) -> np.ndarray:
    """The tokens of the `first` documents of a token file, of all if it has fewer, memory-mapped."""
    stream = np.memmap(file, dtype, "r", shape=tokens)
    lengths = np.memmap(file, "<u4", "r", offset=stream.nbytes, shape=documents)
    return stream[: tokens - int(lengths[max(0, first) :].sum())]


def open_streams(corpus: Corpus, root: Path, by: str = "documents") -> dict[str, Stream]:
    """language -> its training tokens, left in `root` by `tokenise`. by: what their size counts, documents,
    bytes of text, in UTF-8, or tokens. Raises UserError if there are none."""
    index, streams = read_json(root / "index.json"), {}
    for language in corpus.languages:
        parts = [part for part in index["languages"].get(language, []) if part["tokens"]]
        total = sum(part["documents"] for part in parts)
        _, end = corpus.documents(language, "train").part(total)  # the held-out documents are the last
        maps, left, text_bytes = [], end, 0.0
        for part in parts:
            sizes = part["documents"], part["tokens"]
            maps.append(open_part(root / part["file"], index["dtype"], *sizes, left))
            left -= part["documents"]
            # Of a file that is partly held out, in proportion to the tokens.
            text_bytes += part.get("text_bytes", 0) * len(maps[-1]) / part["tokens"]
        if tokens := sum(map(len, maps)):
            sizes = {"documents": end, "bytes": text_bytes, "tokens": tokens}
            streams[language] = Stream(maps, end, sizes[by])
    if not streams:
        raise UserError(f"{corpus.root}: held_out {corpus.held_out} leaves no document to train on; lower it")
    return streams


class Batches:
    """What every training step sees: a pure function of seed, step, rank and number of processes. A row of a
    batch is a block of one language: the language is drawn by `language_shares`, as MaLA-500 sampled
    Glot500-c, and its blocks come in a new random order each time all of them have been seen."""

    def __init__(
        self, streams: dict[str, Stream], seq_len: int, batch_size: int, steps: int, alpha: float, seed: int
    ):
        self.languages, self.streams = list(streams), list(streams.values())
        self.seq_len, self.batch_size = seq_len, batch_size
        sizes, weights = zip(*((stream.size, stream.weight) for stream in self.streams))
        shares = language_shares(sizes, alpha, weights)
        rng = np.random.default_rng([seed, 0])
        self.language_of_row = rng.choice(len(shares), (steps, batch_size), p=shares).astype(np.uint16)
        self.block_of_row = np.empty((steps, batch_size), dtype=np.uint32)
        for index, stream in enumerate(self.streams):
            rng = np.random.default_rng([seed, 1, index])
            rows = np.flatnonzero(self.language_of_row == index)
            blocks = -(-len(stream) // seq_len)  # rounded up
            for start in range(0, len(rows), blocks):
                once = rows[start : start + blocks]
                self.block_of_row.flat[once] = rng.permutation(blocks)[: len(once)]

    def languages_of(self, step: int) -> list[str]:
        """The languages of the B rows of a step."""
        return [self.languages[language] for language in self.language_of_row[step]]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """tokens (B, T) int64, and targets (B, T) int64, the token after each."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, processes: int) -> tuple[Tensor, Tensor]:
        """What process `rank` of so many sees of a step: its part of the B rows, in order."""
        size = self.batch_size // processes
        rows = slice(rank * size, (rank + 1) * size)
        drawn = zip(self.language_of_row[step, rows], self.block_of_row[step, rows].tolist())
        # T + 1 tokens a row: the block and, as the last one's target, the token that follows it.
        blocks = [self.streams[index].take(block * self.seq_len, self.seq_len + 1) for index, block in drawn]
        tokens = torch.from_numpy(np.stack(blocks).astype(np.int64))  # (B / processes, T + 1)
        return tokens[:, :-1], tokens[:, 1:]


def read_ahead(load: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """load(step) for every step, read by a thread while the caller is busy with those before."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(load, step) for step in steps[:PREFETCH])
        for step in steps:
            batch = coming.popleft().result()
            if step + PREFETCH in steps:
                coming.append(thread.submit(load, step + PREFETCH))
            yield batch
