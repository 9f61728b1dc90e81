"""What a run needs before its first step: made once and left in --out, so that the same command goes on after a kill.

    run.json     the settings, and what must not change on the way: the checkpoint, the corpus, the settings of IDENTITY
    held_out/    the documents that are measured, a corpus of its own, which evaluate.py reads, too
    base/        the checkpoint with the extended vocabulary
    tokens/      the token files, see mala/data.py

A run with another identity is never continued.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mala.checkpoint import (
    STATE,
    atomic_directory,
    check_whole,
    checkpoints,
    lock,
    newest_whole,
    read_json,
    read_state,
    read_weights,
    set_aside,
    step_of,
    write_json,
)
from mala.cli import UserError
from mala.corpus import Corpus
from mala.data import file_digests, tokenise
from mala.extend import extend_checkpoint
from mala.tokenizer import Tokenizer
from mala.vocab import continue_merges, count_words, merge, sample, train_pieces

# The settings that decide, with the checkpoint and the corpus, what is trained on what. Others, such as the learning rate,
# may be changed on the way.
IDENTITY = ("langs", "held_out", "max_held_out", "extend_vocab", "vocab_method", "init", "r", "lora_alpha", "lora_dropout",
            "use_rslora", "target_modules", "modules_to_save", "seq_len", "batch_size", "alpha", "seed")  # fmt: skip


def prepare(settings: Any, corpus: Corpus, device: str, dtype: torch.dtype, locks: ExitStack
            ) -> tuple[Path | None, dict[str, Any]]:  # fmt: skip
    """Make whatever of the above is not there yet; returns the checkpoint to go on from, if there is one, and the identity.

    settings: those of train.py. locks: takes the lock of --out, until it is closed. Only the main process calls it. Raises
    UserError for a mistake in the input, before anything is written, and where --out holds another run.
    """
    out, model = Path(settings.out), Path(settings.model)
    was_there = out.is_dir()
    if was_there:  # else the lock waits: it would make the folder, and a mistake in the input must leave nothing
        locks.enter_context(lock(out))
    earlier = read_json(out / "run.json") if (out / "run.json").exists() else {}
    known = earlier.get("files")
    files = file_digests([file for files in corpus.files.values() for file in files], known if isinstance(known, dict) else {})
    identity = {name: getattr(settings, name) for name in IDENTITY}
    identity |= {"langs": sorted(set(settings.langs)), "model": checkpoint_digest(model), "data": corpus_digest(corpus, files)}
    identity = json.loads(json.dumps(identity))  # as it comes back from a file: lists, no tuples
    checkpoint = choose_checkpoint(settings, earlier, identity)

    made = [out / "held_out"] + ([out / "base"] if settings.extend_vocab else [])
    if settings.resume == "never" or earlier.get("identity") != identity or not all(folder.is_dir() for folder in made):
        make_base(settings, corpus, device, dtype, keep_checkpoints=checkpoint is not None)
    if not was_there:
        locks.enter_context(lock(out))
    tokenizer = Tokenizer.from_pretrained(out / "base" if settings.extend_vocab else model)
    if checkpoint and (checkpoint / "tokenizer.model").read_bytes() != tokenizer.model:
        raise UserError(f"{checkpoint}: has another vocabulary than {tokenizer.name}, which was learnt again; put the base/ "
                        f"of its own run into {out}, or start over with --resume never")  # fmt: skip
    write_json(out / "run.json", {"identity": identity, "settings": vars(settings), "files": files})
    folder = out / "checkpoints"
    for half in folder.glob(".step-*.tmp"):
        shutil.rmtree(half)
    if checkpoint:
        done = read_state(checkpoint)["step"]
        for later in checkpoints(folder):  # damaged, or on the way that --resume DIR leaves
            if step_of(later) > done:
                set_aside(later)
    tokens = Path(settings.tokens or out / "tokens")
    with lock(tokens, wait=True):  # other runs may share them
        tokenise(corpus, tokenizer, files, tokens)
    return checkpoint, identity


def choose_checkpoint(settings: Any, earlier: dict[str, Any], identity: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; None: from the beginning. earlier: run.json. Raises UserError where --out or the checkpoint
    is of a run with another identity."""
    out = Path(settings.out)
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        checkpoint = newest_whole(out / "checkpoints")
    else:
        checkpoint = Path(settings.resume)
        if not checkpoint.is_dir():
            raise UserError(f"resume is {settings.resume}, expected auto, never or the folder of a checkpoint")
        check_whole(checkpoint)
    if checkpoint:
        check_identity(checkpoint / STATE, read_state(checkpoint)["identity"], identity, settings)
    if earlier.get("identity") and (checkpoint or (out / "adapter").is_dir()):  # an unfinished run without one is replaced
        check_identity(out / "run.json", earlier["identity"], identity, settings)
    return checkpoint


