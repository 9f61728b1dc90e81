"""What a careful reader wants beside a score: intervals, baselines, and averages over groups.

A *prediction* is one line of predictions.jsonl: `lang`, `id` and, of a document, `nll` (nats), `tokens` and
`bytes` (UTF-8); of an example `seed`, `shots`, `label`, `prediction` and `loglikelihoods` (label -> nats).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mala.cli import UserError, print_table
from mala.storage.corpus import read_lines, script_of

RESAMPLES = 2000  # of a bootstrap
FLIPS = 9999  # of a paired test
Prediction = dict[str, Any]
Figures = dict[str, Any]  # of a language, or averages over some
Languages = dict[str, Figures]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def bootstrap(values: list[float]) -> list[float] | None:
    """95 % interval of the mean by the percentile bootstrap (Efron & Tibshirani 1993); None for one value."""
    n, x, rng = len(values), np.asarray(values), np.random.default_rng(0)
    if n < 2:
        return None
    means = [x[rng.integers(n, size=(rows, n))].mean(1) for rows in _blocks(RESAMPLES, n)]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def paired_p(differences: list[float]) -> float:
    """Two-sided p of a paired test: how often random signs give a mean difference as far from 0 as this one.
    Fisher's randomisation test. If all differences are of one size, as those of right and wrong answers are,
    it is McNemar's exact test and follows from binomials; else FLIPS random sign patterns stand for all."""
    d = np.asarray([difference for difference in differences if difference])
    n, fewer = len(d), min(np.count_nonzero(d > 0), np.count_nonzero(d < 0))
    if not n:
        return 1.0
    if np.ptp(np.abs(d)) == 0:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    rng = np.random.default_rng(0)
    far = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # equal but for rounding counts as equal
    sums = [(2.0 * rng.integers(2, size=(rows, n)) - 1) @ d for rows in _blocks(FLIPS, n)]
    return float((1 + np.count_nonzero(np.abs(np.concatenate(sums)) >= far)) / (1 + FLIPS))


