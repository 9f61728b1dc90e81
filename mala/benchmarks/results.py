"""What a careful reader wants beside a score: intervals, baselines, and averages over groups.

A *prediction* is one line of predictions.jsonl: `lang`, `id` and, of a document, `nll` (nats), `tokens` and
`bytes` (UTF-8); of an example `seed`, `shots`, `label`, `prediction` and `loglikelihoods` (label -> nats).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from statistics import fmean as mean
from typing import Any

import numpy as np

from mala.storage.corpus import script_of

RESAMPLES = 2000  # of a bootstrap
Prediction = dict[str, Any]
Figures = dict[str, Any]  # of a language, or averages over some
Languages = dict[str, Figures]


def bootstrap(values: list[float]) -> list[float] | None:
    """95 % interval of the mean by the percentile bootstrap (Efron & Tibshirani 1993); None for one value."""
    n, x, rng = len(values), np.asarray(values), np.random.default_rng(0)
    if n < 2:
        return None
    means = [x[rng.integers(n, size=(rows, n))].mean(1) for rows in row_blocks(RESAMPLES, n)]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def row_blocks(rows: int, columns: int) -> Iterator[int]:
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
    are the accuracies of always giving the most frequent label, or place of a choice, and of guessing."""
    ci95 = bootstrap(list(means_by("id", predictions).values()))  # an example counts once, whatever the seeds
    n = len(predictions)
    if "nll" in predictions[0]:
        nll, tokens, size = (sum(one[key] for one in predictions) for key in ("nll", "tokens", "bytes"))
        counts = {"documents": n, "tokens": tokens, "bytes": size}
        rates = {"nll_per_document": nll / n, "nll_per_token": nll / tokens}
        return {**counts, **rates, "bits_per_byte": nll / size / math.log(2), "ci95": ci95}
    by_seed = {str(seed): accuracy for seed, accuracy in means_by("seed", predictions).items()}
    places = [list(one["loglikelihoods"]).index(one["label"]) for one in predictions]
    figures = {
        "n": n // len(by_seed),
        "accuracy": mean([value_of(one) for one in predictions]),
        "accuracy_norm": mean([best_label(one, per_character=True) == one["label"] for one in predictions]),
        "ci95": ci95,
        "majority": max(Counter(places).values()) / n,
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
