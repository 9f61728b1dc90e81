"""Measure what an extended tokenizer gains in each language: `python -m mala.vocab report`."""

import json
import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from tqdm import tqdm

from mala.cli import UserError
from mala.storage.corpus import script_of
from mala.words.byte_level import JsonTokenizer, to_text
from mala.words.tokenizer import WORD_START, Tokenizer
from tools.tables import print_table

# Scripts without spaces between words (ISO 15924). Their fertility is per character (code point).
UNSPACED = set("Bali Hani Hans Hant Hira Java Jpan Kana Khmr Lana Laoo Mymr Thai Tibt Yiii".split())
WORD = re.compile(r"[^\s፡]+")  # text between spaces or Ethiopic wordspaces


def measure(tokenizer: Tokenizer, language: str, documents: Iterable[str]) -> dict[str, float]:
    """Measure a tokenizer on the documents of one language. Raises UserError if they have no words.

    - `fertility`: tokens per word, or per character in scripts without spaces.
    - `bytes_per_token`: UTF-8 bytes.
    - `byte_share`, `unk_share`: the shares of tokens that are bytes and that are `<unk>`.
    """
    units = size = tokens = in_bytes = unknown = 0
    if isinstance(tokenizer, JsonTokenizer):
        unk = tokenizer.fast.token_to_id(getattr(tokenizer.fast.model, "unk_token", None) or "")
    else:
        unk = tokenizer.processor.unk_id()
    for text in documents:
        ids = tokenizer.encode(text)
        words = WORD.findall(text)
        units += len("".join(words)) if script_of(language) in UNSPACED else len(words)
        size += len(text.encode())
        tokens += len(ids)
        in_bytes += sum(i in tokenizer.byte_ids for i in ids)
        unknown += ids.count(unk)
    if not units or not tokens:
        raise UserError(f"{language}: the text holds no words for {tokenizer.name}; leave this language out")
    shares = {"byte_share": in_bytes / tokens, "unk_share": unknown / tokens}
    return {"fertility": tokens / units, "bytes_per_token": size / tokens, **shares}


def unreachable(tokenizer: Tokenizer) -> list[str]:
    """Return the pieces of a BPE model that no text encodes to. Each piece is encoded between characters that
    occur in no piece; mala/words/further_merges.py explains why that decides it."""
    if isinstance(tokenizer, JsonTokenizer):
        return unreachable_in_json(tokenizer)
    pieces = list(tokenizer.scores())
    used = set("".join(pieces))
    stranger = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)  # private use area
    texts = [f"{stranger}{piece.replace(WORD_START, ' ')}{stranger}" for piece in pieces]
    encoded = tokenizer.encode_batch(texts)
    return [piece for piece, ids in zip(pieces, encoded) if tokenizer.processor.piece_to_id(piece) not in ids]


def unreachable_in_json(tokenizer: JsonTokenizer) -> list[str]:
    """Return the unreachable pieces of a byte-level BPE. Each piece is encoded alone and in a few contexts. A
    piece that ends within a character is not text: it is reachable if its bytes merge to it."""
    content = json.loads(tokenizer.model)
    content["model"]["ignore_merges"] = False
    merged = JsonTokenizer(json.dumps(content).encode(), tokenizer.name).segment
    added = tokenizer.fast.get_added_tokens_decoder()
    left = {id: piece for id, piece in enumerate(tokenizer.pieces) if piece and id not in added}
    parts = {id: piece for id, piece in left.items() if id in tokenizer.byte_ids}
    reached = {id for id, ids in zip(parts, merged(list(parts.values()))) if ids == [id]}
    for context in ("{}", " {}", "a{}", "{}a", "a{}a", "1{}", "\n{}"):
        left = {id: piece for id, piece in left.items() if id not in reached}
        texts = [context.format(to_text(piece)) for id, piece in left.items() if id not in parts]
        encoded = tokenizer.encode_batch(texts)
        reached |= {id for id, ids in zip([id for id in left if id not in parts], encoded) if id in ids}
    return [piece for id, piece in left.items() if id not in reached]


