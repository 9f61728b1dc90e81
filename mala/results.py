"""What a careful reader wants beside a score: intervals, baselines, averages over groups, and paired comparisons.

A *prediction* is one line of predictions.jsonl: `lang`, `id` and, of a document, `nll` (nats), `tokens` and `bytes` (UTF-8); of
an example `seed`, `shots`, `label`, `prediction` and `loglikelihoods` (label -> nats).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mala.checkpoint import read_json
from mala.cli import UserError, print_table
from mala.corpus import read_lines

RESAMPLES = 2000  # of a bootstrap
FLIPS = 9999  # of a paired test
Prediction = dict[str, Any]


def bootstrap(values: list[float]) -> list[float] | None:
    """95 % interval of the mean, by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13); None for a single value."""
    if len(values) < 2:
        return None
    rng, values = np.random.default_rng(0), np.asarray(values)
    means = [values[rng.integers(len(values), size=(rows, len(values)))].mean(1) for rows in _blocks(RESAMPLES, len(values))]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def paired_p(differences: list[float]) -> float:
    """Two-sided p of a paired test, whether the mean difference is 0: how often random signs give one as far from it.

    Fisher's randomisation test. Where all differences are of one size, as those of right and wrong answers are, it is McNemar's
    exact test and follows from binomials; elsewhere FLIPS random sign patterns stand for all.
    """
    d = np.asarray([difference for difference in differences if difference])
    n, fewer = len(d), min(np.count_nonzero(d > 0), np.count_nonzero(d < 0))
    if not n:
        return 1.0
    if np.ptp(np.abs(d)) == 0:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    rng, far = np.random.default_rng(0), abs(d.sum()) - 1e-9 * np.abs(d).sum()  # equal but for rounding counts as equal
    sums = [(2.0 * rng.integers(2, size=(rows, n)) - 1) @ d for rows in _blocks(FLIPS, n)]
    return float((1 + np.count_nonzero(np.abs(np.concatenate(sums)) >= far)) / (1 + FLIPS))


def _blocks(rows: int, columns: int) -> Iterator[int]:
    """`rows` in parts of about a million numbers, so that many columns need no more memory."""
    for start in range(0, rows, size := max(1, 2**20 // columns)):
        yield min(size, rows - start)


def best_label(prediction: Prediction, per_character: bool = False) -> str:
    """The label with the largest log-likelihood, the first of equals; or the largest per character of the label."""
    scores = prediction["loglikelihoods"]
    return max(scores, key=lambda label: scores[label] / (len(label) if per_character else 1))


def value_of(prediction: Prediction) -> float:
    """What is averaged over a language and compared: whether the label is right, or the nats of a document."""
    return prediction["nll"] if "nll" in prediction else float(prediction["prediction"] == prediction["label"])


def values_by_id(predictions: list[Prediction]) -> dict[Any, float]:
    """id -> value, the mean over seeds: one example is one observation, however often it was asked for."""
    values = defaultdict(list)
    for prediction in predictions:
        values[prediction["id"]].append(value_of(prediction))
    return {id: sum(of_id) / len(of_id) for id, of_id in values.items()}


def summarise(predictions: list[Prediction]) -> dict[str, Any]:
    """One language's figures, `ci95` over its documents or examples.

    Of documents: `documents`, `tokens`, `bytes`, `nll_per_document` and `nll_per_token` (nats), `bits_per_byte`. Of examples:
    `n`, `accuracy`, `accuracy_norm`, and the accuracies of always giving the label that is the most frequent among them
    (`majority`) and of guessing (`uniform`); of several seeds `accuracy_by_seed`, too.
    """
    ci95 = bootstrap(list(values_by_id(predictions).values()))
    n = len(predictions)
    if "nll" in predictions[0]:
        nll, tokens, size = (sum(prediction[key] for prediction in predictions) for key in ("nll", "tokens", "bytes"))
        return {"documents": n, "tokens": tokens, "bytes": size, "nll_per_document": nll / n, "nll_per_token": nll / tokens,
                "bits_per_byte": nll / size / math.log(2), "ci95": ci95}  # fmt: skip
    by_seed = defaultdict(list)
    for prediction in predictions:
        by_seed[str(prediction["seed"])].append(value_of(prediction))
    figures = {
        "n": n // len(by_seed),
        "accuracy": sum(map(value_of, predictions)) / n,
        "accuracy_norm": sum(best_label(prediction, per_character=True) == prediction["label"] for prediction in predictions)
        / n,
        "ci95": ci95,
        "majority": Counter(prediction["label"] for prediction in predictions).most_common(1)[0][1] / n,
        "uniform": 1 / len(predictions[0]["loglikelihoods"]),
    }
    if len(by_seed) > 1:
        figures["accuracy_by_seed"] = {seed: sum(values) / len(values) for seed, values in by_seed.items()}
    return figures


def macro(languages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean over languages, each of the same weight, of what is no count; `ci95` over languages, of accuracy or of nats a
    document.

    `seed_sd` is the standard deviation of the mean accuracy over seeds, which choose the shots.
    """
    first = next(iter(languages.values()))
    keys = [key for key in first if isinstance(first[key], float)]
    result = {key: sum(figures[key] for figures in languages.values()) / len(languages) for key in keys}
    result["ci95"] = bootstrap(
        [figures["accuracy" if "accuracy" in first else "nll_per_document"] for figures in languages.values()]
    )
    if "accuracy_by_seed" in first:
        by_seed = {seed: sum(figures["accuracy_by_seed"][seed] for figures in languages.values()) / len(languages)
                   for seed in first["accuracy_by_seed"]}  # fmt: skip
        result |= {"accuracy_by_seed": by_seed, "seed_sd": float(np.std(list(by_seed.values()), ddof=1))}
    return result


