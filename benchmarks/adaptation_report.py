"""The tables and the picture that benchmarks/adaptation.py makes from adaptation.json."""

import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.corpus import script_of
from mala.storage.files import atomic_file, atomic_path
from tools.pictures import is_available, picture

ENGLISH = "eng_Latn"
GOAL = 0.206  # by how much MaLA-500 lowered the NLL on Glot500-c test, 190.6 -> 151.3
TABLES = ("arms", "languages", "extension", "few-shot")
Run = dict[str, Any]  # the figures of one run
Runs = list[Run]  # the runs of an arm, one per seed


def report(figures: dict[str, Any], curves: Path) -> dict[str, str]:
    """Return name -> table in Markdown, and draw the picture `curves`."""
    arms = defaultdict(list)
    for run in figures["arms"].values():
        arms[run["arm"]].append(run)
    main = {name: runs for name, runs in arms.items() if "tokens_written_per_second" in runs[0]}
    asked = {name: runs for name, runs in arms.items() if "taxi1500" in runs[0]}
    made = (arms_table(arms), languages_table(main), extension_table(main), few_shot_table(asked))
    draw_curves(arms, curves)
    return dict(zip(TABLES, made))


def without_english(languages: Iterable[str]) -> list[str]:
    return [language for language in languages if language != ENGLISH]


def bits(run: Run, text: str) -> float:
    """Return the bits per byte of a text, the mean over the adapted languages."""
    return mean_bits(run, text, without_english(run[text]))


def mean_bits(run: Run, text: str, languages: Iterable[str]) -> float:
    """Return the bits per byte of a text, the mean over `languages`."""
    return statistics.mean(run[text][language]["bits_per_byte"] for language in languages)


def over(runs: Runs, value: Callable[[Run], float], form: str) -> str:
    """Format the mean over the seeds, with the standard deviation if there are several."""
    values = [value(run) for run in runs]
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def change(runs: Runs, base: Run, value: Callable[[Run], float]) -> str:
    """Format the change of the mean over the seeds from the base, in percent."""
    return f"{statistics.mean(map(value, runs)) / value(base) - 1:+.1%}".replace("-", "−")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def arms_table(arms: dict[str, Runs]) -> str:
    """Make the table with a row per arm. Changes are from the base with the arm's own tokenizer."""
    rows, values = [], [lambda run: bits(run, "bible"), lambda run: bits(run, "declaration")]
    values.append(lambda run: run["declaration"][ENGLISH]["bits_per_byte"])
    for name, runs in arms.items():
        row, trained = [f"**{name}**: {runs[0]['what']}"], "tokens" in runs[0]
        [base] = arms["base-twin" if runs[0]["base"] == "twin" and "base-twin" in arms else "base"]
        row += [f"{runs[0]['new_tokens']:,}", f"{runs[0]['tokens']:,}"] if trained else ["", ""]
        for value in values:
            row += [over(runs, value, ".3f"), change(runs, base, value) if trained else ""]
        falls = [
            1
            - statistics.mean(run["bible"][language]["bits_per_byte"] for run in runs)
            / figures["bits_per_byte"]
            for language, figures in base["bible"].items()
        ]
        row += [f"{sum(fall >= GOAL for fall in falls)} of {len(falls)}" if trained else ""]
        for key, form in (("tokens_per_second", ",.0f"), ("peak_memory_gb", ".1f"), ("minutes", ".1f")):
            row += [f"{statistics.mean(run[key] for run in runs):{form}}" if trained else ""]
        rows.append(row)
    sizes = (len(arms["base"][0]["bible"]), len(without_english(arms["base"][0]["declaration"])))
    header = ["arm", "new tokens", "tokens read", f"Bible ({sizes[0]})", "", f"Declaration ({sizes[1]})", ""]
    return markdown([*header, "English", "", "fall ≥ 20.6 %", "tokens/s", "GB", "minutes of steps"], rows)


def languages_table(arms: dict[str, Runs]) -> str:
    """Make the table of the Bible's bits per byte: a row per language, then one per script of several."""
    [base] = arms["base"]
    groups = {language: [language] for language in base["bible"]}
    for script in sorted({*map(script_of, base["bible"])}):
        members = [language for language in base["bible"] if script_of(language) == script]
        groups |= {f"mean of {len(members)} in {script}": members} if len(members) > 1 else {}
    rows = []
    for group, members in groups.items():
        value = partial(mean_bits, text="bible", languages=members)
        row = [group, f"{value(base):.3f}"]
        for name, runs in arms.items():
            row += [f"{over(runs, value, '.3f')}, {change(runs, base, value)}"] if name != "base" else []
        rows.append(row)
    return markdown(["", *arms], rows)


