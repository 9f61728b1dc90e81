"""What an extended tokenizer brings, language by language: `python -m mala.vocab report`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from mala.cli import UserError, print_table
from mala.tokenizer import WORD_START, Tokenizer

# Scripts whose words no space divides (ISO 15924): their unit of fertility is the character (code point).
UNSPACED = set("Bali Hani Hans Hant Hira Java Jpan Kana Khmr Lana Laoo Mymr Thai Tibt Yiii".split())
WORD = re.compile(r"[^\s፡]+")  # between spaces or Ethiopic wordspaces


def measure(tokenizer: Tokenizer, language: str, documents: Iterable[str]) -> dict[str, float]:
    """One language: `fertility`, tokens per word (per character in scripts without spaces), `bytes_per_token`
    (UTF-8), and the shares of tokens that are bytes (`byte_share`) and `<unk>` (`unk_share`)."""
    units = size = tokens = byte_tokens = unknown = 0
    unk = tokenizer.processor.unk_id()
    for text in documents:
        ids = tokenizer.encode(text)
        words = WORD.findall(text)
        units += len("".join(words)) if language[4:] in UNSPACED else len(words)
        size += len(text.encode())
        tokens += len(ids)
        byte_tokens += sum(i in tokenizer.byte_ids for i in ids)
        unknown += ids.count(unk)
    if not units or not tokens:
        raise UserError(f"{language}: the text holds no words for {tokenizer.name}; leave this language out")
    return {"fertility": tokens / units, "bytes_per_token": size / tokens, "byte_share": byte_tokens / tokens,
            "unk_share": unknown / tokens}  # fmt: skip


def unreachable(tokenizer: Tokenizer) -> list[str]:
    """The pieces that no text encodes to.

    Each is tried inside text, between two characters that are in no piece and so merge with nothing. That decides it for a
    BPE model: where a text's encoding holds a piece, only merges within the piece led to it, in an order that their scores
    give, and whatever stands around it the same merges happen again. So other neighbours, or another word start, could not
    bring out a piece that does not come out here.
    """
    pieces = list(tokenizer.scores())
    used = set("".join(pieces))
    stranger = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in used)  # private use
    encoded = tokenizer.encode_batch([f"{stranger}{piece.replace(WORD_START, ' ')}{stranger}" for piece in pieces])
    return [piece for piece, ids in zip(pieces, encoded) if tokenizer.processor.piece_to_id(piece) not in ids]


def compare(base: Tokenizer, new: Tokenizer, documents: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """`{"languages": {lang: {"base": F, "new": F}}, "macro": {"base": F, "new": F}, "pieces": {...}}`, F as in `measure`.

    macro gives every language the same weight; of its fertility one is over the languages with spaces, one over the others,
    since the two have different units. pieces: `base`, `new` and `added` count them, `unreachable_base` those of the base
    that no text encodes to, `unreachable_new` the same in the new model, `unreachable_added` those of them that were added.
    """
    if new.pieces[: len(base)] != base.pieces:
        raise UserError(f"{new.name}: does not begin with the pieces of {base.name}; expected its extension")
    bar = tqdm(documents.items(), desc="encoding", unit="language", leave=False, disable=None)
    languages = {
        language: {"base": measure(base, language, texts), "new": measure(new, language, texts)} for language, texts in bar
    }
    lost, known = unreachable(new), set(base.pieces)
    pieces = {
        "base": len(base), "new": len(new), "added": len(new) - len(base), "unreachable_base": len(unreachable(base)),
        "unreachable_new": len(lost), "unreachable_added": sum(piece not in known for piece in lost),
    }  # fmt: skip
    return {"languages": languages, "macro": {side: macro(languages, side) for side in ("base", "new")}, "pieces": pieces}


def macro(languages: dict[str, dict], side: str) -> dict[str, float]:
    def average(key: str, chosen: list[str]) -> float:
        return sum(languages[language][side][key] for language in chosen) / len(chosen)

    figures = {key: average(key, list(languages)) for key in ("bytes_per_token", "byte_share", "unk_share")}
    for unit, chosen in by_unit(languages).items():
        figures["fertility" if unit == "word" else "fertility_characters"] = average("fertility", chosen)
    return figures


def by_unit(languages: Iterable[str]) -> dict[str, list[str]]:
    """The unit of fertility, "word" or "character" -> the languages that have it, where there are any."""
    units: dict[str, list[str]] = {"word": [], "character": []}
    for language in languages:
        units["character" if language[4:] in UNSPACED else "word"].append(language)
    return {unit: chosen for unit, chosen in units.items() if chosen}


def print_report(report: dict[str, Any]) -> None:
    """A table of languages, those that gain most first, and a summary in two lines."""
    sides = report["languages"]

    def change(language: str) -> float:
        return sides[language]["new"]["fertility"] / sides[language]["base"]["fertility"] - 1

    def row(name: str, base: dict, new: dict, key: str) -> list[str]:
        shares = [f"{side[share]:.1%}" for share in ("byte_share", "unk_share") for side in (base, new)]
        return [name, f"{base[key]:.2f}", f"{new[key]:.2f}", f"{new[key] / base[key] - 1:+.1%}",
                f"{base['bytes_per_token']:.2f}", f"{new['bytes_per_token']:.2f}", *shares]  # fmt: skip

    languages = sorted(sides, key=change)
    rows = [row(name, sides[name]["base"], sides[name]["new"], "fertility") for name in languages]
    last = []
    base, new = report["macro"]["base"], report["macro"]["new"]
    if "fertility" in base:
        last.append(row("macro-average", base, new, "fertility"))
    if "fertility_characters" in base:
        last.append([*row("macro-average*", base, new, "fertility_characters")[:4], *[""] * 6])
    print_table(("language", "fertility", "extended", "change", "bytes/token", "extended", "byte tokens", "extended",
                 "<unk>", "extended"), rows, last)  # fmt: skip
    unspaced = by_unit(languages).get("character")
    print("fertility: tokens per word" + (f"; tokens per character (*) in {', '.join(unspaced)}" if unspaced else ""))
    pieces = report["pieces"]
    print(f"{pieces['base']:,} pieces -> {pieces['new']:,}; no text encodes to {pieces['unreachable_added']:,} of the "
          f"{pieces['added']:,} added, nor to {pieces['unreachable_new'] - pieces['unreachable_added']:,} of the base's "
          f"({pieces['unreachable_base']:,} before)")  # fmt: skip