def fertility_report(base: Tokenizer, new: Tokenizer, documents: Mapping[str, Iterable[str]]) -> dict:
    """Return `{"languages": {lang: {"base": F, "new": F}}, "macro": {"base": F, "new": F}, "pieces": {...}}`.

    - F is a result of `measure`.
    - macro: means over languages of equal weight. `fertility` is the mean of the languages with spaces, and
      `fertility_characters` that of the others.
    - pieces: `base`, `new` and `added` are numbers of pieces. `unreachable_base`, `unreachable_new` and
      `unreachable_added` are the numbers among them that no text encodes to.

    Raises UserError if `new` is not an extension of `base`.
    """
    new.check_extends(base)
    languages = {}
    bar = tqdm(documents.items(), desc="encoding", unit="language", leave=False, disable=None)
    for language, texts in bar:
        languages[language] = {"base": measure(base, language, texts), "new": measure(new, language, texts)}
    lost = unreachable(new)
    pieces = {"base": len(base), "new": len(new), "added": len(new) - len(base)}
    pieces |= {"unreachable_base": len(unreachable(base)), "unreachable_new": len(lost)}
    pieces["unreachable_added"] = len(set(lost) - set(base.pieces))
    macros = {side: macro_average(languages, side) for side in ("base", "new")}
    return {"languages": languages, "macro": macros, "pieces": pieces}


def macro_average(languages: dict[str, dict], side: str) -> dict[str, float]:
    shared = ("bytes_per_token", "byte_share", "unk_share")
    average = {key: fmean(sides[side][key] for sides in languages.values()) for key in shared}
    for unit, chosen in by_unit(languages).items():
        key = "fertility" if unit == "word" else "fertility_characters"
        average[key] = fmean(languages[name][side]["fertility"] for name in chosen)
    return average


def by_unit(languages: Iterable[str]) -> dict[str, list[str]]:
    """Return unit of fertility ("word" or "character") -> its languages, without units that have none."""
    units: dict[str, list[str]] = {"word": [], "character": []}
    for language in languages:
        units["character" if script_of(language) in UNSPACED else "word"].append(language)
    return {unit: chosen for unit, chosen in units.items() if chosen}


def print_report(report: dict[str, Any]) -> None:
    """Print a table of languages, largest gain first, and a summary of two lines."""

    def row(name: str, sides: dict[str, dict], key: str = "fertility") -> list[str]:
        base, new = sides["base"], sides["new"]
        fertility = [f"{base[key]:.2f}", f"{new[key]:.2f}", f"{new[key] / base[key] - 1:+.1%}"]
        size = [f"{side['bytes_per_token']:.2f}" for side in (base, new)]
        shares = [f"{side[share]:.1%}" for share in ("byte_share", "unk_share") for side in (base, new)]
        return [name, *fertility, *size, *shares]

    def change(language: str) -> float:
        return languages[language]["new"]["fertility"] / languages[language]["base"]["fertility"]

    languages, macro, pieces = report["languages"], report["macro"], report["pieces"]
    ordered = sorted(languages, key=change)
    rows = [row(language, languages[language]) for language in ordered]
    last = [row("macro-average", macro)] if "fertility" in macro["base"] else []
    if "fertility_characters" in macro["base"]:
        last.append([*row("macro-average*", macro, "fertility_characters")[:4], *[""] * 6])
    columns = ("fertility", "extended", "change", "bytes/token", "extended")
    print_table(("language", *columns, "byte tokens", "extended", "<unk>", "extended"), rows, last)
    unspaced = by_unit(ordered).get("character")
    characters = f"; tokens per character (*) in {', '.join(unspaced)}" if unspaced else ""
    print(f"fertility: tokens per word{characters}")
    added, lost = pieces["unreachable_added"], pieces["unreachable_new"] - pieces["unreachable_added"]
    print(
        f"{pieces['base']:,} pieces -> {pieces['new']:,}; no text encodes to {added:,} of the "
        f"{pieces['added']:,} added, nor to {lost:,} of the base's ({pieces['unreachable_base']:,} before)"
    )
