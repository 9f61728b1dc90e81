"""What changed between two evaluations: `python evaluate.py --compare A B`, example by example."""

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
from tools.tables import tabulate

SETTINGS = "data model adapter protocol shots seeds split limit dtype".split()  # that two runs may differ in
FLIPS = 9999  # of a paired test


def compare(files: tuple[str, ...], chosen: Callable, group_by: str | None, out: str | None) -> None:
    """Print what changed between two runs, see `compare_runs`; leave it in compare.json of a folder `out`."""
    result = compare_runs(*map(Path, files), chosen, group_by)
    print_comparison(result)
    if out:
        write_json(Path(out) / "compare.json", result)


def read_run(file: Path) -> tuple[dict[str, Any], dict[str, dict[tuple, float]]]:
    """A results.json, given as file or folder, and of the predictions beside it language -> example -> value.
    An example is told by its id and label, a document by its number and bytes."""
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
        raise UserError(f"{source}: there is no such file; it belongs beside results.json") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{source}: line {number} is no prediction of evaluate.py; run it again") from None
    return result, {language: means_by("id", of_language) for language, of_language in predictions.items()}


def compare_runs(a: Path, b: Path, chosen: Callable, group_by: str | None = None) -> dict[str, Any]:
    """What changes from run a to b: `difference` (b - a) with its `ci95` and `p`, of each language over the
    examples that both hold, and of their macro-average, with how many languages b has `won` and `lost`, in
    all and with p < 0.05. chosen: narrows a list of languages. Raises UserError if none is in both."""
    (of_a, in_a), (of_b, in_b) = read_run(a), read_run(b)
    bench = of_a["bench"]
    if of_b["bench"] != bench:
        wrong = f"results of {of_b['bench']}, but those of {a} are of {bench}"
        raise UserError(f"{b}: {wrong}; only one benchmark can be compared")
    languages = {}
    for language in chosen(sorted(in_a.keys() & in_b.keys())):
        if ids := [id for id in in_a[language] if id in in_b[language]]:
            values = ([run[language][id] for id in ids] for run in (in_a, in_b))
            languages[language] = {"n": len(ids), **_difference(*values)}
    if not languages:
        raise UserError(f"{b}: no example is in {a}, too; expected two runs on the same data")

    better = -1 if bench == "nll" else 1  # of fewer nats, or of more right answers
    result = with_macro(languages, group_by, lambda members: _total(members, better))
    result |= {"bench": bench, "a": str(a), "b": str(b)}
    total, pairs = of_a.get("macro", {}), {key: [of_a.get(key), of_b.get(key)] for key in SETTINGS}
    result["baselines"] = {key: total[key] for key in ("majority", "uniform") if key in total}
    result["differing_settings"] = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    result["left_out"] = sorted((in_a.keys() | in_b.keys()) - languages.keys())
    return result


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
    sums = [(2.0 * rng.integers(2, size=(rows, n)) - 1) @ d for rows in row_blocks(FLIPS, n)]
    return float((1 + np.count_nonzero(np.abs(np.concatenate(sums)) >= far)) / (1 + FLIPS))


def _total(members: dict[str, dict], better: int) -> dict[str, Any]:
    """The comparison over some languages. better: 1 if a larger value is, else -1."""
    sides = ([one[side] for one in members.values()] for side in "ab")
    result = {"languages": len(members), **_difference(*sides)}
    for name, sign in (("won", better), ("lost", -better)):
        p = [one["p"] for one in members.values() if one["difference"] * sign > 0]
        result |= {name: len(p), f"{name}_significantly": sum(value < 0.05 for value in p)}
    return result


def _difference(a: list[float], b: list[float]) -> dict[str, Any]:
    d = [y - x for x, y in zip(a, b)]
    return {"a": mean(a), "b": mean(b), "difference": mean(d), "ci95": bootstrap(d), "p": paired_p(d)}


def print_comparison(result: dict[str, Any]) -> None:
    """A table of languages, the smallest difference first, and what differs between the runs' settings."""
    is_nll, total = result["bench"] == "nll", result["macro"]
    form, count = ".2f" if is_nll else ".3f", total["languages"]
    columns = {"n": ("n", ""), "A": ("a", form), "B": ("b", form), "B - A": ("difference", "+" + form)}
    tabulate(result, {**columns, "95% interval": ("ci95", form), "p": ("p", ".3f")}, "difference")
    if result["baselines"]:
        text = "macro-averages of {majority:.3f} for the majority class and {uniform:.3f} for guessing"
        print(text.format(**result["baselines"]))
    for key, (a, b) in result["differing_settings"].items():
        print(f"{key}: A {a}, B {b}")
    if result["left_out"]:
        print(f"not in both, or not asked for: {len(result['left_out'])} languages")
    what = "nats a document, fewer are better" if is_nll else "accuracy"
    surely = f"better in {total['won_significantly']}, worse in {total['lost_significantly']}"
    surely = f"with p < 0.05 (paired; {0.05 * count:.1f} expected by chance) {surely}"
    found = f"B is better in {total['won']} languages and worse in {total['lost']} of {count}"
    print(f"{what}: {found}; {surely}")


def read_languages(file: Path) -> set[str]:
    """The first column of a list of languages (a header and further columns do not matter)."""
    listed = {line.split("\t")[0].strip() for _, line in read_lines(file)} - {"", "language"}
    if not listed:
        raise UserError(f"{file}: no languages; expected one a line, such as swh_Latn")
    return listed
