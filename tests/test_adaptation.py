"""Tests of the experiment in docs/results.md: its table of arms is valid, it continues after an interruption,
and its tables show what was measured."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from benchmarks import adaptation
from benchmarks.adaptation import flags_of, read_arms
from benchmarks.adaptation_report import TABLES, check_docs, fill_docs, report
from mala.cli import UserError, parse
from mala.running.settings import Settings

ARMS = ROOT / "benchmarks/adaptation.toml"
TINY = """
[all]
lr = 1e-3
[scale.tiny]
languages = ["swh_Latn", "amh_Ethi"]
train_documents = 8
test_documents = 1
questions = 2
written = 2
device = "cpu"
dtype = "float32"
settings = { steps = 200, extend_vocab = 20, seq_len = 16, batch_size = 1, eval_every = 100, eval_documents = 1, save_every = 1000 }
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
    for arm in arms:
        if arm.steps_of:  # that arm has run with the same seed
            reference = next(one for one in arms if one.name == arm.steps_of)
            assert {*arm.seeds.get(scale, [0])} <= {*reference.seeds.get(scale, [0])}
        settings = {"replay": "replay"} | (arm.settings or {})
        if not settings.get("replay_share"):
            del settings["replay"]
        parse(Settings, "", flags_of(settings))
    if scale == "cores":
        assert 4 <= len(chosen["languages"]) <= 6 and len({one[4:] for one in chosen["languages"]}) >= 3


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("few_shot", "few_shots", "is not a table of scales and arms .*few_shots"),
        ("[scale.tiny]", "[scale", "is not a table of scales and arms"),
        ("[arm.extended]", '[arm.extended]\nsteps_of = "x"', "arm extended: no arm 'x' runs before it"),
        ("[arm.base]", "[arm.first]", "the first arm must be base"),
    ],
)
def test_a_wrong_table_of_arms_is_named(tmp_path, old, new, error):
    with pytest.raises(UserError, match="has no scale 'night', expected one of cores, gpu"):
        read_arms(ARMS, "night")
    (tmp_path / "arms.toml").write_text(TINY.replace(old, new))
    with pytest.raises(UserError, match=f"arms.toml: {error}"):
        read_arms(tmp_path / "arms.toml", "tiny")


def write_data(folder):
    """Write the demo's sentences in the layout of the experiment's data."""
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
    places = "".join(f"<!-- adaptation: {name} -->\nold\n<!-- end -->\nprose\n" for name in TABLES)
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
    metrics = run / "train/metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130 and "Traceback" not in first.stderr.read()
    [kept] = (run / "train/checkpoints").iterdir()  # train.py was stopped, too
    base = (tmp_path / "out/runs/base/arm.json").read_bytes()

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handler
    monkeypatch.setattr(sys, "argv", command[1:])
    adaptation.main()
    assert f"continuing after step {kept.name.split('-')[1]} of 200" in (run / "train.log").read_text()
    assert (tmp_path / "out/runs/base/arm.json").read_bytes() == base  # the base is not measured again

    figures = json.loads((tmp_path / "out/adaptation.json").read_text())["arms"]
    before, after = (figures[key]["bible"] for key in ("base", "extended-0"))
    assert all(after[one]["bits_per_byte"] < before[one]["bits_per_byte"] for one in ("swh_Latn", "amh_Ethi"))
    assert after["swh_Latn"]["tokens_per_word"] < before["swh_Latn"]["tokens_per_word"]
    nll = json.loads((run / "train/nll.json").read_text())["after"]["languages"]
    mean = sum(nll[one]["bits_per_byte"] for one in after) / 2
    [half, whole, end] = figures["extended-0"]["curve"]  # after 100 and 200 steps, and at the end
    assert [half[0], end[0]] == [100 * 16, 200 * 16] and whole == pytest.approx(end)
    assert end[1] == pytest.approx(mean, rel=1e-5) and half[1] > end[1]
    texts = {}
    for name in ("corpus/swh_Latn/train", "corpus/swh_Latn/test", "bible/swh_Latn"):
        texts[name] = (tmp_path / f"out/text/{name}.txt").read_text().splitlines()
    assert [len(text) for text in texts.values()] == [8, 1, 1] and len({*sum(texts.values(), [])}) == 10
    page = (tmp_path / "docs/results.md").read_text()
    assert "old" not in page and page.count("prose") == 4 and (tmp_path / "docs/adaptation.png").exists()
    mean = sum(one["bits_per_byte"] for one in after.values()) / 2
    assert f"| 20 | 3,200 | {mean:.3f} | −" in page

    (tmp_path / "arms.toml").write_text(TINY.replace("questions = 2", "questions = 3"))
    adaptation.main()  # what is asked has changed: the arms are measured again, but not trained
    assert json.loads((run / "arm.json").read_text())["asked"]["questions"] == 3
    monkeypatch.setattr(sys, "argv", [*command[1:], "--model", "assets/tiny-llama"])
    with pytest.raises(
        UserError, match="2 arms failed, the first: .*base/arm.json: was made by another command"
    ):
        adaptation.main()
    monkeypatch.setattr(sys, "argv", [*command[1:], "--out", str(tmp_path / "new"), "--scale", "night"])
    with pytest.raises(UserError, match="arms.toml: has no scale 'night', expected one of tiny"):
        adaptation.main()
    monkeypatch.setattr(sys, "argv", [*command[1:], "--out", str(tmp_path / "new")])
    shutil.rmtree(tmp_path / "data/taxi1500")
    with pytest.raises(UserError, match="data/taxi1500: there is no such folder; --data needs one with it"):
        adaptation.main()
    assert not (tmp_path / "new").exists()


