"""Test mala.benchmarks.results and tools.comparison.

Intervals and significance tests are checked against their definitions, figures against plain counts.
"""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mala.benchmarks import results
from mala.cli import UserError
from tools import comparison, tables


def answer(lang, id, right, seed=1, label="b"):
    scores = {"aaaa": -8.0, "b": -3.0 if right == (label == "b") else -9.0, "c": -20.0}
    line = {"lang": lang, "id": id, "seed": seed, "label": label, "loglikelihoods": scores}
    return {**line, "prediction": results.best_label(line)}


def document(lang, id, nll, tokens=10, size=20):
    return {"lang": lang, "id": id, "nll": nll, "tokens": tokens, "bytes": size}


def test_the_interval_is_that_of_a_binomial_for_right_and_wrong():
    for n, right in ((204, 51), (111, 100), (30, 3)):
        low, high = results.bootstrap([1.0] * right + [0.0] * (n - right))
        rate = right / n
        chances = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
        exact = [
            next(k for k in range(n + 1) if sum(chances[: k + 1]) >= share) / n for share in (0.025, 0.975)
        ]
        assert [low, high] == pytest.approx(exact, abs=1.5 / n)
    assert results.bootstrap([0.5]) is None and results.bootstrap([0.3, 0.3]) == pytest.approx([0.3, 0.3])
    assert results.bootstrap([1.0, 0.0, 1.0]) == results.bootstrap([1.0, 0.0, 1.0])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = sum(
        low <= 100 <= high
        for low, high in (results.bootstrap(list(rng.gamma(4, 25, 60))) for _ in range(300))
    )
    assert 0.89 <= covered / 300 <= 0.98


@given(st.lists(st.integers(-3, 3), max_size=8))
def test_the_paired_test_counts_sign_patterns(differences):
    patterns = [[]]
    for d in differences:
        patterns = [pattern + [sign * d] for pattern in patterns for sign in (1, -1)]
    expected = Fraction(
        sum(abs(sum(pattern)) >= abs(sum(differences)) for pattern in patterns), len(patterns)
    )
    assert comparison.paired_p([d / 7 for d in differences]) == pytest.approx(float(expected), abs=0.03)


def test_the_paired_test_is_mcnemars_for_answers_and_flat_without_a_difference():
    for won, lost in ((20, 5), (30, 28), (60, 20), (16, 0)):
        n, k = won + lost, min(won, lost)
        exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
        assert comparison.paired_p([1.0] * won + [-1.0] * lost + [0.0] * 50) == pytest.approx(
            exact, abs=0.015
        )
    assert comparison.paired_p([]) == comparison.paired_p([0.0, 0.0]) == 1.0
    rng = np.random.default_rng(0)
    p = [comparison.paired_p(list(rng.normal(size=40))) for _ in range(200)]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.10 and 0.4 < np.mean(p) < 0.6


