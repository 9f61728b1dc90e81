"""Print the tables of the commands. Most of them have one line per language."""

from collections.abc import Collection, Sequence, Sized
from typing import Any

from mala.benchmarks.results import Figures, Languages, by_script, macro

Row = Sequence[str]
MAX_ROWS = 40  # a longer table is printed without its middle


def print_table(header: Row, rows: Sequence[Row], last: Sequence[Row] = ()) -> None:
    """Print columns, the first aligned left and the others right. Cut out the middle of very many `rows`."""
    if len(rows) > MAX_ROWS:
        hidden = [f"… {len(rows) - MAX_ROWS} more …", *[""] * (len(header) - 1)]
        rows = [*rows[: MAX_ROWS // 2], hidden, *rows[-MAX_ROWS // 2 :]]
    table = [header, *rows, *last]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print("  ".join(cells))


def print_nll(before: dict[str, Any], after: dict[str, Any], known: Collection[str] = ()) -> None:
    """Print a table of languages, best first, with the base's `known` languages at the end. Print a summary
    line for all languages, and if some are known and some new, also one for each kind."""
    changes = {
        language: after["languages"][language]["nll_per_document"] / was["nll_per_document"] - 1
        for language, was in before["languages"].items()
    }
    rows = {}
    for language in sorted(changes, key=changes.get):
        was, now = before["languages"][language], after["languages"][language]
        nll = [f"{figures['nll_per_document']:.1f}" for figures in (was, now)]
        bits = [f"{figures['bits_per_byte']:.2f}" for figures in (was, now)]
        rows[language] = (language, str(was["documents"]), *nll, f"{changes[language]:+.1%}", *bits)
    new, old = ([one for one in rows if (one in known) == is_known] for is_known in (False, True))
    header = ("language", "documents", "NLL before", "after", "change", "bits/byte before", "after")
    print_table(header, [rows[one] for one in new], [rows[one] for one in old])
    for members, kind in ((new, " new to the base"), (old, " of the base"), ([*new, *old], "")):
        if kind and not (new and old):
            continue  # one group is all languages
        b, a = (macro({one: of["languages"][one] for one in members}) for of in (before, after))
        change = a["nll_per_document"] / b["nll_per_document"] - 1
        languages = counted(members, "language")
        print(
            f"held-out NLL, nats per document, mean of {languages}{kind}: {b['nll_per_document']:.1f} -> "
            f"{a['nll_per_document']:.1f} ({change:+.1%}), bits per byte {b['bits_per_byte']:.2f} -> "
            f"{a['bits_per_byte']:.2f}; improved: {sum(changes[one] < 0 for one in members)} of "
            f"{len(members)}"
        )


def print_results(result: dict[str, Any]) -> None:
    """Print a table, best languages first, how many beat the baseline, and how much the seed changes."""
    languages, total = result["languages"], result["macro"]
    if "nll_per_document" in total:
        columns = dict(OF_DOCUMENTS)
        if to := result.get("parallel_to"):
            columns[f"bits/byte of {to}"] = ("bits_per_parallel_byte", ".2f")
        tabulate(result, columns, "nll_per_document")
    else:
        tabulate(result, OF_EXAMPLES, "accuracy", descending=True)
        above = [one for one in languages.values() if one["accuracy"] > one["majority"]]
        surely = sum(one["ci95"] is not None and one["ci95"][0] > one["majority"] for one in above)
        count = f"{len(above)} of {len(languages)} languages, {surely} of them with the whole interval"
        print(f"above the majority class: {count}")
    if "seed_sd" in total:
        by_seed = ", ".join(f"{seed}: {value:.3f}" for seed, value in total["accuracy_by_seed"].items())
        print(f"macro-average by seed: {by_seed} (standard deviation {total['seed_sd']:.3f})")


Columns = dict[str, tuple[str, str]]  # title -> key of a figure, and its format
OF_DOCUMENTS: Columns = {
    "documents": ("documents", ","),
    "NLL/document": ("nll_per_document", ".2f"),
    "95% interval": ("ci95", ".1f"),
    "NLL/token": ("nll_per_token", ".2f"),
    "bits/byte": ("bits_per_byte", ".2f"),
}
OF_EXAMPLES: Columns = {
    "examples": ("n", ","),
    "accuracy": ("accuracy", ".3f"),
    "95% interval": ("ci95", ".3f"),
    "per character": ("accuracy_norm", ".3f"),
    "majority": ("majority", ".3f"),
    "uniform": ("uniform", ".3f"),
}


def counted(things: Sized, noun: str) -> str:
    """Return "1 language", "2 languages"."""
    return f"{len(things):,} {noun}{'s' * (len(things) != 1)}"


def tabulate(result: dict[str, Any], columns: Columns, key: str, descending: bool = False) -> None:
    """Print a table of languages in the order of the figure `key`, then groups and the macro-average. In the
    columns of counts, groups and the average show the sum over their languages."""

    def row(name: str, figures: Figures, members: Languages) -> list[str]:
        cells = [name]
        for figure, form in columns.values():
            value = figures[figure] if figure in figures else sum(one[figure] for one in members.values())
            if isinstance(value, list):
                cells.append(f"{value[0]:{form}} to {value[1]:{form}}")
            elif value is None:
                cells.append("")  # one value alone has no interval
            else:
                cells.append("<0.001" if figure == "p" and value < 0.001 else f"{value:{form}}")
        return cells

    languages = result["languages"]
    in_order = sorted(languages, key=lambda language: languages[language][key], reverse=descending)
    rows = [row(language, languages[language], {}) for language in in_order]
    of_groups = result.get("groups", {})
    groups = by_script(languages) if of_groups else []
    last = [row(f"{name}, {counted(group, 'language')}", of_groups[name], group) for name, group in groups]
    print_table(("language", *columns), rows, [*last, row("macro-average", result["macro"], languages)])
