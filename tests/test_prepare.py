"""Test mala.running.prepare, tools.run_log and checkpoints: interrupted runs lose nothing.

train.py runs in this process.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from kill import TIMED, outcome, survive

import mala.running.prepare
import tools.run_log
from mala.storage.files import lock
from mala.storage.training_checkpoint import check_intact, checkpoints, read_state

SHORT = ["--steps", "6", "--langs", "swh_Latn,amh_Ethi", "--extend-vocab", "400", "--seq-len", "32", "--batch-size", "4",
         "--warmup-steps", "2", "--log-every", "2", "--save-every", "2", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def train(monkeypatch, capsys):
    """Return a function that runs train.py in this process and returns its output or its error message."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as exit:
            assert isinstance(exit.code, str) and exit.code.startswith("error: ") and "\n" not in exit.code
            capsys.readouterr()
            return exit.code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run. Tests work on copies of it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run([sys.executable, ROOT / "train.py", *SHORT, "--out", out], check=True, capture_output=True)
    return out


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def unfinish(out, step=6):
    """Change a finished run's folder to look as if the run was killed after the checkpoint of `step`."""
    before = json.loads((out / "nll.json").read_text())["before"]
    (out / "nll.json").write_text(json.dumps({"before": before}))
    shutil.rmtree(out / "adapter")
    for later in range(step + 2, 7, 2):
        shutil.rmtree(out / f"checkpoints/step-{later}", ignore_errors=True)


def test_a_finished_run_says_so_and_stays(out, train):
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    message = train(*SHORT, "--out", out)
    assert "this run is finished" in message and "held-out NLL" in message
    changed = {
        file.name for file, time in files.items() if not file.exists() or file.stat().st_mtime_ns != time
    }
    assert changed <= {"run.json", "index.json", ".lock"}  # rewritten with the same content
    shutil.rmtree(out / "checkpoints")
    assert "this run is finished" in train(*SHORT, "--out", out)
    message = train(*SHORT, "--seed", 5, "--out", out)
    assert (
        "run.json: the earlier run had seed 0, this one has 5; name another --out, or start over with --resume"
        in message
    )


def test_a_checkpoint_is_an_adapter_and_knows_its_step(out):
    state = read_state(out / "checkpoints/step-4")
    assert state["step"] == 4 and state["logged_step"] == 4 and state["identity"]["seq_len"] == 32
    assert {file.name for file in (out / "checkpoints/step-6").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "tokenizer.model", "tokenizer.json",
        "tokenizer_config.json", "training_state.json"
    }  # fmt: skip
    last = out / "checkpoints/step-6/adapter_model.safetensors"
    assert last.read_bytes() == (out / "adapter/adapter_model.safetensors").read_bytes()


def test_it_goes_on_with_the_same_bits_from_any_checkpoint(whole, out, train):
    unfinish(out, 4)
    with open(out / "metrics.jsonl", "a") as metrics:
        metrics.write(
            '{"step": 6, "loss": 1.0}\n{"step": 8, "lo'
        )  # lines that a killed run wrote after its last checkpoint
    message = train(*SHORT, "--out", out)
    assert "step-4: continuing after step 4 of 6" in message
    assert outcome(out, 6) == outcome(whole, 6)
    message = train(
        *SHORT, "--out", out, "--resume", out / "checkpoints/step-4"
    )  # from an earlier checkpoint of a finished run
    assert "continuing after step 4 of 6" in message and outcome(out, 6) == outcome(whole, 6)


def test_a_damaged_checkpoint_is_passed_over(whole, out, train):
    unfinish(out)
    file = out / "checkpoints/step-6/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = train(*SHORT, "--out", out)
    assert "step-6: damaged, so an earlier checkpoint is tried" in message and "after step 4" in message
    assert outcome(out, 6) == outcome(whole, 6) and (out / "checkpoints/step-6.aside").is_dir()
    (out / "checkpoints/step-6/training_state.json").unlink()
    assert "step-6/training_state.json: there is no such file" in train(
        *SHORT, "--resume", out / "checkpoints/step-6", "--out", out
    )


