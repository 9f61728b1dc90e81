"""The files of a tokenizer. They are always copied together, from one folder.

SentencePiece reads `tokenizer.model`, the package `tokenizers` reads `tokenizer.json`, and transformers reads
`tokenizer_config.json` and one of the two. We write all three, so that every reader gives the same ids. Given
only a `tokenizer.model`, transformers 5 merges by id and not by score. In a union these two orders differ.
"""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.files import read_json, write_json
from mala.storage.weights import INDEX, WEIGHT_FILES
from mala.words.byte_level import JsonTokenizer, load_tokenizer, reads_json
from mala.words.tokenizer import NORMALIZER_SPEC, WORD_START, Tokenizer

PIECES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")  # an extension replaces these
ADDED = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")  # these may add tokens
TOKENIZER_FILES = {*PIECES, *ADDED, "special_tokens_map.json", "chat_template.jinja", "chat_template.json"}
Object = dict[str, Any]  # a JSON object


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer."""
    return any((folder / name).exists() for name in PIECES[:2])


def copy_companions(source: Path, target: Path) -> None:
    """Copy a checkpoint's other small files, such as generation_config.json and the licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name not in {*TOKENIZER_FILES, INDEX}:
            shutil.copyfile(file, target / file.name)


def copy_tokenizer(source: Path, target: Path, rows: int) -> None:
    """Copy all files of a tokenizer. If `tokenizer.json` is missing, write it and its tokenizer_config.json.
    Raises UserError as `added_tokens` does."""
    model, tokenizer = source / "tokenizer.model", None
    if model.exists() and not reads_json(source):
        tokenizer = Tokenizer.from_pretrained(model)
        tokenizer.check_fits(rows)
    added = added_tokens(source, len(tokenizer) if tokenizer else 0, rows)
    _copy(source, target, TOKENIZER_FILES)
    if tokenizer and not (target / "tokenizer.json").exists():
        write_for_transformers(tokenizer, target, added)
    stays_behind = (source / "config.json").exists() and not (target / "config.json").exists()
    if stays_behind and reads_json(source):  # an adapter has no config.json
        _write_class(source, target)


def write_extended(source: Path, base: Tokenizer, merged: Tokenizer, target: Path) -> None:
    """Copy the tokenizer files of `source`, with `merged` in place of `base`, and its config.json with the
    new vocab_size. Raises UserError if the files add tokens at ids that the new pieces need."""
    added_tokens(source, len(base), rows=len(base))
    _copy(source, target, TOKENIZER_FILES - {*PIECES})
    if isinstance(merged, JsonTokenizer):
        (target / "tokenizer.json").write_bytes(merged.model)
        _write_class(source, target)
    else:
        (target / "tokenizer.model").write_bytes(merged.model)
        write_for_transformers(merged, target, {})
    if (source / "config.json").exists():
        config = read_json(source / "config.json")
        write_json(target / "config.json", {**config, "vocab_size": len(merged)})