def _blocks(rows: int, columns: int) -> Iterator[int]:
    """`rows` in parts of about a million numbers, so that many columns need no more memory."""
    for start in range(0, rows, size := max(1, 2**20 // columns)):
        yield min(size, rows - start)


def best_label(prediction: Prediction, per_character: bool = False) -> str:
    """The label with the largest log-likelihood, in all or per character, the first of equals."""
    scores = prediction["loglikelihoods"]
    return max(scores, key=lambda label: scores[label] / (len(label) if per_character else 1))


def value_of(prediction: Prediction) -> float:
    """What is averaged and compared: the nats of a document, or whether an example's label is right."""
    is_document = "nll" in prediction
    return prediction["nll"] if is_document else float(prediction["prediction"] == prediction["label"])


def means_by(key: str, predictions: list[Prediction]) -> dict[Any, float]:
    """The mean value of the predictions with each `id`, or each `seed`."""
    values = defaultdict(list)
    for one in predictions:
        values[one[key]].append(value_of(one))
    return {of: mean(of_one) for of, of_one in values.items()}


def summarise(predictions: list[Prediction]) -> Figures:
    """One language's figures, NLL in nats, `ci95` over its documents or examples. `majority` and `uniform`
    are the accuracies of always giving the most frequent label, and of guessing."""
    ci95 = bootstrap(list(means_by("id", predictions).values()))  # an example counts once, whatever the seeds
    n = len(predictions)
    if "nll" in predictions[0]:
        nll, tokens, size = (sum(one[key] for one in predictions) for key in ("nll", "tokens", "bytes"))
        counts = {"documents": n, "tokens": tokens, "bytes": size}
        rates = {"nll_per_document": nll / n, "nll_per_token": nll / tokens}
        return {**counts, **rates, "bits_per_byte": nll / size / math.log(2), "ci95": ci95}
    by_seed = {str(seed): accuracy for seed, accuracy in means_by("seed", predictions).items()}
    figures = {
        "n": n // len(by_seed),
        "accuracy": mean([value_of(one) for one in predictions]),
        "accuracy_norm": mean([best_label(one, per_character=True) == one["label"] for one in predictions]),
        "ci95": ci95,
        "majority": max(Counter(one["label"] for one in predictions).values()) / n,
        "uniform": 1 / len(predictions[0]["loglikelihoods"]),
    }
    if len(by_seed) > 1:
        figures["accuracy_by_seed"] = by_seed
    return figures


def macro(languages: Languages) -> Figures:
    """The mean over languages, all of the same weight, of each figure that is no count; `ci95` is over them.
    `seed_sd` is the standard deviation of the mean accuracy over the seeds, which choose the shots."""
    members = list(languages.values())
    first, main = members[0], "accuracy" if "accuracy" in members[0] else "nll_per_document"
    result = {key: mean([one[key] for one in members]) for key in first if isinstance(first[key], float)}
    result["ci95"] = bootstrap([one[main] for one in members])
    if seeds := first.get("accuracy_by_seed"):
        by_seed = {seed: mean([one["accuracy_by_seed"][seed] for one in members]) for seed in seeds}
        result |= {"accuracy_by_seed": by_seed, "seed_sd": float(np.std(list(by_seed.values()), ddof=1))}
    return result


def with_macro(languages: Languages, group_by: str | None = None, average: Callable = macro) -> dict:
    """`{"languages": ..., "macro": ...}`, and, if grouped by script, `"groups"`: script -> macro-average."""
    result = {"languages": languages, "macro": average(languages)}
    if group_by == "script":
        groups = by_script(languages)
        result["groups"] = {name: {"languages": len(group), **average(group)} for name, group in groups}
    return result


def by_script(languages: Languages) -> list[tuple[str, Languages]]:
    """(script, those of the languages that are written in it), in order of script."""
    members = defaultdict(dict)
    for language, figures in languages.items():
        members[script_of(language)][language] = figures
    return sorted(members.items())


def read_languages(file: Path) -> set[str]:
    """The first column of a list of languages (a header and further columns do not matter)."""
    listed = {line.split("\t")[0].strip() for _, line in read_lines(file)} - {"", "language"}
    if not listed:
        raise UserError(f"{file}: no languages; expected one a line, such as swh_Latn")
    return listed


def print_results(result: dict[str, Any]) -> None:
    """The table, best languages first; how many of them are above the baseline; what seeds change."""
    languages, total = result["languages"], result["macro"]
    if "nll_per_document" in total:
        tabulate(result, OF_DOCUMENTS, "nll_per_document")
    else:
        tabulate(result, OF_EXAMPLES, "accuracy", descending=True)
        above = [one for one in languages.values() if one["accuracy"] > one["majority"]]
        surely = sum(one["ci95"] is not None and one["ci95"][0] > one["majority"] for one in above)
        count = f"{len(above)} of {len(languages)} languages, with their whole interval {surely}"
        print(f"above the majority class: {count}")
    if "seed_sd" in total:
        by_seed = ", ".join(f"{seed}: {value:.3f}" for seed, value in total["accuracy_by_seed"].items())
        print(f"macro-average by seed: {by_seed} (standard deviation {total['seed_sd']:.3f})")


Columns = dict[str, tuple[str, str]]  # title -> a figure and its format
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


def tabulate(result: dict[str, Any], columns: Columns, key: str, descending: bool = False) -> None:
    """A table of languages in order of the figure `key`, then of groups and the macro-average. An average has
    no counts of its own: it shows the sums of its languages' counts."""

    def row(name: str, figures: Figures, members: Languages) -> list[str]:
        cells = [name]
        for figure, form in columns.values():
            value = figures[figure] if figure in figures else sum(one[figure] for one in members.values())
            if isinstance(value, list):
                cells.append(f"{value[0]:{form}} to {value[1]:{form}}")
            elif value is None:
                cells.append("")  # a single value has no interval
            else:
                cells.append("<0.001" if figure == "p" and value < 0.001 else f"{value:{form}}")
        return cells

    languages = result["languages"]
    in_order = sorted(languages, key=lambda language: languages[language][key], reverse=descending)
    rows = [row(language, languages[language], {}) for language in in_order]
    groups = by_script(languages) if "groups" in result else []
    last = [row(f"{name}, {len(group)} languages", result["groups"][name], group) for name, group in groups]
    print_table(("language", *columns), rows, [*last, row("macro-average", result["macro"], languages)])