def test_another_run_is_not_continued(out, train, tmp_path):
    unfinish(out, 4)
    data = shutil.copytree(ROOT / "assets/demo/sib200", tmp_path / "data")
    shutil.copytree(ROOT / "assets/tiny-llama", tmp_path / "model")
    for args, message in [
        (["--seed", 1], "training_state.json: the earlier run had seed 0, this one has 1"),
        (["--batch-size", 8], "the earlier run had batch_size 4, this one has 8"),
        (["--langs", "swh_Latn"], "had langs ['amh_Ethi', 'swh_Latn'], this one has ['swh_Latn']"),
    ]:
        refused = train(*SHORT, *args, "--out", out)
        assert message in refused and "name another --out, or start over with --resume never" in refused
    assert "after step 4" in train(*SHORT, "--data", data, "--out", out)  # a copy is the same corpus
    unfinish(out, 4)
    rows = (data / "swh_Latn/train.tsv").read_text()
    (data / "swh_Latn/train.tsv").write_text(rows.replace("a", "e", 1))
    assert f"was trained on other data than {data} holds now" in train(*SHORT, "--data", data, "--out", out)
    config = (tmp_path / "model/config.json").read_text()
    (tmp_path / "model/config.json").write_text(
        config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06')
    )
    refused = train(*SHORT, "--model", tmp_path / "model", "--out", out)
    assert f"began from another checkpoint than {tmp_path / 'model'} holds now" in refused
    assert (out / "checkpoints/step-4").is_dir()
    assert "6 steps" in train(*SHORT, "--data", data, "--out", out, "--resume", "never")


def test_the_learning_rate_may_change_on_the_way_and_steps_be_added(out, train):
    message = train(*SHORT, "--steps", 8, "--lr", "1e-4", "--keep", 1, "--out", out)
    assert "continuing after step 6 of 8" in message and "this run is finished" not in message
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-8"]


def test_what_was_prepared_is_not_made_again(out, train, monkeypatch):
    unfinish(out, 4)
    original = mala.running.prepare.train_pieces
    monkeypatch.setattr(mala.running.prepare, "train_pieces", lambda *args: pytest.fail("learnt again"))
    assert "continuing" in train(*SHORT, "--out", out)
    monkeypatch.setattr(mala.running.prepare, "train_pieces", original)
    unfinish(out, 4)
    shutil.rmtree(out / "base")
    assert "continuing after step 4" in train(*SHORT, "--out", out) and (out / "base").is_dir()


def test_when_no_checkpoint_is_whole_nothing_is_taken_away(out, train):
    unfinish(out)
    for file in out.glob("checkpoints/*/optimizer.safetensors"):
        file.write_bytes(b"")
    assert (
        "out/checkpoints: no checkpoint is intact; restore one, or start over with --resume never"
        in train(*SHORT, "--out", out)
    )
    assert len(checkpoints(out / "checkpoints")) == 2
    (out / "checkpoints/step-6/training_state.json").write_text("{}")
    for path in ("step-6", "../base"):
        assert "missing or damaged" in train(*SHORT, "--out", out, "--resume", out / "checkpoints" / path)


def test_a_checkpoint_may_have_another_name_and_what_came_after_it_stays_aside(whole, out, train):
    (out / "checkpoints/step-4").rename(out / "best")
    message = train(*SHORT, "--out", out, "--resume", out / "best")
    assert "best: continuing after step 4 of 6" in message and "step-6: set aside as step-6.aside" in message
    assert outcome(out, 6) == outcome(whole, 6)
    shutil.copytree(out / "best", out / "checkpoints/step-4")
    train(*SHORT, "--out", out, "--resume", out / "checkpoints/step-4", "--keep", 1)
    assert (out / "checkpoints/step-4").is_dir()  # running the same command again needs it
    assert "resume is atuo, expected auto, never or a checkpoint's folder" in train(
        *SHORT, "--resume", "atuo", "--out", out
    )


def test_a_checkpoint_goes_into_no_other_run_s_folder(whole, tmp_path, train):
    train(*SHORT, "--seed", 7, "--out", tmp_path / "out")
    message = train(*SHORT, "--resume", whole / "checkpoints/step-4", "--out", tmp_path / "out")
    assert (
        "out/run.json: the earlier run had seed 7, this one has 0" in message
        and (tmp_path / "out/adapter").is_dir()
    )
    message = train(*SHORT, "--resume", whole / "checkpoints/step-4", "--out", tmp_path / "new")
    assert "continuing after step 4 of 6" in message  # prepared again, identically
    shutil.rmtree(tmp_path / "new")
    shutil.copytree(whole / "checkpoints/step-4", tmp_path / "step-4")
    shutil.copyfile(ROOT / "assets/tiny-llama/tokenizer.model", tmp_path / "step-4/tokenizer.model")
    message = train(*SHORT, "--resume", tmp_path / "step-4", "--out", tmp_path / "new")
    assert "step-4: has another vocabulary than" in message


def test_fewer_steps_than_there_are_is_a_mistake(out, train):
    unfinish(out)
    assert "step-6: has 6 steps, but this run only 4; name another --out, or raise --steps" in train(
        *SHORT, "--steps", 4, "--out", out
    )


