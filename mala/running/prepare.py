"""Prepare a run: make once what it needs before its first step, and keep it in --out.

    run.json     the settings and the run's identity, which must not change: base, corpora, and IDENTITY
    held_out/    the held-out documents, as a corpus that evaluate.py can read
    base/        the checkpoint with the extended vocabulary
    tokens/      the token files, see mala/data.py; those of --replay are in tokens/replay/

After a kill, the same command continues from these files. A run with another identity is never continued.
"""

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mala.cli import UserError
from mala.data import Stream, file_digests, open_streams, tokenise
from mala.running.settings import OF_LORA, RESULT, Settings
from mala.storage import training_checkpoint
from mala.storage.corpus import Corpus, some
from mala.storage.files import atomic_directory, lock, read_json, write_json
from mala.storage.weights import read_weights
from mala.vocab import count_words, sample, train_pieces
from mala.words.byte_level import load_tokenizer
from mala.words.further_merges import continue_merges
from mala.words.merges_and_scores import merge
from mala.words.new_rows import Where, extend_checkpoint
from mala.words.tokenizer import Tokenizer

# The settings that, with the base and the corpora, decide what a run trains on what. Others, such as the
# learning rate, may change when a run is continued.
IDENTITY = """train langs held_out max_held_out text_field skip_bad_lines extend_vocab vocab_method init r
    lora_alpha lora_dropout use_rslora target_modules modules_to_save seq_len batch_size alpha seed
    moments train_rows attend warmup_embeddings sample_by weights replay_share""".split()


def open_corpora(settings: Settings) -> dict[str, Corpus]:
    """Open the corpus, under the key "", and --replay's, if given, under "replay". The keys are folders in
    tokens/. Raises UserError as `Corpus` does, or if a setting names a language that no corpus has."""
    corpora = {"": Corpus.from_settings(settings)}
    if settings.replay:
        corpora["replay"] = Corpus.from_settings(replace(settings, langs=()), Path(settings.replay))
    found = {language for corpus in corpora.values() for language in corpus.languages}
    named = {"weights": settings.language_weights(), "base_langs": settings.base_langs}
    named["samples"] = settings.samples
    for setting, languages in named.items():
        default = getattr(Settings, setting) or ()
        if unknown := sorted({*languages} - found - {*default}):
            raise UserError(f"{setting} names {unknown[0]}; expected some of {some(sorted(found))}")
    return corpora


def open_tokens(settings: Settings, corpora: dict[str, Corpus]) -> list[dict[str, Stream]]:
    """Open the token files that `prepare` left, as streams of each corpus. The weights of --replay's streams
    give it its share of the rows, and so of the tokens, because all rows are equally long."""
    tokens = Path(settings.tokens or f"{settings.out}/tokens")
    opened = [open_streams(corpus, tokens / name, settings.sample_by) for name, corpus in corpora.items()]
    for language, weight in settings.language_weights().items():
        for stream in (streams[language] for streams in opened if language in streams):
            stream.weight = weight
    whole = [sum(one.weight * one.size**settings.alpha for one in streams.values()) for streams in opened]
    for stream in opened[1].values() if settings.replay else ():
        stream.weight *= settings.replay_share / (1 - settings.replay_share) * whole[0] / whole[1]
    return opened


def prepare(
    settings: Settings, corpora: dict[str, Corpus], device: str, dtype: torch.dtype, locks: ExitStack
) -> tuple[Path | None, dict[str, Any]]:
    """Make the missing files. Return the checkpoint to continue from, or None, and the run's identity. Call
    this in the main process only. `locks` holds the lock of --out until it is closed. Raises UserError for a
    mistake in the input, before anything is written, or if --out holds another run."""
    out, model = Path(settings.out), Path(settings.model)
    was_there = out.is_dir()
    if was_there:  # else lock later: locking makes the folder, and a mistake must leave none
        locks.enter_context(lock(out))
    earlier = read_json(out / "run.json") if (out / "run.json").exists() else {}
    of_languages = [files for corpus in corpora.values() for files in corpus.files.values()]
    files = file_digests(list(chain.from_iterable(of_languages)), earlier.get("files", {}))
    identity = {name: getattr(settings, name) for name in IDENTITY} | {"langs": sorted(set(settings.langs))}
    identity |= {"model": checkpoint_digest(model), "replay": None}
    identity |= dict.fromkeys(OF_LORA) if settings.train == "all" else {}
    identity |= {name or "data": corpus_digest(corpus, files) for name, corpus in corpora.items()}
    identity = json.loads(json.dumps(identity))  # as read from a file: tuples are lists
    checkpoint = choose_checkpoint(settings, earlier, identity)

    made = [out / "held_out"] + ([out / "base"] if settings.extend_vocab else [])
    older = {name: getattr(Settings, name, None) for name in identity}  # an older run may lack a setting
    is_made = older | earlier.get("identity", {}) == identity and all(folder.is_dir() for folder in made)
    if settings.resume == "never" or not is_made:
        make_base(settings, corpora, (device, dtype), clear_all=checkpoint is None)
    if not was_there:
        locks.enter_context(lock(out))
    tokenizer = load_tokenizer(out / "base" if settings.extend_vocab else model)
    if checkpoint and load_tokenizer(checkpoint).model != tokenizer.model:
        remedy = f"copy the base/ of its run into {out}, or start over with --resume never"
        raise UserError(f"{checkpoint}: has another vocabulary than the new {tokenizer.name}; {remedy}")
    write_json(out / "run.json", {"identity": identity, "settings": vars(settings), "files": files})
    clear_checkpoints(out / "checkpoints", checkpoint)
    tokens = Path(settings.tokens or out / "tokens")
    with lock(tokens, wait=True):  # other runs may share the folder
        for name, corpus in corpora.items():
            tokenise(corpus, tokenizer, files, tokens / name)
    return checkpoint, identity


