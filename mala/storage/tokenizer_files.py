"""The files that a tokenizer is made of, and how they travel: all of them from one folder, or none.

SentencePiece reads `tokenizer.model`, the package `tokenizers` reads `tokenizer.json`, and transformers reads
`tokenizer_config.json` and then one of the two. We write all three, so that every reader gives the same ids:
transformers 5 would rebuild the merges of a `tokenizer.model` in the order of its ids, SentencePiece goes by
the scores, and in a union these two orders differ.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.files import read_json, write_json
from mala.storage.weights import INDEX, OTHER_WEIGHTS
from mala.words.tokenizer import Tokenizer, reads_json
from mala.words.tokenizer_json import to_json

PIECES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")  # what an extension replaces
ADDED = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")  # where tokens are added to them
TOKENIZER_FILES = {*PIECES, *ADDED, "special_tokens_map.json", "chat_template.jinja", "chat_template.json"}


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder brings a tokenizer of its own."""
    return any((folder / name).exists() for name in PIECES[:2])


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files beside weights and tokenizer: generation_config.json, the licence, …"""
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in OTHER_WEIGHTS or file.name == INDEX
        if file.is_file() and not is_weights and file.name not in TOKENIZER_FILES:
            shutil.copyfile(file, target / file.name)


def copy_tokenizer(source: Path, target: Path, rows: int, merged: Tokenizer | None = None) -> None:
    """Copy all files of a tokenizer, with `merged` in place of its pieces if that is given. A missing
    `tokenizer.json` is made, with its tokenizer_config.json. Raises UserError as `added_tokens` does."""
    model, tokenizer = source / "tokenizer.model", merged
    if not merged and model.exists() and not reads_json(source):
        tokenizer = Tokenizer.from_pretrained(model)
    if tokenizer:
        tokenizer.check_fits(rows)
    added = added_tokens(source, len(tokenizer) if tokenizer else 0, rows)
    for name in sorted(TOKENIZER_FILES):
        if (source / name).is_file() and not (merged and name in PIECES):
            shutil.copyfile(source / name, target / name)
    if merged:
        (target / "tokenizer.model").write_bytes(merged.model)
    if tokenizer and not (target / "tokenizer.json").exists():
        write_for_transformers(tokenizer, target, added)


def added_tokens(folder: Path, pieces: int, rows: int) -> dict[int, str]:
    """id -> text of each token that transformers' files add after a SentencePiece model's `pieces` (0: of all
    tokens, if there is no such model). Raises UserError if two files contradict each other, and for a token
    that has none of the model's `rows`."""
    found: dict[int, tuple[str, Path]] = {}
    for file in (folder / name for name in ADDED):
        values = read_json(file) if file.exists() else {}
        pairs = [(id, content) for content, id in values.items()] if file.name == ADDED[0] else []
        pairs += (values.get("added_tokens_decoder") or {}).items()
        pairs += [(token["id"], token) for token in values.get("added_tokens") or []]
        if isinstance(vocabulary := (values.get("model") or {}).get("vocab"), dict):
            pairs += [(id, content) for content, id in vocabulary.items()]
        for id, content in pairs:
            content = content.get("content") if isinstance(content, dict) else content
            if not str(id).isdigit() or int(id) < pieces:
                continue
            known, other = found.setdefault(int(id), (content, file))
            if known != content:
                beside = f"{other.name} beside it has {known!r}; keep the file of the model's training"
                raise UserError(f"{file}: token {int(id):,} is {content!r}, but {beside}")
            if int(id) >= rows:
                room = f"only {rows:,} rows for the tokenizer; take it out of this file, if it is not needed"
                raise UserError(f"{file}: {content!r} is token {int(id):,}, but the model has {room}")
    return {id: content for id, (content, _) in sorted(found.items())}


def write_for_transformers(tokenizer: Tokenizer, folder: Path, added: dict[int, str]) -> None:
    """Write `tokenizer.json`, and a `tokenizer_config.json` whose class reads that file as it stands. What
    the folder's own tokenizer_config.json says otherwise stays: `<s>` or not, `</s>` or not, a template."""
    file, model = folder / "tokenizer_config.json", tokenizer.processor
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    config: dict[str, Any] = {name: tokenizer.pieces[id] for name, id in names.items() if id >= 0}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    own = read_json(file) if file.exists() else {}
    config |= {key: value for key, value in own.items() if key not in ("legacy", "add_prefix_space")}
    # LLaMA's own class takes `<s>` for granted, the class that reads tokenizer.json does not.
    begins, ends = own.get("add_bos_token") is not False, own.get("add_eos_token") is True
    config |= {"add_bos_token": begins, "add_eos_token": ends, "tokenizer_class": "PreTrainedTokenizerFast"}
    around = [tokenizer.bos_id] * begins, [model.eos_id()] * (ends and model.eos_id() >= 0)
    content = to_json(tokenizer, added, *around)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write_json(file, config)
