"""The experiment of docs/results.md: its arms are understood, it goes on after an interruption, its tables say
what was measured."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from benchmarks import adaptation
from benchmarks.adaptation import read_arms
from benchmarks.adaptation_report import fill_docs, report
from mala.cli import UserError, parse
from train import Settings

ARMS = ROOT / "benchmarks/adaptation.toml"
TINY = """
[all]
lr = 1e-3
[scale.tiny]
languages = ["swh_Latn", "amh_Ethi"]
train_documents = 8
test_documents = 2
questions = 2
written = 2
device = "cpu"
dtype = "float32"
settings = { steps = 200, extend_vocab = 20, seq_len = 16, batch_size = 1, eval_every = 100, eval_documents = 2, save_every = 1000 }
[arm.base]
what = "as it is"
scales = ["tiny"]
few_shot = true
speed = true
[arm.extended]
what = "extended"
scales = ["tiny"]
few_shot = true
speed = true
settings = { replay = true, replay_share = 0.2 }
"""


@pytest.mark.parametrize("scale", ["cores", "gpu"])
def test_every_arm_is_a_run_of_train(scale):
    chosen, arms = read_arms(ARMS, scale)
    assert arms[0].name == "base" and arms[0].settings is None
    for number, arm in enumerate(arms):
        if arm.steps_of:  # it has run before
            assert arm.steps_of in [earlier.name for earlier in arms[:number]]
            reference = next(one for one in arms if one.name == arm.steps_of)
            assert {*arm.seeds.get(scale, [0])} <= {*reference.seeds.get(scale, [0])}
        settings = dict(arm.settings or {})
        if settings.pop("replay", False):
            settings["replay"] = "replay"
        flags = [
            f"--{key.replace('_', '-')}={','.join(v) if isinstance(v, list) else v}"
            for key, v in settings.items()
        ]
        parse(Settings, "", flags)
    if scale == "cores":
        assert 4 <= len(chosen["languages"]) <= 6 and len({one[4:] for one in chosen["languages"]}) >= 3


def test_a_wrong_table_of_arms_is_named(tmp_path):
    with pytest.raises(UserError, match="has no scale 'night', expected one of cores, gpu"):
        read_arms(ARMS, "night")
    (tmp_path / "arms.toml").write_text(TINY.replace("few_shot", "few_shots"))
    with pytest.raises(UserError, match="arms.toml: an arm has a key that is not known.*few_shots"):
        read_arms(tmp_path / "arms.toml", "tiny")


def write_data(folder):
    """The demo's sentences, laid out as the experiment's data are."""
    for language in ("swh_Latn", "amh_Ethi", "eng_Latn"):
        rows = (
            (ROOT / f"assets/demo/sib200/{language}/train.tsv").read_text(encoding="utf-8").splitlines()[1:]
        )
        for name in ("bible", "udhr"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = "\n".join(row.split("\t")[2] for row in rows[:12])
            (folder / name / f"{language}.txt").write_text(text, encoding="utf-8")
    for bench in ("sib200", "taxi1500"):
        shutil.copytree(ROOT / "assets/demo" / bench, folder / bench)


def test_an_interrupted_experiment_goes_on(tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    (tmp_path / "arms.toml").write_text(TINY)
    (tmp_path / "docs").mkdir()
    places = "".join(
        f"<!-- adaptation: {name} -->\nold\n<!-- end -->\nprose\n"
        for name in ("arms", "languages", "extension", "few-shot")
    )
    (tmp_path / "docs/results.md").write_text(places)
    tiny = str(ROOT / "assets/tiny-llama")
    command = [sys.executable, str(ROOT / "benchmarks/adaptation.py"), "--model", tiny, "--twin", tiny]
    command += [
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
        "--docs",
        str(tmp_path / "docs"),
    ]
    command += ["--arms", str(tmp_path / "arms.toml"), "--scale", "tiny"]
    run = tmp_path / "out/runs/extended-0"

    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run / "train/metrics.jsonl").exists() or not (run / "train/metrics.jsonl").stat().st_size:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 130 and "Traceback" not in first.stderr.read()
    [kept] = (run / "train/checkpoints").iterdir()  # train.py was told, too
    base = (tmp_path / "out/runs/base/arm.json").read_bytes()

    monkeypatch.setattr(sys, "argv", command[1:])
    adaptation.main()
    assert f"going on after step {kept.name.split('-')[1]} of 200" in (run / "train.log").read_text()
    assert (tmp_path / "out/runs/base/arm.json").read_bytes() == base  # not measured again

    figures = json.loads((tmp_path / "out/adaptation.json").read_text())["arms"]
    before, after = (figures[key]["bible"] for key in ("base", "extended-0"))
    assert all(after[one]["bits_per_byte"] < before[one]["bits_per_byte"] for one in ("swh_Latn", "amh_Ethi"))
    assert after["swh_Latn"]["tokens_per_word"] < before["swh_Latn"]["tokens_per_word"]
    [_, end] = figures["extended-0"]["curve"]  # all verses are measured on the way, so the end is the result
    mean = sum(one["bits_per_byte"] for one in after.values()) / 2
    assert end[0] == 200 * 16 and end[1] == pytest.approx(mean, rel=1e-3)
    trained_on = (tmp_path / "out/text/corpus/swh_Latn/train.txt").read_text().splitlines()
    measured = (tmp_path / "out/text/bible/swh_Latn.txt").read_text().splitlines()
    assert len(trained_on) == 8 and len(measured) == 2 and not {*trained_on} & {*measured}
    page = (tmp_path / "docs/results.md").read_text()
    assert "old" not in page and page.count("prose") == 4 and (tmp_path / "docs/adaptation.png").exists()
    assert f"| 3,200 | {mean:.3f} |" in page

    monkeypatch.setattr(sys, "argv", [*command[1:], "--model", str(tmp_path)])
    with pytest.raises(UserError, match="runs/base: holds a run of another command; name another --out"):
        adaptation.main()


def made_up(arm, bits, seed=0, **more):
    """A run with such bits per byte in Swahili, twice that in Amharic."""
    figures = {"bits_per_byte": bits, "bytes": 400, "tokens": 100, "tokens_per_word": 2.0}
    twice = {**figures, "bits_per_byte": 2 * bits}
    texts = {
        "bible": {"swh_Latn": figures, "amh_Ethi": twice},
        "declaration": {"swh_Latn": figures, "eng_Latn": figures},
    }
    return {"arm": arm, "what": "so", "seed": seed, "curve": [[0, bits], [9, bits]], **texts, **more}


def test_the_tables_say_what_was_measured(tmp_path):
    trained = {"tokens": 1000, "tokens_per_second": 50.0, "peak_memory_gb": 1.5, "minutes": 2.0}
    speed = {"bytes_read_per_second": 1000.0, "tokens_written_per_second": 10.0}
    accuracy = {"swh_Latn": {"accuracy": 0.25, "ci95": [0.125, 0.375]}}
    paired = {"a": 0.25, "b": 0.5, "difference": 0.25, "ci95": [-0.125, 0.5], "p": 0.125, "languages": 1}
    asked = {"sib200": accuracy, "taxi1500": accuracy}
    of_arm = {
        f"{bench}_{part}": {"swh_Latn": paired} if part == "change" else paired
        for bench in asked
        for part in ("change", "new")
    }
    arms = {
        "base": made_up("base", 2.0, **speed, **asked),
        "x-0": made_up("x", 1.0, **trained, **speed, **asked, **of_arm),
        "x-1": made_up("x", 2.0, seed=1, **trained, **speed, **asked, **of_arm),
    }
    tables = report({"arms": arms}, tmp_path / "curves.png")
    # Bible: the mean of 1 and 2, and of 2 and 4, is 1.5 and 3; over the seeds 2.25 ± √1.125 against 3.
    assert "| **x**: so | 1,000 | 2.250 ± 1.061 | −25.0% | 1.500 ± 0.707 | −25.0% |" in tables["arms"]
    assert tables["arms"].endswith("| 2 of 2 | 50 | 1.5 | 2.0 |")
    assert "| all in Ethi | 4.000 | 3.000 ± 1.414, −25.0% |" in tables["languages"]
    assert "| x | 2.00 | 4.00 | 1,000 | 40 | 2.0 | 2.250 ± 1.061 |" in tables["extension"]
    assert (
        "| sib200 | swh_Latn | 0.250 (0.125 to 0.375) | 0.500, +0.250 (−0.125 to +0.500), p 0.12 |"
        in tables["few-shot"]
    )
    (tmp_path / "results.md").write_text("# Results\n")
    with pytest.raises(
        UserError, match="results.md: has no place for the table; expected <!-- adaptation: arms -->"
    ):
        fill_docs(tmp_path, tables, tmp_path / "curves.png")
    assert (tmp_path / "results.md").read_text() == "# Results\n"