def choose_checkpoint(settings: Settings, earlier: dict[str, Any], identity: dict[str, Any]) -> Path | None:
    """Return the checkpoint to continue from, or None. earlier: the content of run.json. Raises UserError if
    the checkpoint or --out belongs to another run."""
    out = Path(settings.out)
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        checkpoint = training_checkpoint.newest_intact(out / "checkpoints")
    else:
        checkpoint = Path(settings.resume)
        if not checkpoint.is_dir():
            raise UserError(f"resume is {settings.resume}, expected auto, never or a checkpoint's folder")
        training_checkpoint.check_intact(checkpoint)
    if checkpoint:
        file, state = checkpoint / training_checkpoint.STATE, training_checkpoint.read_state(checkpoint)
        check_identity(file, state["identity"], identity, settings)
    is_kept = checkpoint or any((out / name).is_dir() for name in RESULT.values())  # else overwrite
    if earlier.get("identity") and is_kept:
        check_identity(out / "run.json", earlier["identity"], identity, settings)
    return checkpoint


def clear_checkpoints(folder: Path, resumed_from: Path | None) -> None:
    """Delete half-written checkpoints, and set aside those after the one that the run continues from."""
    for half in folder.glob(".step-*.*"):
        shutil.rmtree(half)
    if resumed_from:
        done = training_checkpoint.read_state(resumed_from)["step"]
        for later in training_checkpoint.checkpoints(folder):  # damaged, or abandoned by --resume DIR
            if training_checkpoint.step_of(later) > done:
                training_checkpoint.set_aside(later)


def checkpoint_digest(directory: Path) -> str:
    """Return the SHA-256 of config, tokenizer and the start of each tensor; whole tensors take minutes."""
    content = hashlib.sha256((directory / "config.json").read_bytes())
    content.update(load_tokenizer(directory).model)
    for name, tensor in sorted(read_weights(directory)):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.flatten()[:1024].view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def corpus_digest(corpus: Corpus, files: dict[str, list]) -> str:
    """Return the SHA-256 of the languages, the names of their files and the files' digests."""
    pairs = [(language, file) for language, of_language in corpus.files.items() for file in of_language]
    names = ("/".join(file.relative_to(corpus.root).parts[1:]) or file.name for _, file in pairs)
    entries = [[one, name, files[str(file.resolve())][2]] for (one, file), name in zip(pairs, names)]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def check_identity(file: Path, theirs: dict[str, Any], identity: dict[str, Any], settings: Settings) -> None:
    """Raise UserError if `theirs`, the identity of an earlier run in `file`, differs from this run's."""
    for key, value in identity.items():
        if theirs.get(key, getattr(Settings, key, None)) != value:  # an older run may lack a setting
            difference = {
                "model": f"began from another checkpoint than {settings.model} holds now",
                "data": f"was trained on other data than {settings.data} holds now",
                "replay": f"had other --replay data than {settings.replay or 'none'}",
            }.get(key, f"had {key} {theirs.get(key)}, this one has {value}")
            remedy = "name another --out, or start over with --resume never"
            raise UserError(f"{file}: the earlier run {difference}; {remedy}")


def make_base(settings: Settings, corpora: dict[str, Corpus], where: Where, clear_all: bool) -> None:
    """Hold documents out, learn the vocabulary and extend the checkpoint, computing on `where`. First delete
    an earlier run's files, and its checkpoints if `clear_all`. Raises UserError as `prepare` does."""
    out, model = Path(settings.out), Path(settings.model)
    base_tokenizer = load_tokenizer(model)
    train_documents, *_ = [corpus.stream("train") for corpus in corpora.values()]  # raises if one has none
    test_documents = corpora[""].load("test")
    for language in corpora["replay"].languages if settings.replay else ():
        if texts := list(corpora["replay"].documents(language, "test")):
            test_documents.setdefault(language, texts)  # for a language in both corpora, keep the main one's
    if settings.extend_vocab:
        words = count_words(sample(train_documents, settings.alpha, settings.seed), base_tokenizer.words)
        if settings.vocab_method == "union":
            model_file = merge(base_tokenizer, Tokenizer(train_pieces(words, settings.extend_vocab)))
        else:
            model_file = continue_merges(base_tokenizer, words, settings.extend_vocab)
        tokenizer = type(base_tokenizer)(model_file, base_tokenizer.name)
        if len(tokenizer) == len(base_tokenizer):
            raise UserError(f"{model}: the tokenizer already has all new pieces; give --extend-vocab 0")

    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists() and any(entry.name != ".lock" for entry in out.iterdir()):
        raise UserError(f"{out}: holds files that are not from train.py; name an empty or a new --out")
    write_json(out / "run.json", {})  # claims the folder, and fails at once if it cannot be written
    for name in ("nll.json", "metrics.jsonl", "loss.png", "nll.png"):
        (out / name).unlink(missing_ok=True)
    for name in ("base", "held_out", "tensorboard", *RESULT.values(), *["checkpoints"] * clear_all):
        shutil.rmtree(out / name, ignore_errors=True)
    with atomic_directory(out / "held_out") as folder:
        for language, texts in test_documents.items():
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            (folder / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    if settings.extend_vocab:
        drawn = sample(train_documents, settings.alpha, settings.seed)
        extend_checkpoint(model, tokenizer, out / "base", settings.init, settings.seed, drawn, where)