def test_figures_of_examples():
    lines = [answer("swh_Latn", str(i), right, seed, label) for seed in (1, 2) for i, (right, label) in
             enumerate([(True, "b"), (False, "b"), (seed == 1, "b"), (True, "aaaa")])]  # fmt: skip
    assert [line["prediction"] == line["label"] for line in lines] == [
        True,
        False,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    figures = results.summarise(lines)
    assert (
        figures["n"] == 4
        and figures["accuracy"] == 5 / 8
        and figures["accuracy_by_seed"] == {"1": 3 / 4, "2": 2 / 4}
    )
    # Per character "aaaa" scores -2 and "b" at best -3, so "aaaa" always wins.
    assert figures["accuracy_norm"] == 2 / 8
    assert figures["majority"] == 3 / 4 and figures["uniform"] == 1 / 3
    assert figures["ci95"] == results.bootstrap(
        [1.0, 0.0, 0.5, 1.0]
    )  # an example is one observation, not one per seed
    assert "accuracy_by_seed" not in results.summarise(lines[:4])
    tied = {"loglikelihoods": {"x": -1.0, "y": -1.0}}
    assert results.best_label(tied) == "x"  # the first one, as in numpy's argmax


def test_figures_of_documents():
    figures = results.summarise([document("swh_Latn", 0, 30.0), document("swh_Latn", 1, 50.0, 30, 60)])
    assert figures == {"documents": 2, "tokens": 40, "bytes": 80, "nll_per_document": 40.0, "nll_per_token": 2.0,
                       "bits_per_byte": pytest.approx(1 / math.log(2)), "ci95": results.bootstrap([30.0, 50.0])}  # fmt: skip


def test_every_language_has_the_same_weight_and_scripts_their_own_average(capsys):
    rights = {"swh_Latn": [1, 1, 1], "eng_Latn": [1], "amh_Ethi": [0, 0]}
    languages = {lang: results.summarise([answer(lang, str(i), bool(right)) for i, right in enumerate(of_language)])
                 for lang, of_language in rights.items()}  # fmt: skip
    result = results.with_macro(languages, "script")
    assert result["macro"]["accuracy"] == pytest.approx(2 / 3) and result["macro"][
        "uniform"
    ] == pytest.approx(1 / 3)
    assert result["macro"]["ci95"] == results.bootstrap([1.0, 1.0, 0.0])
    assert result["groups"]["Latn"]["accuracy"] == 1.0 and result["groups"]["Latn"]["languages"] == 2
    assert result["groups"]["Ethi"] == {"languages": 1, **results.macro({"amh_Ethi": languages["amh_Ethi"]})}
    tables.print_results(result)
    printed = capsys.readouterr().out.splitlines()
    first = [line.split()[0] for line in printed]
    assert first == [
        "language",
        "swh_Latn",
        "eng_Latn",
        "amh_Ethi",
        "Ethi,",
        "Latn,",
        "macro-average",
        "above",
    ]
    assert printed[-2].split()[1:3] == ["6", "0.667"] and printed[-1].endswith(
        "0 of 3 languages, 0 of them with the whole interval"
    )
    seeds = {
        lang: {**figures, "accuracy_by_seed": {"1": figures["accuracy"], "2": 0.0}}
        for lang, figures in languages.items()
    }
    macro = results.macro(seeds)
    assert macro["accuracy_by_seed"] == {"1": pytest.approx(2 / 3), "2": 0.0} and macro[
        "seed_sd"
    ] == pytest.approx(2 / 3 / 2**0.5)


def write_run(folder, bench, lines, **settings):
    folder.mkdir()
    by_language = {}
    for line in lines:
        by_language.setdefault(line["lang"], []).append(line)
    languages = {lang: results.summarise(of_language) for lang, of_language in by_language.items()}
    (folder / "results.json").write_text(
        json.dumps({"bench": bench, **settings, **results.with_macro(languages)})
    )
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_comparison_pairs_examples_and_counts_languages(tmp_path, capsys):
    a = [answer("swh_Latn", str(i), i < 10) for i in range(40)] + [
        answer("amh_Ethi", str(i), i < 9) for i in range(10)
    ]
    b = [answer("swh_Latn", str(i), i < 30) for i in range(45)] + [
        answer("amh_Ethi", str(i), i < 8) for i in range(10)
    ]
    b += [answer("eng_Latn", "0", True)]
    b.reverse()  # the order of lines does not matter
    runs = (
        write_run(tmp_path / "a", "sib200", a, model="A"),
        write_run(tmp_path / "b", "sib200", b, model="B"),
    )
    result = comparison.compare_runs(*runs, lambda found: found, "script")
    swahili = result["languages"]["swh_Latn"]
    assert (
        swahili["n"] == 40
        and swahili["a"] == 10 / 40
        and swahili["b"] == 30 / 40
        and swahili["difference"] == 0.5
    )
    assert swahili["p"] < 0.001 and 0.3 < swahili["ci95"][0] < 0.5 < swahili["ci95"][1] < 0.7
    assert result["languages"]["amh_Ethi"]["p"] == 1.0 and result["left_out"] == ["eng_Latn"]
    total = result["macro"]
    assert (total["won"], total["lost"], total["won_significantly"], total["lost_significantly"]) == (
        1,
        1,
        1,
        0,
    )
    assert total["difference"] == pytest.approx((0.5 - 0.1) / 2) and result["differing_settings"] == {
        "model": ["A", "B"]
    }
    assert result["groups"]["Ethi"]["lost"] == 1
    comparison.print_comparison(result)
    printed = capsys.readouterr().out
    assert (
        "model: A A, B B" in printed
        and "B is better in 1 languages and worse in 1 of 2" in printed
        and "<0.001" in printed
    )


def test_fewer_nats_are_better(tmp_path):
    runs = [write_run(tmp_path / name, "nll", [document("swh_Latn", i, 50.0 + i + more) for i in range(20)])
            for name, more in (("a", 0), ("b", -2))]  # fmt: skip
    total = comparison.compare_runs(*runs, lambda found: found)["macro"]
    assert (total["won"], total["lost"], total["difference"]) == (1, 0, pytest.approx(-2.0))


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    a = write_run(tmp_path / "a", "sib200", [answer("swh_Latn", "1", True)])
    nll = write_run(tmp_path / "nll", "nll", [document("swh_Latn", 0, 3.0)])
    other = write_run(tmp_path / "other", "sib200", [answer("amh_Ethi", "1", True)])
    with pytest.raises(UserError, match="results of nll, but those of .*a are of sib200"):
        comparison.compare_runs(a, nll, lambda found: found)
    with pytest.raises(UserError, match="no example is also in .*a;"):
        comparison.compare_runs(a, other, lambda found: found)
    longer = write_run(tmp_path / "longer", "nll", [document("swh_Latn", 0, 3.0, size=21)])
    with pytest.raises(UserError, match="no example is also in .*nll;"):  # not the same document
        comparison.compare_runs(nll, longer, lambda found: found)
    for line in (
        '{"lang": "swh_Latn"}',
        "[]",
        '{"lang": "swh_Latn", "id": 1, "nll": "x"}',
        '{"lang": "a", "id": 1, "nll": NaN}',
    ):
        (other / "predictions.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"predictions\.jsonl: line 1 is not a prediction"):
            comparison.compare_runs(a, other, lambda found: found)
    (other / "predictions.jsonl").unlink()
    with pytest.raises(UserError, match=r"predictions\.jsonl: there is no such file"):
        comparison.compare_runs(a, other, lambda found: found)


def test_lists_of_languages(tmp_path):
    file = tmp_path / "list.tsv"
    file.write_bytes("\ufefflanguage\tis_seen\r\nswh_Latn\t1\r\n\r\namh_Ethi\t0\r\n".encode())
    assert comparison.read_languages(file) == {"swh_Latn", "amh_Ethi"}
    file.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"list\.tsv: line 1 is not UTF-8"):
        comparison.read_languages(file)