def extension_table(arms: dict[str, Runs]) -> str:
    """Make the table of what a vocabulary changes, by an arm's first seed: text length, speed, quality."""
    rows = []
    for name, [run, *_] in arms.items():
        languages = run["bible"].values()
        bytes_a_token = sum(one["bytes"] for one in languages) / sum(one["tokens"] for one in languages)
        row = [
            name,
            f"{statistics.mean(one['tokens_per_word'] for one in languages):.2f}",
            f"{bytes_a_token:.2f}",
        ]
        row += [
            f"{run['bytes_read_per_second']:,.0f}",
            f"{run['tokens_written_per_second'] * bytes_a_token:,.0f}",
        ]
        row += [
            f"{run['tokens']:,}" if "tokens" in run else "",
            f"{run['minutes']:.1f}" if "minutes" in run else "",
        ]
        rows.append([*row, f"{bits(run, 'bible'):.3f}"])
    header = [
        "arm",
        "tokens per word",
        "bytes per token",
        "bytes/s read",
        "bytes/s written",
        "tokens trained on",
    ]
    return markdown([*header, "minutes of steps", "bits per byte, Bible"], rows)


def few_shot_table(arms: dict[str, Runs]) -> str:
    """Make the table of accuracies. The base's have 95 % intervals; an arm's have the difference from the
    base, its interval, and p of the paired test. A mean has no interval, because the languages are few."""

    def against(paired: dict[str, Any]) -> str:
        text = f"{paired['b']:.3f}, {paired['difference']:+.3f}"
        if "n" in paired:
            low, high = paired["ci95"]
            p = f"p {paired['p']:.2f}" if paired["p"] >= 0.005 else "p < 0.01"
            text += f" ({low:+.3f} to {high:+.3f}), {p}"
        return text.replace("-", "−")

    [base], rows = arms["base"], []
    adapted = [runs[0] for name, runs in arms.items() if name != "base"]
    for bench in ("sib200", "taxi1500"):
        for language, one in base[bench].items():
            low, high = one["ci95"]
            row = [
                bench,
                language,
                f"{one['majority']:.3f}",
                f"{one['accuracy']:.3f} ({low:.3f} to {high:.3f})",
            ]
            rows.append([*row, *(against(run[f"{bench}_change"][language]) for run in adapted)])
        means = [run[f"{bench}_new"] for run in adapted]
        if means and means[0]["languages"] > 1:
            majority = statistics.mean(
                base[bench][language]["majority"] for language in without_english(base[bench])
            )
            row = [
                bench,
                f"mean of {means[0]['languages']} languages",
                f"{majority:.3f}",
                f"{means[0]['a']:.3f}",
            ]
            rows.append([*row, *map(against, means)])
    return markdown(["", "", "majority class", *arms], rows)


def draw_curves(arms: dict[str, Runs], path: Path) -> None:
    """Draw bits per byte over tokens read, for an arm's first seed. Arms without new tokens are dashed."""
    with picture(path, figsize=(10, 6)) as axis:
        for name, [run, *_] in arms.items():
            if "tokens" not in run:
                axis.axhline(run["curve"][0][1], color="black", linestyle=":", linewidth=1)
                axis.text(0, run["curve"][0][1], name, fontsize=8, va="bottom")
                continue
            style = "-" if run["new_tokens"] else "--"
            axis.plot(*zip(*run["curve"]), style, marker=".", linewidth=1.2, label=name)
        axis.set_xlabel("tokens read (dashed: without new tokens)")
        axis.set_ylabel("bits per byte of held-out verses")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def find_place(page: Path, text: str, name: str) -> re.Match:
    """Find the place of a table in a page. Raises UserError if there is none."""
    if found := re.search(rf"(?<=<!-- adaptation: {name} -->\n).*?(?=<!-- end -->)", text, re.DOTALL):
        return found
    raise UserError(
        f"{page}: has no place for a table; expected <!-- adaptation: {name} --> and <!-- end -->"
    )


def check_docs(docs: Path) -> None:
    """Raise UserError if `fill_docs` would fail."""
    page = docs / "results.md"
    if not page.exists():
        raise UserError(f"{page}: there is no such file; --docs needs the folder of results.md")
    for name in TABLES:
        find_place(page, page.read_text(encoding="utf-8"), name)
    if not is_available():
        raise UserError("--docs needs matplotlib for the picture; install it with `pip install matplotlib`")


def fill_docs(docs: Path, tables: dict[str, str], curves: Path) -> None:
    """Put each table between its two comments in results.md, and copy the picture to adaptation.png."""
    page = docs / "results.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        place = find_place(page, text, name)
        text = f"{text[: place.start()]}\n{table}\n\n{text[place.end() :]}"
    with atomic_file(page) as file:
        file.write(text)
    with atomic_path(docs / "adaptation.png") as temporary:
        shutil.copyfile(curves, temporary)