def made_up(arm, bits, seed=None, **more):
    """Return a run with `bits` per byte in Swahili and twice as many in Amharic."""
    figures = {"bits_per_byte": bits, "bytes": 400, "tokens": 100, "tokens_per_word": 2.0}
    twice = {**figures, "bits_per_byte": 2 * bits}
    bible, declaration = {"swh_Latn": figures, "amh_Ethi": twice}, {"swh_Latn": figures, "eng_Latn": figures}
    texts = {"bible": bible, "declaration": declaration, "curve": [[0, bits], [9, bits]]}
    return {"arm": arm, "what": "so", "base": "model", "seed": seed, "new_tokens": 5, **texts, **more}


def test_the_tables_say_what_was_measured(tmp_path):
    trained = {"tokens": 1000, "tokens_per_second": 50.0, "peak_memory_gb": 1.5, "minutes": 2.0}
    speed = {"bytes_read_per_second": 1000.0, "tokens_written_per_second": 10.0}
    accuracy = {"swh_Latn": {"accuracy": 0.25, "ci95": [0.125, 0.375], "majority": 0.5}}
    paired = {"a": 0.25, "b": 0.5, "difference": 0.25, "ci95": [-0.125, 0.5], "p": 0.001, "n": 8}
    asked, of_arm = {}, {}
    for bench in ("sib200", "taxi1500"):
        asked[bench] = accuracy
        of_arm |= {f"{bench}_change": {"swh_Latn": paired}, f"{bench}_new": {**paired, "languages": 1}}
    arms = {
        "base": made_up("base", 2.0, **speed, **asked),
        "x-0": made_up("x", 1.0, seed=0, **trained, **speed, **asked, **of_arm),
        "x-1": made_up("x", 2.0, seed=1, **trained, **speed, **asked, **of_arm),
    }
    tables = report({"arms": arms}, tmp_path / "curves.png")
    # Bible: the seeds have (1 + 2) / 2 and (2 + 4) / 2. Their mean is 2.25 ± √1.125; the base has 3.
    row = (
        "| **x**: so | 5 | 1,000 | 2.250 ± 1.061 | −25.0% | 1.500 ± 0.707 | −25.0% | 1.500 ± 0.707 | −25.0% |"
    )
    assert tables["arms"].endswith(f"{row} 2 of 2 | 50 | 1.5 | 2.0 |")
    assert "| amh_Ethi | 4.000 | 3.000 ± 1.414, −25.0% |" in tables["languages"]
    assert "| x | 2.00 | 4.00 | 1,000 | 40 | 1,000 | 2.0 | 1.500 |" in tables["extension"]
    row = (
        "| sib200 | swh_Latn | 0.500 | 0.250 (0.125 to 0.375) | 0.500, +0.250 (−0.125 to +0.500), p < 0.01 |"
    )
    assert row in tables["few-shot"]
    (tmp_path / "results.md").write_text("# Results\n")
    for fill in (check_docs, lambda docs: fill_docs(docs, tables, tmp_path / "curves.png")):
        with pytest.raises(
            UserError, match="results.md: has no place for a table; expected <!-- adaptation: arms"
        ):
            fill(tmp_path)
    assert (tmp_path / "results.md").read_text() == "# Results\n"