def with_macro(languages: dict[str, dict[str, Any]], group_by: str | None = None) -> dict[str, Any]:
    """`{"languages": ..., "macro": ...}`, and where they are grouped by script `"groups"`: script -> macro-average."""
    result = {"languages": languages, "macro": macro(languages)}
    if group_by == "script":
        result["groups"] = {script: {"languages": len(members), **macro(members)} for script, members in by_script(languages)}
    return result


def by_script(languages: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """(script, those of the languages that are written in it), in order of script."""
    members = defaultdict(dict)
    for language, figures in languages.items():
        members[language[4:]][language] = figures
    return sorted(members.items())


def read_languages(file: Path) -> set[str]:
    """The first column of a list of languages (a header and further columns do not matter)."""
    listed = {line.split("\t")[0].strip() for _, line in read_lines(file)} - {"", "language"}
    if not listed:
        raise UserError(f"{file}: no languages; expected one a line, such as swh_Latn")
    return listed


def print_results(result: dict[str, Any]) -> None:
    """A table of languages, best first, of groups and the macro-average; how many beat the baseline, and what seeds change."""
    of_nll = "nll_per_document" in result["macro"]
    if of_nll:
        header = ("language", "documents", "NLL/document", "95% interval", "NLL/token", "bits/byte")

        def row(name: str, figures: dict[str, Any], count: int) -> tuple[str, ...]:
            return (name, f"{count:,}", f"{figures['nll_per_document']:.2f}", interval(figures["ci95"], 1),
                    f"{figures['nll_per_token']:.2f}", f"{figures['bits_per_byte']:.2f}")  # fmt: skip
    else:
        header = ("language", "examples", "accuracy", "95% interval", "per character", "majority", "uniform")

        def row(name: str, figures: dict[str, Any], count: int) -> tuple[str, ...]:
            return (name, f"{count:,}", f"{figures['accuracy']:.3f}", interval(figures["ci95"], 3),
                    f"{figures['accuracy_norm']:.3f}", f"{figures['majority']:.3f}", f"{figures['uniform']:.3f}")  # fmt: skip

    languages, count = result["languages"], "documents" if of_nll else "n"
    main = "nll_per_document" if of_nll else "accuracy"
    best_first = sorted(languages, key=lambda language: languages[language][main] * (1 if of_nll else -1))
    rows = [row(language, languages[language], languages[language][count]) for language in best_first]
    last = [(f"{script}, {len(members)} languages", result["groups"][script], members)
            for script, members in by_script(languages) if "groups" in result]  # fmt: skip
    last.append(("macro-average", result["macro"], languages))
    print_table(header, rows, [row(name, figures, sum(member[count] for member in members.values()))
                               for name, figures, members in last])  # fmt: skip
    if not of_nll:
        above = [figures for figures in languages.values() if figures["accuracy"] > figures["majority"]]
        surely = sum(figures["ci95"] is not None and figures["ci95"][0] > figures["majority"] for figures in above)
        print(f"above the majority class: {len(above)} of {len(languages)} languages, with their whole interval {surely}")
    if "seed_sd" in result["macro"]:
        by_seed = ", ".join(f"{seed}: {value:.3f}" for seed, value in result["macro"]["accuracy_by_seed"].items())
        print(f"macro-average by seed: {by_seed} (standard deviation {result['macro']['seed_sd']:.3f})")


def interval(ci95: list[float] | None, digits: int) -> str:
    return "" if ci95 is None else f"{ci95[0]:.{digits}f} to {ci95[1]:.{digits}f}"


def read_run(file: Path) -> tuple[dict[str, Any], dict[str, dict[tuple, float]]]:
    """A results.json, or the folder that holds it, and of the predictions.jsonl beside it language -> example -> value. An
    example is told by its id and its label, a document by its number and its bytes: others are not taken for it."""
    file = file / "results.json" if file.is_dir() else file
    result = read_json(file, "a results.json of evaluate.py")
    if not isinstance(result.get("languages"), dict) or "bench" not in result:
        raise UserError(f"{file}: no 'languages' or no 'bench'; expected a results.json of evaluate.py")
    predictions, source = defaultdict(list), file.with_name("predictions.jsonl")
    number = 0
    try:
        for number, line in read_lines(source):  # noqa: B007
            prediction = json.loads(line)
            prediction["id"] = (str(prediction["id"]), prediction.get("bytes"), prediction.get("label"))
            if not math.isfinite(value_of(prediction)):
                raise ValueError
            predictions[str(prediction["lang"])].append(prediction)
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such file; examples are compared one by one, copy it there, too") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{source}: line {number} is no prediction of evaluate.py; run the evaluation again") from None
    return result, {language: values_by_id(of_language) for language, of_language in predictions.items()}


