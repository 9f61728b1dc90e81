"""Compute figures from predictions: scores, confidence intervals, baselines, and averages over languages.

A *prediction* is a line of predictions.jsonl: `lang`, `id`, and for a document `nll` (nats), `tokens` and
`bytes` (UTF-8), for an example `seed`, `shots`, `label`, `prediction`, `loglikelihoods` (label -> nats).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from statistics import fmean as mean
from typing import Any

import numpy as np

from mala.storage.corpus import script_of

RESAMPLES = 2000  # per bootstrap
Prediction = dict[str, Any]
Figures = dict[str, Any]  # name -> figure, of a language or a macro-average
Languages = dict[str, Figures]


def bootstrap(values: list[float]) -> list[float] | None:
    """Return the mean's 95 % percentile bootstrap interval (Efron & Tibshirani 1993); None for one value."""
    n, x, rng = len(values), np.asarray(values), np.random.default_rng(0)
    if n < 2:
        return None
    means = [x[rng.integers(n, size=(rows, n))].mean(1) for rows in row_blocks(RESAMPLES, n)]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def row_blocks(rows: int, columns: int) -> Iterator[int]:
    """Yield parts of `rows` that hold about a million numbers each, to limit memory if `columns` is large."""
    for start in range(0, rows, size := max(1, 2**20 // columns)):
        yield min(size, rows - start)


def best_label(prediction: Prediction, per_character: bool = False) -> str:
    """Return the label with the largest log-likelihood, total or per character; of equals, the first."""
    scores = prediction["loglikelihoods"]
    return max(scores, key=lambda label: scores[label] / (len(label) if per_character else 1))


def value_of(prediction: Prediction) -> float:
    """Return the value to average and compare: a document's NLL, or 1 if an example is right, else 0."""
    is_document = "nll" in prediction
    return prediction["nll"] if is_document else float(prediction["prediction"] == prediction["label"])


def means_by(key: str, predictions: list[Prediction]) -> dict[Any, float]:
    """Return the mean value of the predictions for each `id` or each `seed`."""
    values = defaultdict(list)
    for one in predictions:
        values[one[key]].append(value_of(one))
    return {of: mean(of_one) for of, of_one in values.items()}


def summarise(predictions: list[Prediction]) -> Figures:
    """Return one language's figures. NLL is in nats, `ci95` is over documents or examples. `majority` is the
    accuracy of always choosing the label's most frequent position, `uniform` that of guessing."""
    ci95 = bootstrap(list(means_by("id", predictions).values()))  # an example counts once, not per seed
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
    """Return the macro-average: the mean of every figure over languages, except counts. `ci95` is over
    languages, `seed_sd` is the standard deviation over seeds (choices of shots) of the mean accuracy."""
    members = list(languages.values())
    first, main = members[0], "accuracy" if "accuracy" in members[0] else "nll_per_document"
    result = {key: mean([one[key] for one in members]) for key in first if isinstance(first[key], float)}
    result["ci95"] = bootstrap([one[main] for one in members])
    if seeds := first.get("accuracy_by_seed"):
        by_seed = {seed: mean([one["accuracy_by_seed"][seed] for one in members]) for seed in seeds}
        result |= {"accuracy_by_seed": by_seed, "seed_sd": float(np.std(list(by_seed.values()), ddof=1))}
    return result


def with_macro(languages: Languages, group_by: str | None = None, average: Callable = macro) -> dict:
    """Return `{"languages": ..., "macro": ...}`. If grouped by script, add `"groups"`: script -> average."""
    result = {"languages": languages, "macro": average(languages)}
    if group_by == "script":
        groups = by_script(languages)
        result["groups"] = {name: {"languages": len(group), **average(group)} for name, group in groups}
    return result


def by_script(languages: Languages) -> list[tuple[str, Languages]]:
    """Return (script, the languages written in it), sorted by script."""
    members = defaultdict(dict)
    for language, figures in languages.items():
        members[script_of(language)][language] = figures
    return sorted(members.items())
