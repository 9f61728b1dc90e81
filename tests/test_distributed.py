"""Test mala.running.distributed. Two gloo processes run the code of many GPUs; the oracle is one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, one_thread
from safetensors.torch import load_file
from test_train import succeed as succeed_here

from mala.lora import LoRAConfig, add_lora, trainable_parameters
from mala.model import Llama, LlamaConfig
from mala.storage.peft_adapter import save_adapter
from tools.known_models import init_weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SETTINGS = ["--langs", "swh_Latn,amh_Ethi", "--extend-vocab", "400", "--seq-len", "32", "--batch-size", "8", "--warmup-steps",
            "5", "--micro-batch-size", "2", "--lr", "1e-3", "--log-every", "1", "--save-every", "25"]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(out, processes, *more):
    command = [*TORCHRUN, str(processes), ROOT / "train.py", *SETTINGS, "--out", out, *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def succeed(out, processes, *more):
    if processes == 1:
        with one_thread():
            return succeed_here("train.py", *SETTINGS, "--out", out, *more)
    done = train(out, processes, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return torch.tensor([line["loss"] for line in lines])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run the same 50 steps in one process and in two. Return the folder of both runs."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        succeed(folder / str(processes), processes, "--steps", 50)
    return folder


def test_two_processes_have_the_losses_of_one(runs):
    one, two = losses(runs / "1"), losses(runs / "2")
    assert len(one) == 50 and (one - two).abs().max() < 1e-5
    assert one[-1] < one[0] - 1  # the loss falls
    nll = [
        json.loads((runs / name / "nll.json").read_text())["after"]["macro"]["nll_per_document"]
        for name in "12"
    ]
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)


@pytest.mark.parametrize("of, on", [("2", 1), ("1", 2)])
def test_a_checkpoint_of_one_number_of_processes_goes_on_with_another(runs, of, on, tmp_path):
    step_25 = runs / of / "checkpoints/step-25"
    printed = succeed(tmp_path / "out", on, "--steps", 50, "--resume", step_25)
    assert "step-25: continuing after step 25 of 50" in printed
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(26, 51))
    assert (torch.tensor([line["loss"] for line in lines]) - losses(runs / "1")[25:]).abs().max() < 1e-5
    expected = load_file(runs / "1/adapter/adapter_model.safetensors")
    found = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-3 and found[name].shape == tensor.shape


@pytest.mark.parametrize("what", [("--train", "all", "--attend", "document"), ("--train-rows", "new")])
def test_two_processes_train_all_weights_or_new_rows_as_one(what, tmp_path):
    """The runs also measure, continue a text and save after step 3, and then continue training."""
    more = ["--steps", 6, "--eval-every", 3, "--samples", "swh_Latn", "--save-every", 3, *what]
    for processes in (1, 2):
        succeed(tmp_path / str(processes), processes, *more)
    assert (losses(tmp_path / "1") - losses(tmp_path / "2")).abs().max() < 1e-5
    files = [tmp_path / name / "checkpoints/step-6" for name in "12"]
    one, two = (load_file(next(file.glob("*model.safetensors"))) for file in files)
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in "12"]
    texts = [json.loads(of_run[2])["samples"]["swh_Latn"] for of_run in lines]
    assert texts[0] == texts[1]

    shutil.rmtree(files[1])  # one process continues what two have saved
    for result in ("model", "adapter"):
        shutil.rmtree(tmp_path / "2" / result, ignore_errors=True)
    succeed(tmp_path / "2", 1, *more)
    again = load_file(next(files[1].glob("*model.safetensors")))
    assert all(torch.allclose(one[name], again[name], atol=1e-4) for name in one)


@pytest.mark.parametrize("processes", [4])
def test_a_sharded_model_computes_what_the_whole_one_does(processes, tmp_path):
    done = subprocess.run([*TORCHRUN, str(processes), ROOT / "tests/sharded.py", tmp_path], capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=120)  # fmt: skip
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the memory of a process is read from Linux's /proc"
)
def test_two_processes_never_hold_much_more_than_half_of_a_model(tmp_path):
    """The limit is 0.6 of what a single process holds, plus the largest unit that FSDP2 gathers, a block."""
    model = Llama(LlamaConfig(vocab_size=2048, hidden_size=512, intermediate_size=1376, num_hidden_layers=40,
                              num_attention_heads=8)).to(torch.bfloat16)  # fmt: skip
    init_weights(model, 0)
    model.save_pretrained(tmp_path / "base")  # bfloat16 on disk: a float32 copy in memory is no file map
    shutil.copy(ROOT / "assets/tiny-llama/tokenizer.model", tmp_path / "base")
    add_lora(model, LoRAConfig(r=1))
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "data").mkdir()
    texts = (ROOT / "assets/demo/sib200/swh_Latn/train.tsv").read_text(encoding="utf-8").splitlines()[1:6]
    (tmp_path / "data/swh_Latn.txt").write_text(
        "\n".join(text.split("\t")[2] for text in texts), encoding="utf-8"
    )
    command = [*TORCHRUN, "2", ROOT / "tests/sharded_memory.py", ROOT / "assets/tiny-llama"]
    command += [tmp_path / name for name in ("base", "adapter", "data", "out")]
    # Return freed memory to the system at once, so the process's memory is what it really holds.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | returned, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(measured) == 2

    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    trained = 4 * sum(parameter.numel() for parameter in trainable_parameters(model).values())
    block = 4 * sum(parameter.numel() for parameter in model.model["layers"][0].parameters())
    with_moments = parameters + 2 * trained
    allowed = dict.fromkeys(("loading", "evaluating"), 0.6 * parameters + block)
    allowed |= dict.fromkeys(("measuring", "saving"), 0.6 * with_moments + block)
    allowed["training"] = (
        0.6 * with_moments + block + trained
    )  # gradients are not sharded until they are averaged
    for most in measured:
        assert most["gathering"] < 2**24, most  # less than one of the 16 tensors
        for stage, size in allowed.items():
            assert parameters / 2 < most[stage] < size, f"{stage}: {most[stage]:,} bytes of {parameters:,}"


@pytest.mark.parametrize("bench", ["nll", "taxi1500"])
def test_an_evaluation_that_shares_the_model_gives_the_predictions_of_one_process(bench, tmp_path):
    args = ["evaluate.py", "--bench", bench, "--langs", "swh_Latn,amh_Ethi", "--limit", "7", "--batch-size", "2",
            "--model", ROOT / "assets/tiny-llama"]  # fmt: skip
    with one_thread():
        succeed_here(*args, "--out", tmp_path / "one")
    command = [*TORCHRUN, "2", *args, "--shard", "on", "--out", tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name for name in ("one", "two"))
    assert (two / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    kept = [sorted(file.name for file in (folder / "done").iterdir()) for folder in (one, two)]
    assert kept[0] == kept[1]  # so one can continue what the other has done


def start_and_signal(out, number, to_torchrun=False):
    """Send a signal to one of two processes, or to torchrun, during training.

    Returns the exit status, stdout and stderr of the job.
    """
    command = [
        *TORCHRUN,
        "2",
        ROOT / "train.py",
        *SETTINGS,
        "--steps",
        "100000",
        "--save-every",
        "4",
        "--out",
        out,
    ]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                           start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (out / "checkpoints/step-8").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        found = subprocess.run(
            ["pgrep", "-P", str(job.pid), "-f", "train.py"], capture_output=True, text=True
        ).stdout.split()
        assert len(found) == 2, found
        os.kill(job.pid if to_torchrun else int(found[1]), number)
        printed, errors = job.communicate(timeout=60)
        return job.returncode, printed, errors
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def test_a_killed_process_ends_the_job_with_a_sentence(tmp_path):
    status, _, errors = start_and_signal(tmp_path / "out", signal.SIGKILL)
    assert status == 1
    assert "error: lost the other processes: one of them has ended" in errors
    assert "Signal 9 (SIGKILL)" in errors
    assert errors.count("Traceback") <= 1  # from torchrun, in its report on the signal


@pytest.mark.parametrize("to_torchrun", [False, True])
def test_a_signal_stops_all_processes_with_a_checkpoint(to_torchrun, tmp_path):
    status, printed, _ = start_and_signal(tmp_path / "out", signal.SIGTERM, to_torchrun)
    assert "with a checkpoint; the same command continues from it" in printed
    assert status == (1 if to_torchrun else 0)  # torchrun reports a failure if it is signalled itself
    step = int(printed.split("stopped after step ")[1].split()[0])
    assert (tmp_path / f"out/checkpoints/step-{step}/training_state.json").exists()


def test_a_mistake_is_said_once(tmp_path):
    done = train(tmp_path / "out", 2, "--batch-size", 6)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "batch_size 6 is not a multiple of micro_batch_size 2 x 2 processes" in done.stderr
