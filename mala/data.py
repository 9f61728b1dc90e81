"""Token files, and the batches that training reads from them.

A corpus is tokenised once, by one process per core. Each corpus file gets a token file. It begins with the
tokens of all documents, each document after the tokenizer's `<s>`, as little-endian uint16, or uint32 for
more than 65,536 pieces. Each document's number of tokens follows, as uint32. `index.json` records the source
of each token file, so only changed corpus files are tokenised again:

    {"tokenizer": SHA-256, "dtype": "uint16", "languages": {"swh_Latn": [{"source": "swh_Latn.txt", "digest":
        SHA-256, "file": "swh_Latn.0.bin", "documents": 5, "tokens": 130, "bytes": 280, …}, …]}}

Packing is MaLA-500's, but no token is dropped: a language's documents are concatenated and cut into blocks
of `seq_len`; the last is filled up from the beginning. By default attention crosses document borders.
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
from mala.storage.files import atomic_file, read_json, write_json
from mala.words.tokenizer import Tokenizer

POOL_BYTES = 2**22  # less text than this is tokenised faster than other processes can start
PREFETCH = 2  # number of batches to read ahead
Batch = TypeVar("Batch")


def cores() -> int:
    """Return how many cores this process may use. A scheduler may grant only some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_digests(files: list[Path], known: dict[str, Any]) -> dict[str, list]:
    """Return path -> [bytes, mtime in ns, SHA-256]. known: an earlier result, to read only changed files."""

    def digest(file: Path) -> list:
        status, entry = file.stat(), known.get(str(file.resolve()))
        if isinstance(entry, list) and entry[:2] == [status.st_size, status.st_mtime_ns]:
            return entry
        content = hashlib.sha256()
        with open(file, "rb") as opened:
            while block := opened.read(2**24):  # few calls, and little memory
                content.update(block)
        return [status.st_size, status.st_mtime_ns, content.hexdigest()]

    bar = tqdm(files, desc="checking the corpus", unit="file", leave=False, disable=None)
    with ThreadPoolExecutor(cores()) as threads:
        return {str(file.resolve()): entry for file, entry in zip(bar, threads.map(digest, files))}


@dataclass
class TokenFile:
    """A token file to make from one corpus file."""

    language: str
    source: Path
    size: int  # of the source, in bytes
    entry: dict[str, Any]  # the part of its index entry that is known before tokenising
    reading: Reading


def tokenise(corpus: Corpus, tokenizer: Tokenizer, digests: dict[str, list], root: Path) -> None:
    """Bring the token files in `root` up to date with the corpus files that hold training documents.
    Held-out documents in these files are tokenised too; `open_streams` leaves them out. After a kill,
    the next call continues. digests: the corpus's `file_digests`. Raises UserError for an unreadable file."""
    made_by = {"tokenizer": hashlib.sha256(tokenizer.model).hexdigest(), "dtype": token_dtype(tokenizer).name}
    try:
        index = read_json(root / "index.json")
    except UserError:  # missing or damaged: start a new one
        index = {}
    older = {part["file"]: part for parts in index.get("languages", {}).values() for part in parts}
    usable, languages = {}, {}
    if made_by.items() <= index.items():  # keep languages outside this corpus: another run may use them
        usable = {name: part for name, part in older.items() if "text_bytes" in part}  # old versions lack it
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
    write_json(root / "index.json", {**made_by, "languages": languages})  # before any file changes
    for name in older.keys() - {part["file"] for parts in languages.values() for part in parts}:
        if re.fullmatch(rf"{LANGUAGE.pattern}\.[\d.]+\.bin", name):
            (root / name).unlink(missing_ok=True)

    missing.sort(key=lambda job: -job.size)  # largest first, so that all processes end at about the same time
    size = sum(job.size for job in missing)
    with tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for job, part in _in_parallel(missing, root, tokenizer):
            parts = languages.setdefault(job.language, [])
            parts.append(part)
            parts.sort(key=lambda part: int(part["file"].split(".")[1]))
            write_json(root / "index.json", {**made_by, "languages": dict(sorted(languages.items()))})
            bar.update(job.size)


def _in_parallel(jobs: list[TokenFile], root: Path, tokenizer: Tokenizer) -> Iterator[tuple[TokenFile, dict]]:
    """Write the token files, in parallel if they are large. Yield each finished job and its index entry."""
    if len(jobs) <= 1 or sum(job.size for job in jobs) < POOL_BYTES:
        yield from ((job, _write_tokens(job, root, tokenizer)) for job in jobs)
        return
    # Fork on Linux, as PyTorch's DataLoader does: a new interpreter would take seconds to import PyTorch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(len(jobs), cores()), context, _start_worker, (tokenizer,)) as pool:
        try:
            running = {pool.submit(_write_tokens, job, root): job for job in jobs}
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool:
            reason = "a tokenising process was killed (out of memory?)"
            raise UserError(f"{reason}; run the same command again to continue") from None
        except BaseException:  # after one bad file, do not wait for the others
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