def compare(a: Path, b: Path, chosen: Callable[[list[str]], list[str]], group_by: str | None = None) -> dict[str, Any]:
    """What changes from run a to run b, example by example: per language `n`, `a`, `b`, `difference` (b - a), its `ci95`, `p`.

    Only examples that both runs hold are compared. `macro` is over languages: the mean difference, with `ci95` and `p` of the
    languages' differences, and how many languages b has `won` and `lost`, in all and with p < 0.05. chosen: narrows languages.
    """
    (of_a, in_a), (of_b, in_b) = read_run(a), read_run(b)
    if of_a["bench"] != of_b["bench"]:
        raise UserError(
            f"{b}: results of {of_b['bench']}, but those of {a} are of {of_a['bench']}; only one benchmark can be compared"
        )
    languages = {}
    for language in chosen(sorted(in_a.keys() & in_b.keys())):
        ids = [id for id in in_a[language] if id in in_b[language]]
        if ids:
            values = [[run[language][id] for id in ids] for run in (in_a, in_b)]
            languages[language] = {"n": len(ids), **_difference(*values)}
    if not languages:
        raise UserError(f"{b}: no example is in {a}, too; expected two runs on the same data")
    better = -1 if of_a["bench"] == "nll" else 1  # of fewer nats, or of more right answers

    def total(members: dict[str, dict[str, Any]]) -> dict[str, Any]:
        result = {"languages": len(members), **_difference(*([figures[side] for figures in members.values()] for side in "ab"))}
        for name, sign in (("won", better), ("lost", -better)):
            gains = [figures for figures in members.values() if figures["difference"] * sign > 0]
            result |= {name: len(gains), f"{name}_significantly": sum(figures["p"] < 0.05 for figures in gains)}
        return result

    result = {"bench": of_a["bench"], "a": str(a), "b": str(b), "languages": languages, "macro": total(languages),
              "baselines": {key: of_a["macro"][key] for key in ("majority", "uniform") if key in of_a.get("macro", {})},
              "differing_settings": {key: [of_a.get(key), of_b.get(key)] for key in
                                     ("data", "model", "adapter", "protocol", "shots", "seeds", "split", "limit", "dtype")
                                     if of_a.get(key) != of_b.get(key)},
              "left_out": sorted((in_a.keys() | in_b.keys()) - languages.keys())}  # fmt: skip
    if group_by == "script":
        result["groups"] = {script: total(members) for script, members in by_script(languages)}
    return result


def _difference(a: list[float], b: list[float]) -> dict[str, Any]:
    differences = [y - x for x, y in zip(a, b)]
    return {"a": sum(a) / len(a), "b": sum(b) / len(b), "difference": sum(differences) / len(differences),
            "ci95": bootstrap(differences), "p": paired_p(differences)}  # fmt: skip


def print_comparison(result: dict[str, Any]) -> None:
    digits = 2 if result["bench"] == "nll" else 3

    def row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
        p = "<0.001" if figures["p"] < 0.001 else f"{figures['p']:.3f}"
        return (name, f"{figures.get('n', '')}", f"{figures['a']:.{digits}f}", f"{figures['b']:.{digits}f}",
                f"{figures['difference']:+.{digits}f}", interval(figures["ci95"], digits), p)  # fmt: skip

    languages, total = result["languages"], result["macro"]
    rows = [row(name, languages[name]) for name in sorted(languages, key=lambda name: languages[name]["difference"])]
    last = [row(f"{script}, {group['languages']} languages", group) for script, group in result.get("groups", {}).items()] + [
        row("macro-average", total)
    ]
    print_table(("language", "n", "A", "B", "B - A", "95% interval", "p"), rows, last)
    if result["baselines"]:
        print(
            "macro-averages of {majority:.3f} for the majority class and {uniform:.3f} for guessing".format(
                **result["baselines"]
            )
        )
    for key, (a, b) in result["differing_settings"].items():
        print(f"{key}: A {a}, B {b}")
    if result["left_out"]:
        print(f"not in both, or not asked for: {len(result['left_out'])} languages")
    what = "nats a document, fewer are better" if result["bench"] == "nll" else "accuracy"
    print(f"{what}: B is better in {total['won']} languages and worse in {total['lost']} of {len(languages)}; with p < 0.05 "
          f"(paired; {0.05 * len(languages):.1f} expected by chance) better in {total['won_significantly']}, worse in "
          f"{total['lost_significantly']}")  # fmt: skip