def test_two_runs_do_not_write_into_one_folder(out, tmp_path, train):
    with lock(out):
        assert "out: another run is writing here; wait for it" in train(*SHORT, "--out", out)
    assert "this run is finished" in train(*SHORT, "--out", out)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, train):
    for file in ("out/metrics.jsonl", "out/checkpoints/best.pt", "tokens/pytorch_model.bin"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("of another program")
    message = train(*SHORT, "--out", tmp_path / "out")
    assert "out: holds files that are not from train.py" in message
    assert "6 steps" in train(*SHORT, "--out", tmp_path / "new", "--tokens", tmp_path / "tokens")
    assert not (tmp_path / "new/tokens").exists() and (tmp_path / "tokens/swh_Latn.0.bin").exists()
    for file in ("out/checkpoints/best.pt", "tokens/pytorch_model.bin"):
        assert (tmp_path / file).read_text() == "of another program"


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 18 MB: it holds the prepared files and two checkpoints, but not a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_and_one_that_cannot_be_written(whole, small_disk, train):
    out = small_disk / "out"
    message = train(*SHORT, "--out", out)
    assert (
        "checkpoints" in message
        and "free space or use another folder" in message
        and "No space left" in message
    )
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-2",
        "step-4",
    ]  # no half-written third one
    check_intact(out / "checkpoints/step-4")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = train(*SHORT, "--out", out)
    assert str(out) in message and "Read-only file system" in message
    message = train(*SHORT, "--out", small_disk / "other")
    assert str(small_disk / "other") in message and "Read-only file system" in message
    subprocess.run(["mount", "-o", "remount,rw,size=64m", str(small_disk)], check=True)
    assert "continuing after step 4 of 6" in train(*SHORT, "--out", out)
    assert outcome(out, 6) == outcome(whole, 6)


def test_sigterm_finishes_the_step_and_saves(whole, tmp_path, train, monkeypatch):
    original = tools.run_log.RunLog.add

    def add(self, loss, waited):
        original(self, loss, waited)
        if self.bar.n == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tools.run_log.RunLog, "add", add)
    monkeypatch.setattr(tools.run_log, "tqdm", lambda *_, **settings: Counter(settings["initial"]))
    message = train(*SHORT, "--save-every", 100, "--out", tmp_path / "out")
    assert (
        "out: stopped after step 4 of 6, with a checkpoint; the same command continues from it" in message
    )  # step 3 had already looked for signals
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    message = train(*SHORT, "--save-every", 100, "--out", tmp_path / "out")
    assert "step-4: continuing after step 4 of 6" in message and outcome(tmp_path / "out", 6) == outcome(
        whole, 6
    )


class Counter:
    """A stand-in for tqdm that counts steps."""

    disable = False

    def __init__(self, n):
        self.n = n

    def update(self):
        self.n += 1

    def set_postfix(self, **figures):
        pass

    def close(self):
        pass


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(tmp_path, train, monkeypatch):
    import mala.model

    original, calls = mala.model.Llama.forward, []

    def forward(self, tokens, targets=None, *args, **more):
        result = original(self, tokens, targets, *args, **more)
        calls.append(self.training)
        return result * float("nan") if sum(calls) == 5 and self.training else result

    monkeypatch.setattr(mala.model.Llama, "forward", forward)
    message = train(*SHORT, "--out", tmp_path / "out")
    assert (
        "step 5: the loss is nan" in message
        and "lower --lr and continue from" in message
        and "step-4" in message
    )
    assert "amh_Ethi" in message or "swh_Latn" in message
    assert [path.name for path in checkpoints(tmp_path / "out/checkpoints")] == ["step-2", "step-4"]


def test_held_out_text_is_measured_on_the_way_and_the_pictures_are_drawn(tmp_path, train):
    message = train(
        *SHORT, "--eval-every", 3, "--eval-documents", 2, "--tensorboard", "--out", tmp_path / "out"
    )
    assert "6 steps" in message
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert [line["step"] for line in lines if "languages" in line] == [3, 6]
    for line in lines:
        assert (
            line.keys() >= {"loss", "lr", "grad_norm", *TIMED} - {"mfu", "first_step_seconds"}
            and 0 <= line["waiting"] <= 1
        )
    measured = lines[1]
    assert measured["languages"].keys() == {"amh_Ethi", "swh_Latn"}
    assert measured["nll_per_document"] == pytest.approx(sum(measured["languages"].values()) / 2)
    for picture in ("loss.png", "nll.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out/tensorboard").glob("events.*"))


def test_without_tensorboard_the_flag_says_what_to_install(tmp_path, train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = train(*SHORT, "--tensorboard", "--out", tmp_path / "out")
    assert "--tensorboard needs the package tensorboard: pip install tensorboard" in message


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    survive(tmp_path, [signal.SIGKILL, signal.SIGTERM] * 2, steps=40, seed=1)


def test_a_dry_run_writes_nothing_and_needs_no_weights(tmp_path, train):
    shutil.copytree(ROOT / "assets/tiny-llama", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    message = train(*SHORT, "--dry-run", "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert "vocabulary: 2,048 pieces + 400 = 2,448\n" in message and "training 643,072 of" in message
    assert "6 steps: 24 sequences, 768 tokens" in message and "total" in message
    assert not (tmp_path / "out").exists()