_tokenizer: Tokenizer  # set in worker processes only


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the main process ends its workers itself

    def follow_parent() -> None:  # end this worker if the main process is killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")


def _write_tokens(job: TokenFile, root: Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Write a token file. Return its index entry, with its numbers of documents, tokens and text bytes."""
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
    """A language's tokens in sequence, memory-mapped from its token files. `Batches` draws the language with
    probability proportional to weight · size^alpha. size: by default the number of `documents`."""

    def __init__(self, parts: list[np.ndarray], documents: int, size: float = 0, weight: float = 1):
        self.parts, self.documents, self.size, self.weight = parts, documents, size or documents, weight
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from `start` on, (count,). After the last token comes the first again."""
        taken = []
        while count:
            start %= len(self)
            part = int(np.searchsorted(self.ends, start, side="right"))
            begin = start - int(self.ends[part]) + len(self.parts[part])  # within the part
            taken.append(self.parts[part][begin : begin + count])
            start, count = start + len(taken[-1]), count - len(taken[-1])
        return np.concatenate(taken)


def open_part(file: Path, dtype: str, documents: int, tokens: int, first: int) -> np.ndarray:
    """Memory-map the tokens of the first `first` documents of a token file, or of all if it has fewer."""
    stream = np.memmap(file, dtype, "r", shape=tokens)
    lengths = np.memmap(file, "<u4", "r", offset=stream.nbytes, shape=documents)
    return stream[: tokens - int(lengths[max(0, first) :].sum())]


def open_streams(corpus: Corpus, root: Path, by: str = "documents") -> dict[str, Stream]:
    """Return language -> its training tokens, from the token files in `root`. by: the unit of a stream's
    size: "documents", "bytes" (of UTF-8 text) or "tokens". Raises UserError if there are no tokens."""
    index, streams = read_json(root / "index.json"), {}
    for language in corpus.languages:
        parts = [part for part in index["languages"].get(language, []) if part["tokens"]]
        total = sum(part["documents"] for part in parts)
        _, end = corpus.documents(language, "train").part(total)  # held-out documents come last
        maps, left, text_bytes = [], end, 0.0
        for part in parts:
            sizes = part["documents"], part["tokens"]
            maps.append(open_part(root / part["file"], index["dtype"], *sizes, left))
            left -= part["documents"]
            # If part of the file is held out, its training bytes are estimated from its training tokens.
            text_bytes += part["text_bytes"] * len(maps[-1]) / part["tokens"]
        if tokens := sum(map(len, maps)):
            sizes = {"documents": end, "bytes": text_bytes, "tokens": tokens}
            streams[language] = Stream(maps, end, sizes[by])
    if not streams:
        raise UserError(f"{corpus.root}: held_out {corpus.held_out} leaves no document to train on; lower it")
    return streams


class Batches:
    """The batches of a run. All draws are made at the start and depend only on the seed. Each row of a batch
    is a block of one language, drawn by `language_shares`, as MaLA-500 sampled Glot500-c. A language's blocks
    come in random order, in a new order each time all have been seen."""

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
        """Return the language of each of a step's B rows."""
        return [self.languages[language] for language in self.language_of_row[step]]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return a step's tokens, (B, T) int64, and targets, (B, T) int64: the token after each."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, processes: int) -> tuple[Tensor, Tensor]:
        """Return process `rank`'s part of a step's B rows, as `__getitem__` does: (B / processes, T) each."""
        size = self.batch_size // processes
        rows = slice(rank * size, (rank + 1) * size)
        drawn = zip(self.language_of_row[step, rows], self.block_of_row[step, rows].tolist())
        # Each row takes T + 1 tokens: the token after the block is the target of the block's last token.
        blocks = [self.streams[index].take(block * self.seq_len, self.seq_len + 1) for index, block in drawn]
        tokens = torch.from_numpy(np.stack(blocks).astype(np.int64))  # (B / processes, T + 1)
        return tokens[:, :-1], tokens[:, 1:]


def read_ahead(load: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """Yield load(step) for each step. A thread loads the next steps while the caller works."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(load, step) for step in steps[:PREFETCH])
        for step in steps:
            batch = coming.popleft().result()
            if step + PREFETCH in steps:
                coming.append(thread.submit(load, step + PREFETCH))
            yield batch
