"""Compare two evaluations example by example: `python evaluate.py --compare A B`."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mala.benchmarks.results import bootstrap, mean, means_by, row_blocks, value_of, with_macro
from mala.cli import UserError
from mala.storage.corpus_formats import read_lines
from mala.storage.files import read_json, write_json
from tools.tables import counted, tabulate

SETTINGS = "data model adapter protocol shots seeds split limit dtype".split()  # reported if they differ
FLIPS = 9999  # random sign patterns in a paired test


def compare(files: tuple[str, ...], chosen: Callable, group_by: str | None, out: str | None) -> None:
    """Print what changed between two runs, see `compare_runs`. Write it to compare.json in folder `out`."""
    result = compare_runs(*map(Path, files), chosen, group_by)
    print_comparison(result)
    if out:
        write_json(Path(out) / "compare.json", result)


def read_run(file: Path) -> tuple[dict[str, Any], dict[str, dict[tuple, float]]]:
    """Read a run, given as results.json or its folder: the results, and language -> example -> value from
    predictions.jsonl. The key of an example is its id and label, that of a document its number and bytes."""
    file = file / "results.json" if file.is_dir() else file
    result = read_json(file, "a results.json of evaluate.py")
    if not isinstance(result.get("languages"), dict) or "bench" not in result:
        raise UserError(f"{file}: no 'languages' or no 'bench'; expected a results.json of evaluate.py")
    predictions, source = defaultdict(list), file.with_name("predictions.jsonl")
    try:
        for number, line in read_lines(source):  # noqa: B007
            one = json.loads(line)
            one["id"] = (str(one["id"]), one.get("bytes"), one.get("label"))
            if not math.isfinite(value_of(one)):
                raise ValueError
            predictions[str(one["lang"])].append(one)
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such file; it belongs next to results.json") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{source}: line {number} is not a prediction of evaluate.py; run it again") from None
    return result, {language: means_by("id", of_language) for language, of_language in predictions.items()}


def compare_runs(a: Path, b: Path, chosen: Callable, group_by: str | None = None) -> dict[str, Any]:
    """Return what changes from run a to run b, by language and as macro-average, on the examples in both.

    - `difference` (b - a), with its `ci95` and `p`.
    - In the macro-average also: the number of languages that b `won` and `lost`, in all and with p < 0.05.
    - chosen: a function that narrows a list of languages.

    Raises UserError if the runs are of two benchmarks or have no example in common.
    """
    (of_a, in_a), (of_b, in_b) = read_run(a), read_run(b)
    bench = of_a["bench"]
    if of_b["bench"] != bench:
        wrong = f"results of {of_b['bench']}, but those of {a} are of {bench}"
        raise UserError(f"{b}: {wrong}; expected two runs of one benchmark")
    languages = {}
    for language in chosen(sorted(in_a.keys() & in_b.keys())):
        if ids := [id for id in in_a[language] if id in in_b[language]]:
            values = ([run[language][id] for id in ids] for run in (in_a, in_b))
            languages[language] = {"n": len(ids), **_difference(*values)}
    if not languages:
        raise UserError(f"{b}: no example is also in {a}; expected two runs on the same data")

    better = -1 if bench == "nll" else 1  # fewer nats, or more right answers
    result = with_macro(languages, group_by, lambda members: _total(members, better))
    result |= {"bench": bench, "a": str(a), "b": str(b)}
    total, pairs = of_a.get("macro", {}), {key: [of_a.get(key), of_b.get(key)] for key in SETTINGS}
    result["baselines"] = {key: total[key] for key in ("majority", "uniform") if key in total}
    result["differing_settings"] = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    result["left_out"] = sorted((in_a.keys() | in_b.keys()) - languages.keys())
    return result


def paired_p(differences: list[float]) -> float:
    """Return the two-sided p of Fisher's randomisation test on paired differences.

    This is how often random signs give a mean difference at least as far from 0 as the real one. If all
    differences have the same size, as for right and wrong answers, this is McNemar's exact test, computed
    with binomial coefficients. Otherwise FLIPS random sign patterns estimate it.
    """
    d = np.asarray([difference for difference in differences if difference])
    n, fewer = len(d), min(np.count_nonzero(d > 0), np.count_nonzero(d < 0))
    if not n:
        return 1.0
    if np.ptp(np.abs(d)) == 0:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    rng = np.random.default_rng(0)
    far = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # allows for rounding
    sums = [(2.0 * rng.integers(2, size=(rows, n)) - 1) @ d for rows in row_blocks(FLIPS, n)]
    return float((1 + np.count_nonzero(np.abs(np.concatenate(sums)) >= far)) / (1 + FLIPS))


def _total(members: dict[str, dict], better: int) -> dict[str, Any]:
    """Return the comparison over some languages. better: 1 if larger values are better, else -1."""
    sides = ([one[side] for one in members.values()] for side in "ab")
    result = {"languages": len(members), **_difference(*sides)}
    for name, sign in (("won", better), ("lost", -better)):
        p = [one["p"] for one in members.values() if one["difference"] * sign > 0]
        significant = sum(value is not None and value < 0.05 for value in p)
        result |= {name: len(p), f"{name}_significantly": significant}
    return result


def _difference(a: list[float], b: list[float]) -> dict[str, Any]:
    d = [y - x for x, y in zip(a, b)]
    p = paired_p(d) if len(d) > 1 else None  # a single pair cannot be tested
    return {"a": mean(a), "b": mean(b), "difference": mean(d), "ci95": bootstrap(d), "p": p}


def print_comparison(result: dict[str, Any]) -> None:
    """Print a table of languages, smallest difference first, and the settings in which the runs differ."""
    is_nll, total = result["bench"] == "nll", result["macro"]
    form, count = ".2f" if is_nll else ".3f", total["languages"]
    columns = {"n": ("n", ""), "A": ("a", form), "B": ("b", form), "B - A": ("difference", "+" + form)}
    tabulate(result, {**columns, "95% interval": ("ci95", form), "p": ("p", ".3f")}, "difference")
    if result["baselines"]:
        text = "baselines, macro-averages: majority class {majority:.3f}, uniform guess {uniform:.3f}"
        print(text.format(**result["baselines"]))
    for key, (a, b) in result["differing_settings"].items():
        print(f"{key}: A {a}, B {b}")
    if result["left_out"]:
        left_out = counted(result["left_out"], "language")
        print(f"left out, because not in both runs or not asked for: {left_out}")
    what = "nats per document, fewer are better" if is_nll else "accuracy"
    surely = f"better in {total['won_significantly']}, worse in {total['lost_significantly']}"
    surely = f"with p < 0.05 (paired; {0.05 * count:.1f} expected by chance) {surely}"
    found = f"B is better in {total['won']} languages and worse in {total['lost']} of {count}"
    print(f"{what}: {found}; {surely}")


def read_languages(file: Path) -> set[str]:
    """Read the first column of a list of languages. A header and further columns are ignored."""
    listed = {line.split("\t")[0].strip() for _, line in read_lines(file)} - {"", "language"}
    if not listed:
        raise UserError(f"{file}: no languages; expected one per line, such as swh_Latn")
    return listed
