"""What an extended tokenizer brings, language by language: `python -m mala.vocab report`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mala.checkpoint import atomic_path
from mala.cli import UserError, print_table
from mala.tokenizer import WORD_START, Tokenizer

# Scripts whose words no space divides (ISO 15924): their unit of fertility is the character (code point).
UNSPACED = set("Bali Hani Hans Hant Hira Java Jpan Kana Khmr Lana Laoo Mymr Thai Tibt Yiii".split())
WORD = re.compile(r"[^\s፡]+")  # between spaces or Ethiopic wordspaces
MAX_ROWS = 40  # of languages in a printed table


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
    shown = languages if len(languages) <= MAX_ROWS else languages[: MAX_ROWS // 2] + languages[-MAX_ROWS // 2 :]
    rows = [row(name, sides[name]["base"], sides[name]["new"], "fertility") for name in shown]
    base, new = report["macro"]["base"], report["macro"]["new"]
    if "fertility" in base:
        rows.append(row("macro-average", base, new, "fertility"))
    if "fertility_characters" in base:
        rows.append([*row("macro-average*", base, new, "fertility_characters")[:4], *[""] * 6])
    print_table(("language", "fertility", "extended", "change", "bytes/token", "extended", "byte tokens", "extended",
                 "<unk>", "extended"), rows)  # fmt: skip
    if len(shown) < len(languages):
        print(f"(the {MAX_ROWS // 2} languages with the largest and the smallest gain of {len(languages)}; all with --json)")
    unspaced = by_unit(languages).get("character")
    print("fertility: tokens per word" + (f"; tokens per character (*) in {', '.join(unspaced)}" if unspaced else ""))
    pieces = report["pieces"]
    print(f"{pieces['base']:,} pieces -> {pieces['new']:,}; no text encodes to {pieces['unreachable_added']:,} of the "
          f"{pieces['added']:,} added, nor to {pieces['unreachable_new'] - pieces['unreachable_added']:,} of the base's "
          f"({pieces['unreachable_base']:,} before)")  # fmt: skip


def draw(report: dict[str, Any], path: Path) -> None:
    """A picture of fertility before and after: languages sorted, scripts coloured; one panel for each unit of fertility."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("--plot takes matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # to a file: no window
    import matplotlib.pyplot as plt

    sides = report["languages"]
    by_size = Counter(language[4:] for language in sides).most_common()
    palette = [color for i, color in enumerate(plt.get_cmap("tab10").colors) if i != 7]  # without its grey, for the others
    colors = dict(zip([script for script, _ in by_size], palette))
    panels = list(by_unit(sides).items())
    # About 0.13 inch a language while there are few, so that their names can be read.
    widths = [max(1.6, min(len(chosen) * 0.13, 10)) for _, chosen in panels]
    figure, axes = plt.subplots(1, len(panels), figsize=(sum(widths) + 1.5, 4.5), width_ratios=widths, squeeze=False)
    for axis, (unit, chosen) in zip(axes[0], panels):
        chosen.sort(key=lambda language: sides[language]["base"]["fertility"])
        for x, language in enumerate(chosen):
            before, after = (sides[language][side]["fertility"] for side in ("base", "new"))
            color = colors.get(language[4:], "tab:gray")
            axis.plot([x, x], [before, after], color=color, linewidth=1, alpha=0.5)
            axis.plot(x, before, "o", color=color, markerfacecolor="white", markersize=4)
            axis.plot(x, after, "o", color=color, markersize=4)
        axis.set_yscale("log")
        values = [side["fertility"] for language in chosen for side in sides[language].values()]
        lowest, highest = min(values), max(values)
        axis.set_yticks([tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if lowest / 2 < tick < 2 * highest])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(axis="y", alpha=0.3)
        axis.set_ylabel(f"tokens per {unit}")
        axis.set_xlim(-1, len(chosen))
        every = len(chosen) <= 120
        axis.set_xticks(range(len(chosen)) if every else [], chosen if every else [], rotation=90, fontsize=7)
        axis.set_xlabel("" if every else f"{len(chosen)} languages, by fertility before")
    marks = [plt.Line2D([], [], linestyle="", marker="o", color=color, label=script) for script, color in colors.items()]
    if len(by_size) > len(colors):
        marks.append(plt.Line2D([], [], linestyle="", marker="o", color="tab:gray", label="other"))
    for label, face in (("before", "white"), ("after", "black")):
        marks.append(plt.Line2D([], [], linestyle="", marker="o", color="black", markerfacecolor=face, label=label))
    axes[0][0].legend(handles=marks, fontsize=7, ncol=2, loc="upper left")
    pieces = report["pieces"]
    figure.suptitle(f"Fertility before and after: {pieces['base']:,} pieces and {pieces['new']:,}", fontsize=10)
    figure.tight_layout()
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")
    except (ValueError, RuntimeError) as error:  # a format that matplotlib does not know, or takes another program for
        raise UserError(f"{path}: {error}") from None
    finally:
        plt.close(figure)
