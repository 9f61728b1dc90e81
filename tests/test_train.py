"""Test train.py and evaluate.py from the command line."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT

from mala.cli import parse
from mala.model import Llama
from mala.storage.peft_adapter import load_adapter
from mala.words.tokenizer import Tokenizer

# Two languages and six steps run every part of the code.
SHORT = ["--steps", "6", "--langs", "swh_Latn,amh_Ethi", "--extend-vocab", "400", "--seq-len", "32", "--batch-size", "4",
         "--warmup-steps", "2", "--log-every", "2"]  # fmt: skip


def call(script, *args, cwd=ROOT, **environment):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})  # fmt: skip


def succeed(script, *args, cwd=ROOT, **environment):
    """Run a script as `call` does, but in this process, because importing torch takes seconds. Return stdout."""
    printed, before = io.StringIO(), Path.cwd()
    try:
        os.chdir(cwd)
        with patch.dict(os.environ, environment), patch.object(sys, "argv", [script, *map(str, args)]):
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        os.chdir(before)
    return printed.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the README's first command in an empty folder. Return the folder and the finished process."""
    cwd = tmp_path_factory.mktemp("demo")
    done = call("train.py", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_the_demo_improves_every_low_resource_language(demo):
    cwd, done = demo
    nll = json.loads((cwd / "out/demo/nll.json").read_text())
    languages = nll["before"]["languages"]
    assert languages.keys() == nll["after"]["languages"].keys() and len(languages) >= 20
    assert len({language[4:] for language in languages}) >= 8  # scripts
    for language, before in languages.items():
        after = nll["after"]["languages"][language]
        assert before["documents"] == after["documents"] == 14 and before["bytes"] == after["bytes"]
        if language != "eng_Latn":
            assert after["nll_per_document"] < before["nll_per_document"], language
    assert nll["after"]["macro"]["nll_per_document"] < 0.75 * nll["before"]["macro"]["nll_per_document"]
    assert "improved: " in done.stdout and "held-out NLL" in done.stdout and "swh_Latn" in done.stdout


def test_metrics_are_one_object_a_logged_step(demo):
    lines = [json.loads(line) for line in (demo[0] / "out/demo/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(10, 161, 10), 162]
    for line in lines:
        assert line.keys() >= {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
        assert line["tokens"] == line["step"] * 16 * 128
    assert lines[-1]["loss"] < lines[0]["loss"] - 3 and lines[-1]["lr"] < lines[1]["lr"]


def test_what_it_leaves_loads_in_transformers_and_peft(demo):
    out = demo[0] / "out/demo"
    assert sorted(entry.name for entry in out.iterdir()) == [
        ".lock", "adapter", "base", "checkpoints", "held_out", "loss.png", "metrics.jsonl", "nll.json", "nll.png", "run.json",
        "tokens",
    ]  # fmt: skip
    assert sorted(entry.name for entry in (out / "checkpoints").iterdir()) == ["step-150", "step-162"]
    tokenizer = Tokenizer.from_pretrained(out / "adapter")
    assert tokenizer.model == Tokenizer.from_pretrained(out / "base").model
    tokens = torch.tensor([tokenizer.encode("Maji safi hukikinga kijiji.", bos=True)])
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adapters.md").read_text("utf-8"), re.DOTALL)
    names = {}
    exec(block.replace("out/demo", str(out)), names)  # the documented way to load it in PEFT
    reference = names["model"]
    assert reference.config.vocab_size == len(tokenizer)
    model = Llama.from_pretrained(out / "base", dtype=torch.float32)
    load_adapter(model, out / "adapter")
    assert (model.eval()(tokens) - reference(tokens).logits).abs().max() < 1e-4


def flat(figures):
    """Return the figures without lists, which pytest.approx does not accept."""
    low, high = figures["ci95"]
    return {**figures, "ci95": low, "high": high}


def test_evaluate_finds_the_demo_and_gives_its_figures_again(demo):
    cwd, _ = demo
    lines = succeed("evaluate.py", "--bench", "nll", cwd=cwd).splitlines()
    assert "are not benchmark scores" in lines[0] and lines[0] == lines[-1]
    results = json.loads((cwd / "out/nll/results.json").read_text())
    assert results.keys() == {"bench", "data", "sample", "model", "adapter", "dtype", "protocol", "shots", "seed", "seeds",
                              "split", "limit", "languages", "macro", "seconds", "examples_per_second"}  # fmt: skip
    assert (
        results["sample"] is True
        and results["model"] == "out/demo/base"
        and results["adapter"] == "out/demo/adapter"
    )
    after = json.loads((cwd / "out/demo/nll.json").read_text())["after"]
    assert flat(results["macro"]) == pytest.approx(flat(after["macro"]), rel=1e-5)
    assert flat(results["languages"]["swh_Latn"]) == pytest.approx(
        flat(after["languages"]["swh_Latn"]), rel=1e-5
    )
    predictions = [json.loads(line) for line in (cwd / "out/nll/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 14 * len(results["languages"])
    swahili = [line["nll"] for line in predictions if line["lang"] == "swh_Latn"]
    assert sum(swahili) / 14 == pytest.approx(results["languages"]["swh_Latn"]["nll_per_document"])


def test_evaluate_takes_an_adapter_alone_or_with_a_model(demo, tmp_path):
    cwd, _ = demo
    shutil.copytree(cwd / "out/demo/adapter", cwd / "copy")
    expected = json.loads((cwd / "out/demo/nll.json").read_text())["after"]["languages"]["amh_Ethi"]
    for args in (["--adapter", "copy"], ["--model", "out/demo", "--adapter", "copy"],
                 ["--model", "out/demo/base", "--adapter", "copy"], ["--model", "out/demo"]):  # fmt: skip
        succeed("evaluate.py", *args, "--langs", "amh_Ethi", "--out", tmp_path, cwd=cwd)
        results = json.loads((tmp_path / "results.json").read_text())
        assert flat(results["languages"]["amh_Ethi"]) == pytest.approx(flat(expected), rel=1e-5)
        assert results["model"] == "out/demo/base"
    succeed("evaluate.py", "--model", "out/demo/base", "--langs", "amh_Ethi", "--out", tmp_path, cwd=cwd)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (
        results["adapter"] is None and results["macro"]["nll_per_document"] > 2 * expected["nll_per_document"]
    )


def test_evaluate_looks_where_the_design_says(demo, tmp_path):
    (tmp_path / "data/nll").mkdir(parents=True)
    (tmp_path / "data/nll/swh_Latn.txt").write_text("habari\nhabari ya leo\nhabari ya asubuhi\n")
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    (tmp_path / "elsewhere/nll/swh_Latn.txt").write_text("moja\n")
    for environment, args, documents, data in [
        ({}, [], 3, "data/nll"),
        ({"MALA_DATA": "elsewhere"}, [], 1, "elsewhere/nll"),
        ({"MALA_DATA": "nowhere"}, ["--limit", "2"], 2, "data/nll"),
        ({}, ["--held-out", "0.34"], 1, "data/nll"),
        ({}, ["--data", "elsewhere/nll", "--model", demo[0] / "out/demo"], 1, "elsewhere/nll"),
    ]:
        printed = succeed("evaluate.py", *args, "--out", "out", cwd=tmp_path, **environment)
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert results["languages"]["swh_Latn"]["documents"] == documents and results["data"] == data
        assert results["sample"] is False and "sample" not in printed


def test_the_seed_decides_every_bit(tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "other")]
    for run, seed in zip(runs, (3, 3, 4)):
        succeed("train.py", *SHORT, "--seed", seed, "--out", run)
    files = [
        "adapter/adapter_model.safetensors",
        "base/model.safetensors",
        "adapter/tokenizer.model",
        "nll.json",
    ]
    assert all((runs[0] / file).read_bytes() == (runs[1] / file).read_bytes() for file in files)
    assert (runs[0] / files[0]).read_bytes() != (runs[2] / files[0]).read_bytes()


def test_accumulation_and_recomputation_change_no_loss(tmp_path):
    losses = []
    for i, more in enumerate([[], ["--micro-batch-size", "1", "--gradient-checkpointing", "on"]]):
        succeed("train.py", *SHORT, "--lora-dropout", "0", *more, "--out", tmp_path / str(i))
        losses.append(
            [
                json.loads(line)["loss"]
                for line in (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()
            ]
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 3


def test_continued_vocabulary_and_without_extension_in_bfloat16_by_epochs(tmp_path):
    succeed(
        "train.py",
        *SHORT,
        "--vocab-method",
        "continue",
        "--extend-vocab",
        "400",
        "--out",
        tmp_path / "continue",
    )
    assert len(Tokenizer.from_pretrained(tmp_path / "continue/base")) == 2048 + 400
    (tmp_path / "recipe.toml").write_text(
        'langs = ["swh_Latn"]\nextend_vocab = 0\nepochs = 1.5\ndtype = "bfloat16"\n'
    )
    printed = succeed(
        "train.py",
        "--config",
        tmp_path / "recipe.toml",
        "--seq-len",
        64,
        "--batch-size",
        2,
        "--out",
        tmp_path / "o",
    )
    tokens = sum(len(Tokenizer.from_pretrained(ROOT / "assets/tiny-llama").encode(line.split("\t")[2], bos=True))
                 for line in (ROOT / "assets/demo/sib200/swh_Latn/train.tsv").read_text().splitlines()[1:])  # fmt: skip
    assert (
        f"1 language, {tokens:,} tokens" in printed and f": {-(-3 * tokens // (2 * 2 * 64))} steps" in printed
    )
    assert not (tmp_path / "o/base").exists()
    succeed("evaluate.py", "--model", tmp_path / "o", "--langs", "swh_Latn", "--out", tmp_path / "e")
    results = json.loads((tmp_path / "e/results.json").read_text())
    assert results["model"] == str(ROOT / "assets/tiny-llama")


def bad_folder(kind):
    """Return the function that makes this bad input under tmp_path and returns the script's arguments."""

    def model(tmp_path: Path) -> Path:
        shutil.copytree(ROOT / "assets/tiny-llama", tmp_path / "model")
        return tmp_path / "model"

    def missing(tmp_path):
        (model(tmp_path) / "model.safetensors").unlink()
        return ["--model", tmp_path / "model"]

    def truncated(tmp_path):
        file = model(tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100_000])
        return ["--model", tmp_path / "model"]

    def config(tmp_path):
        file = model(tmp_path) / "config.json"
        file.write_text(file.read_text().replace('"hidden_size": 128', '"hidden_size": 64'))
        return ["--model", tmp_path / "model"]

    def tokenizer(tmp_path):
        import sentencepiece.sentencepiece_model_pb2 as pb2

        file = model(tmp_path) / "tokenizer.model"
        proto = pb2.ModelProto.FromString(file.read_bytes())
        proto.pieces.add(piece="onemore", score=-9999.0)
        file.write_bytes(proto.SerializeToString())
        return ["--model", tmp_path / "model"]

    def empty(tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/swh_Latn.txt").write_text("")
        return ["--data", tmp_path / "data"]

    def encoding(tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/swh_Latn.txt").write_bytes(b"moja\nmbili\n" + "été\n".encode("latin-1"))
        return ["--data", tmp_path / "data"]

    def toml(tmp_path):
        (tmp_path / "recipe.toml").write_text("learning_rates = 3\n")
        return ["--config", tmp_path / "recipe.toml"]

    def out(tmp_path):
        (tmp_path / "file").write_text("")
        return ["--out", tmp_path / "file" / "out"]

    def vocabulary(tmp_path):
        return ["--extend-vocab", 900_000]

    def few(tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/swh_Latn.txt").write_text("moja\n")
        return ["--data", tmp_path / "data"]

    return locals()[kind]


TRAIN_ERRORS = {
    "missing": r"model/model.safetensors: there is no such file",
    "truncated": r"model/model.safetensors: truncated",
    "config": r"from config.json; use files of one checkpoint",
    "tokenizer": r"model/tokenizer.model: 2,049 pieces, but the model has 2,048 rows",
    "empty": r"data: no language has a document",
    "encoding": r"data/swh_Latn.txt: line 3 is not UTF-8",
    "toml": r"recipe.toml: unknown option 'learning_rates'",
    "out": r"file/out: Not a directory",
    "vocabulary": r"cannot learn 900000 pieces, the text yields",
    "few": r"data: no language has a document for its test split",
}


def refuse(script, args, monkeypatch) -> str:
    """Run a script in this process (importing torch takes seconds) and return the text it exits with.
    `sys.exit(text)` prints the text and sets status 1. An exception other than UserError or OSError would
    propagate and fail the test."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


@pytest.mark.parametrize("kind", TRAIN_ERRORS)
def test_bad_input_is_one_sentence_and_leaves_nothing(kind, tmp_path, monkeypatch):
    args = bad_folder(kind)(tmp_path)
    both = kind in ("missing", "truncated", "config", "tokenizer", "empty", "encoding", "out")
    for script in ["train.py", "evaluate.py"] if both else ["train.py"]:
        small = ["--extend-vocab", "100"] if script == "train.py" else []
        message = refuse(
            script, ["--langs", "swh_Latn", *small, "--out", tmp_path / "out", *args], monkeypatch
        )
        assert message.startswith("error: ") and TRAIN_ERRORS[kind] in message
        assert not (tmp_path / "out").exists() and all(
            file.read_text() == "" for file in tmp_path.glob("file")
        )


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_mistake_ends_with_status_1_and_one_line(script, tmp_path):
    done = call(script, "--model", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = call(script, "--modle", "x")
    assert (
        done.returncode == 1
        and "unrecognized arguments: --modle" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_a_setting_that_makes_no_sense_is_refused_and_an_earlier_run_stays(tmp_path, monkeypatch):
    (tmp_path / "out/adapter").mkdir(parents=True)
    for args, message in [
        (["--steps", "0"], "steps is 0, expected a positive number"),
        (
            ["--batch-size", "6", "--micro-batch-size", "4"],
            "batch_size 6 is not a multiple of micro_batch_size 4",
        ),
        (["--langs", "xxx_Latn"], "there is no language 'xxx_Latn'"),
        (["--target-modules", "query"], "target_modules names 'query'"),
        (["--target-modules", "lm_head"], "target_modules is ('lm_head',), which matches no layer"),
        (["--target-modules", "", "--modules-to-save", ""], "nothing would train"),
        (["--seq-len", "10000"], "seq_len is 10000, but"),
        (["--steps", "1000000", "--batch-size", "100000"], "are more than the limit of 2^31 sequences"),
        (["--tokens", ROOT / "README.md"], "README.md: expected a folder"),
        (
            ["--dry-run", "--batch-size", "6", "--micro-batch-size", "4"],
            "batch_size 6 is not a multiple of micro_batch_size 4",
        ),
        (["--epochs", "inf"], "epochs is inf, expected a positive number"),
        (["--seed", "-1"], "seed is -1, expected a number from 0"),
        (["--modules-to-save", "head"], "modules_to_save names 'head'"),
        (["--extend-vocab", "900000"], "cannot learn 900000 pieces"),
        (["--model", tmp_path / "out/base"], "out/base: is inside --out"),
        (["--data", tmp_path / "out/base"], "out/base: is inside --out"),
        ([], "out: holds files that are not from train.py"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--r", "0"], "r is 0, expected a whole number from 1 to 65,536"),
    ]:
        assert message in refuse("train.py", ["--out", tmp_path / "out", *args], monkeypatch)
        assert (tmp_path / "out/adapter").exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    message = refuse(
        "train.py", [*SHORT, "--lr", "1e9", "--max-grad-norm", "1e9", "--out", tmp_path / "out"], monkeypatch
    )
    assert "lower --lr" in message and "swh_Latn" in message and not (tmp_path / "out/adapter").exists()


def test_compiled_blocks_have_the_losses_of_eager_ones(tmp_path, monkeypatch):
    """torch.compile captures and differentiates the blocks, but runs them without generated code.

    Compiling C++ code for them would take 15 seconds.
    """
    compile_block, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block: compiled.append(block) or compile_block(block, backend="aot_eager"),
    )
    losses = []
    for compile in ("on", "off"):
        succeed("train.py", *SHORT, "--lora-dropout", "0", "--compile", compile, "--out", tmp_path / compile)
        losses.append(
            [
                json.loads(line)["loss"]
                for line in (tmp_path / compile / "metrics.jsonl").read_text().splitlines()
            ]
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 3
    assert len(compiled) == 4  # every block once


def test_the_recipes_are_recipes_and_the_demo_s_is_the_default():
    Settings = runpy.run_path(str(ROOT / "train.py"))["Settings"]
    demo, defaults = (
        parse(Settings, "", ["--config", str(ROOT / "configs/demo.toml")]),
        parse(Settings, "", []),
    )
    for name, value in vars(defaults).items():
        if name in ("model", "data"):
            assert ROOT / getattr(demo, name) == Path(value)
        elif name != "config":
            assert getattr(demo, name) == value, name
    mala500 = parse(Settings, "", ["--config", str(ROOT / "configs/mala500.toml")])
    assert (mala500.extend_vocab, mala500.seq_len, mala500.lr, mala500.epochs, mala500.weight_decay) == (
        250_000,
        4096,
        3e-4,
        3,
        0.1,
    )
    assert (mala500.r, mala500.lora_alpha, mala500.lora_dropout, mala500.alpha) == (8, 32, 0.1, 0.3)
    assert mala500.gradient_checkpointing and mala500.dtype == "bfloat16" and mala500.micro_batch_size == 1
