"""The tables and the picture that benchmarks/adaptation.py makes of adaptation.json."""

import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.corpus import script_of
from mala.storage.files import atomic_file, atomic_path
from tools.pictures import picture

ENGLISH = "eng_Latn"
GOAL = 0.206  # MaLA-500's fall of the NLL on Glot500-c test, 190.6 -> 151.3
Runs = list[dict[str, Any]]  # of an arm, one for each seed


def report(figures: dict[str, Any], curves: Path) -> dict[str, str]:
    """name -> a table in Markdown. Draws `curves`."""
    arms = defaultdict(list)
    for run in figures["arms"].values():
        arms[run["arm"]].append(run)
    draw_curves(arms, curves)
    main = {name: runs for name, runs in arms.items() if "tokens_written_per_second" in runs[0]}
    tables = {
        "arms": arms_table(arms),
        "languages": languages_table(main),
        "extension": extension_table(main),
    }
    asked = {name: runs for name, runs in arms.items() if "taxi1500" in runs[0]}
    return tables | {"few-shot": few_shot_table(asked)}


def mean_bits(run: dict[str, Any], text: str, languages: Callable[[str], bool] = lambda _: True) -> float:
    """Bits per byte, mean over the languages that are adapted to, of those that `languages` allows."""
    chosen = [
        one["bits_per_byte"]
        for language, one in run[text].items()
        if language != ENGLISH and languages(language)
    ]
    return statistics.mean(chosen)


def over(runs: Runs, value: Callable[[dict], float], form: str) -> str:
    """The mean over the seeds and, of several, its standard deviation."""
    values = [value(run) for run in runs]
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def change(runs: Runs, base: dict[str, Any], value: Callable[[dict], float]) -> str:
    return f"{statistics.mean(map(value, runs)) / value(base) - 1:+.1%}".replace("-", "−")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def arms_table(arms: dict[str, Runs]) -> str:
    [base], rows = arms["base"], []
    in_english = lambda run: run["declaration"][ENGLISH]["bits_per_byte"]  # noqa: E731
    for name, runs in arms.items():
        row = [f"**{name}**: {runs[0]['what']}"]
        row += [f"{runs[0]['tokens']:,}" if "tokens" in runs[0] else ""]
        for value in (
            lambda run: mean_bits(run, "bible"),
            lambda run: mean_bits(run, "declaration"),
            in_english,
        ):
            row += [over(runs, value, ".3f"), change(runs, base, value) if runs[0] is not base else ""]
        falls = [
            1
            - statistics.mean(run["bible"][language]["bits_per_byte"] for run in runs)
            / figures["bits_per_byte"]
            for language, figures in base["bible"].items()
        ]
        trained = "tokens" in runs[0]
        row += [f"{sum(fall >= GOAL for fall in falls)} of {len(falls)}" if trained else ""]
        for key, form in (("tokens_per_second", ",.0f"), ("peak_memory_gb", ".1f"), ("minutes", ".1f")):
            row += [f"{statistics.mean(run[key] for run in runs):{form}}" if trained else ""]
        rows.append(row)
    header = ["arm", "tokens", "Bible", "", "Declaration", "", "English", "", "fall ≥ 20.6 %"]
    return markdown([*header, "tokens/s", "GB", "minutes"], rows)


def languages_table(arms: dict[str, Runs]) -> str:
    """Bits per byte of the Bible's verses, a row a language, then a row a script."""
    [base] = arms["base"]
    groups = {language: [language] for language in base["bible"]}
    for script in sorted({*map(script_of, base["bible"])}):
        groups[f"all in {script}"] = [language for language in base["bible"] if script_of(language) == script]
    rows = []
    for group, members in groups.items():
        value = lambda run: mean_bits(run, "bible", lambda language: language in members)  # noqa: B023, E731
        row = [group, f"{value(base):.3f}"]
        for name, runs in arms.items():
            row += [f"{over(runs, value, '.3f')}, {change(runs, base, value)}"] if name != "base" else []
        rows.append(row)
    return markdown(["", *arms], rows)


def extension_table(arms: dict[str, Runs]) -> str:
    """What a vocabulary costs and brings: length of text, speed, quality."""
    rows = []
    for name, runs in arms.items():
        of_languages = runs[0]["bible"].values()
        bytes_a_token = statistics.mean(one["bytes"] / one["tokens"] for one in of_languages)
        rows.append(
            [
                name,
                f"{statistics.mean(one['tokens_per_word'] for one in of_languages):.2f}",
                f"{bytes_a_token:.2f}",
                f"{runs[0]['bytes_read_per_second']:,.0f}",
                f"{runs[0]['tokens_written_per_second'] * bytes_a_token:,.0f}",
                f"{runs[0]['minutes']:.1f}" if "minutes" in runs[0] else "",
                over(runs, lambda run: mean_bits(run, "bible"), ".3f"),
            ]
        )
    header = [
        "arm",
        "tokens a word",
        "bytes a token",
        "bytes/s read",
        "bytes/s written",
        "minutes of training",
    ]
    return markdown([*header, "bits a byte, Bible"], rows)


def few_shot_table(arms: dict[str, Runs]) -> str:
    """Accuracies, that of the base with its 95 % interval, those of the arms with the difference to it, its
    interval, and p of the paired test."""

    def against(paired: dict[str, Any]) -> str:
        low, high = paired["ci95"] or (paired["difference"],) * 2  # of a single language there is none
        text = (
            f"{paired['b']:.3f}, {paired['difference']:+.3f} ({low:+.3f} to {high:+.3f}), p {paired['p']:.2f}"
        )
        return text.replace("-", "−")

    [base], rows = arms["base"], []
    adapted = [runs[0] for name, runs in arms.items() if name != "base"]
    for bench in ("sib200", "taxi1500"):
        for language, one in base[bench].items():
            low, high = one["ci95"]
            row = [bench, language, f"{one['accuracy']:.3f} ({low:.3f} to {high:.3f})"]
            rows.append([*row, *(against(run[f"{bench}_change"][language]) for run in adapted)])
        means = [run[f"{bench}_new"] for run in adapted]
        if means[0]["languages"] > 1:
            mean = f"mean of {means[0]['languages']} languages"
            rows.append([bench, mean, f"{means[0]['a']:.3f}", *map(against, means)])
    return markdown(["", "", *arms], rows)


def draw_curves(arms: dict[str, Runs], path: Path) -> None:
    """Held-out bits per byte over the tokens that an arm has read, the first seed of each."""
    with picture(path, figsize=(10, 6)) as axis:
        for name, [run, *_] in arms.items():
            if name == "base":
                axis.axhline(run["curve"][0][1], color="black", linestyle=":", label=name)
            elif len(run["curve"]) > 1:
                style = "--" if "extension" in name or "only" in name or "weights" in name else "-"
                axis.plot(*zip(*run["curve"]), style, marker=".", linewidth=1.2, label=name)
        axis.set_xlabel("tokens read")
        axis.set_ylabel("bits per byte, held-out verses")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def fill_docs(docs: Path, tables: dict[str, str], curves: Path) -> None:
    """Put each table between its two comments in results.md, and the picture beside it as adaptation.png."""
    page = docs / "results.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        place = re.compile(rf"(<!-- adaptation: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise UserError(
                f"{page}: has no place for the table; expected <!-- adaptation: {name} --> and <!-- end -->"
            )
        text = place.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)  # noqa: B023
    with atomic_file(page) as file:
        file.write(text)
    with atomic_path(docs / "adaptation.png") as temporary:
        shutil.copyfile(curves, temporary)