def _write_class(source: Path, folder: Path) -> None:
    """Write a tokenizer_config.json. It names the token that begins a text: `source` may name it only in its
    config.json. Trap: transformers' other tokenizer classes split text into words by their own rules."""
    file = folder / "tokenizer_config.json"
    config = {"clean_up_tokenization_spaces": False} | (read_json(file) if file.exists() else {})
    if not config.get("bos_token") and (base := load_tokenizer(source)).bos_id is not None:
        config["bos_token"] = base.pieces[base.bos_id]
    write_json(file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _copy(source: Path, target: Path, names: set[str]) -> None:
    for name in sorted(names):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def added_tokens(folder: Path, pieces: int, rows: int) -> dict[int, str]:
    """Return id -> text of the tokens that transformers' files hold from id `pieces` on (0: all tokens).
    Raises UserError if two files contradict each other, or if an id is not below the model's `rows`."""
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
                beside = f"{other.name} has {known!r}; keep only the file that the model was trained with"
                raise UserError(f"{file}: token {int(id):,} is {content!r}, but {beside}")
            if int(id) >= rows:
                room = f"only {rows:,} rows for the tokenizer; remove it from this file if it is not needed"
                raise UserError(f"{file}: {content!r} is token {int(id):,}, but the model has {room}")
    return {id: content for id, (content, _) in sorted(found.items())}


def write_for_transformers(tokenizer: Tokenizer, folder: Path, added: dict[int, str]) -> None:
    """Write `tokenizer.json`, and a `tokenizer_config.json` whose class reads that file unchanged. Keep what
    the folder's own tokenizer_config.json sets: whether to add `<s>` and `</s>`, a chat template, …"""
    file, model = folder / "tokenizer_config.json", tokenizer.processor
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    config: Object = {name: tokenizer.pieces[id] for name, id in names.items() if id >= 0}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    own = read_json(file) if file.exists() else {}
    config |= {key: value for key, value in own.items() if key not in ("legacy", "add_prefix_space")}
    # LLaMA's own class adds `<s>` by default. The class that reads tokenizer.json does not.
    begins, ends = own.get("add_bos_token") is not False, own.get("add_eos_token") is True
    config |= {"add_bos_token": begins, "add_eos_token": ends, "tokenizer_class": "PreTrainedTokenizerFast"}
    around = [tokenizer.bos_id] * begins, [model.eos_id()] * (ends and model.eos_id() >= 0)
    content = to_json(tokenizer, added, *around)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write_json(file, config)


def to_json(tokenizer: Tokenizer, added: dict[int, str], before: list[int], after: list[int]) -> Object:
    """Return a BPE model as a `tokenizer.json` that puts the tokens `before` and `after` around each text.
    added: from `added_tokens`. Source: huggingface.co/docs/tokenizers. Trap: after a user-defined symbol,
    `tokenizers` begins a new word and SentencePiece does not. LLaMA has no such symbols."""
    pieces, types = tokenizer.pieces, tokenizer.types
    # UNKNOWN (2) and CONTROL (3) pieces are special. USER_DEFINED pieces (4) are matched before any merge.
    found = {id: pieces[id] for id, kind in enumerate(types) if kind in (2, 3, 4)} | added
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [{"id": id, "content": content, **plain} for id, content in found.items()]
    tokens = [token | {"special": token["id"] in added or types[token["id"]] != 4} for token in tokens]

    def template(text: str, type_id: int) -> list[Object]:
        parts = [("SpecialToken", pieces[id]) for id in before] + [("Sequence", text)]
        parts += [("SpecialToken", pieces[id]) for id in after]
        return [{kind: {"id": name, "type_id": type_id}} for kind, name in parts]

    special = {pieces[id]: {"id": pieces[id], "ids": [id], "tokens": [pieces[id]]} for id in before + after}
    templates = {"single": template("A", 0), "pair": template("A", 0) + template("B", 1)}
    steps, decoders = normalisation(tokenizer.specification(NORMALIZER_SPEC))
    model = {"type": "BPE", "dropout": None, "unk_token": pieces[tokenizer.processor.unk_id()]}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True}
    model |= {"byte_fallback": len(tokenizer.byte_ids) == 256, "ignore_merges": False}
    model |= {"vocab": {piece: id for id, piece in enumerate(pieces)}, "merges": merges(tokenizer)}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens}
    content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    content["post_processor"] = {"type": "TemplateProcessing", **templates, "special_tokens": special}
    return content | {"decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


def merges(tokenizer: Tokenizer) -> list[list[str]]:
    """Return every split of a piece into two pieces, highest score first. Trap: SentencePiece merges pieces
    of equal score from left to right. A list cannot say that, so our models have no equal scores."""
    scores = tokenizer.scores()
    ranked = sorted(scores, key=lambda piece: -scores[piece])  # stable: the lower id first if equal
    cuts = [(piece[:at], piece[at:]) for piece in ranked for at in range(1, len(piece))]
    return [[left, right] for left, right in cuts if left in scores and right in scores]


def normalisation(spec: Object) -> tuple[list[Object], list[Object]]:
    """Return the normalizers of a `tokenizer.json` for a NormalizerSpec, and the decoders that undo them."""
    steps: list[Object] = []
    if spec.get(2):  # precompiled_charsmap, for example NFKC
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec[2]).decode()})
    if spec.get(4, 1):  # remove_extra_whitespaces
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    decoders = [{"type": "Replace", "pattern": {"String": WORD_START}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.get(3, 1):  # add_dummy_prefix
        steps.append({"type": "Prepend", "prepend": WORD_START})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return [*steps, spaces], decoders