def checkpoint_digest(directory: Path) -> str:
    """SHA-256 of a model folder's config and tokenizer, and of the beginning of every tensor (other weights differ there,
    too, and all of them would take minutes to read)."""
    content = hashlib.sha256((directory / "config.json").read_bytes() + (directory / "tokenizer.model").read_bytes())
    for name, tensor in sorted(read_weights(directory)):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.flatten()[:1024].view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def corpus_digest(corpus: Corpus, files: dict[str, list]) -> str:
    """SHA-256 of the languages, the names of their files, and what these hold."""
    entries = [
        [language, file.name, files[str(file.resolve())][2]] for language in corpus.files for file in corpus.files[language]
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def check_identity(file: Path, theirs: dict[str, Any], identity: dict[str, Any], settings: Any) -> None:
    """Raise UserError where an earlier run, whose identity stands in `file`, was another than this one."""
    for key, value in identity.items():
        if theirs.get(key) == value:
            continue
        difference = {
            "model": f"began from another checkpoint than {settings.model} is now",
            "data": f"was trained on other data than {settings.data} holds now",
        }.get(key, f"had {key} {theirs.get(key)}, this one has {value}")
        raise UserError(f"{file}: the earlier run {difference}; name another --out, or start over with --resume never")


def make_base(settings: Any, corpus: Corpus, device: str, dtype: torch.dtype, keep_checkpoints: bool) -> None:
    """Hold documents out, learn the vocabulary and extend the checkpoint, in place of what an earlier run left."""
    out, model = Path(settings.out), Path(settings.model)
    base_tokenizer = Tokenizer.from_pretrained(model)
    test_documents, train_documents = corpus.load("test"), corpus.stream("train")
    if settings.extend_vocab:
        words = count_words(sample(train_documents, settings.alpha, settings.seed))
        if settings.vocab_method == "union":
            tokenizer = Tokenizer(merge(base_tokenizer, Tokenizer(train_pieces(words, settings.extend_vocab))))
        else:
            tokenizer = Tokenizer(continue_merges(base_tokenizer, words, settings.extend_vocab))
        if len(tokenizer) == len(base_tokenizer):
            raise UserError(f"{model}: the tokenizer has all {settings.extend_vocab:,} pieces already; give --extend-vocab 0")

    clear(out, keep_checkpoints)
    with atomic_directory(out / "held_out") as folder:
        for language, texts in test_documents.items():
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            (folder / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    if settings.extend_vocab:
        drawn = sample(train_documents, settings.alpha, settings.seed)
        extend_checkpoint(model, tokenizer, out / "base", settings.init, settings.seed, drawn, device, dtype)


def clear(out: Path, keep_checkpoints: bool) -> None:
    """Make the output folder, and take away what an earlier run left, so that a killed run leaves no mixture of the two."""
    if out.is_dir() and not (out / "run.json").exists() and any(entry.name != ".lock" for entry in out.iterdir()):
        raise UserError(f"{out}: the folder holds something that is no result of train.py; name an empty or a new --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "run.json", {})  # the folder is ours; fails now, not after an hour, where nothing can be written
    for name in ("nll.json", "metrics.jsonl", "loss.png", "nll.png"):
        (out / name).unlink(missing_ok=True)
    for name in ("adapter", "base", "held_out", "tensorboard", *([] if keep_checkpoints else ["checkpoints"])):
        shutil.rmtree(out / name, ignore_errors=True)
