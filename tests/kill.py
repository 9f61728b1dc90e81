"""Kill a training run again and again, and check that its results equal an undisturbed run's bit for bit.

    python tests/kill.py [--kills 20] [--steps 200] [--signals KILL,TERM] [--seed 0]

The script starts a run, kills it at a random moment (while it prepares, trains, writes a checkpoint or
measures) and starts it again with the same command. After the last kill the run may finish. The script then
compares the last checkpoint's weights and optimizer state, the adapter, nll.json, and metrics.jsonl without
timings. Each run is a process forked from one that has already imported train.py, so the kills hit real work
and not imports.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("tokens_per_second", "waiting", "peak_memory_gb", "mfu", "first_step_seconds")


def arguments(out: Path, steps: int) -> list[str]:
    settings = ["--langs", "swh_Latn,amh_Ethi", "--extend-vocab", "400", "--seq-len", "32", "--batch-size", "4",
                "--micro-batch-size", "2", "--warmup-steps", "2", "--log-every", "3", "--save-every", "7",
                "--eval-every", str(steps // 2)]  # fmt: skip
    return ["train.py", *settings, "--steps", str(steps), "--out", str(out)]


def work(argv: list[str], output: Path) -> None:
    """Run `python train.py …` in this forked process, and write its output to a file."""
    import torch

    import train

    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    sys.argv = argv
    torch.set_num_threads(1)  # more would not help a model this small, and would wait on busy cores
    train.run_main(train.main)


def start(out: Path, steps: int) -> BaseProcess:
    """Start a run in the folder `out`. Its output goes to the file `<out>.log`."""
    sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    process = context.Process(target=work, args=(arguments(out, steps), out.with_suffix(".log")))
    process.start()
    return process


def outcome(out: Path, steps: int) -> dict[str, object]:
    """Return what must not differ: file -> bytes, the lines of metrics.jsonl, and the training state."""
    last = out / "checkpoints" / f"step-{steps}"
    files = [last / "adapter_model.safetensors", last / "optimizer.safetensors", out / "adapter/adapter_model.safetensors",
             out / "nll.json"]  # fmt: skip
    found: dict[str, object] = {str(file.relative_to(out)): file.read_bytes() for file in files}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    state = json.loads((last / "training_state.json").read_text())
    return {**found, "state": state}


def survive(folder: Path, signals: list[signal.Signals], steps: int, seed: int) -> int:
    """Send a run one signal after another, restarting it each time. Return how many were sent: all of
    `signals`, and more of them until one has come during training.

    Raises AssertionError if its results differ from an undisturbed run's.
    """
    calm, disturbed = folder / "calm", folder / "disturbed"
    start(folder / "first", 1).join()  # warms up: imports modules, fills the file cache
    began = time.perf_counter()
    undisturbed = start(calm, steps)
    undisturbed.join()
    assert undisturbed.exitcode == 0, calm.with_suffix(".log").read_text()
    seconds = time.perf_counter() - began
    rng = random.Random(seed)
    hit = finished = 0
    phases = set()
    while hit < len(signals) or "training" not in phases:
        assert hit < 10 * len(signals), f"no signal came during training, only during {phases}"
        number = signals[hit % len(signals)]
        running, log = start(disturbed, steps), disturbed.with_suffix(".log")
        moment = rng.uniform(0, seconds)
        running.join(moment)
        if running.exitcode is not None:
            assert running.exitcode == 0, log.read_text()
            assert outcome(disturbed, steps) == outcome(calm, steps)
            finished += 1  # it finished before the signal: disturb a new run
            disturbed = folder / f"disturbed-{finished}"
            continue
        os.kill(running.pid, number)
        running.join(60)
        hit += 1
        phases.add(phase(disturbed, steps))
        print(
            f"{number.name} {hit} after {moment:.1f} s, {phase(disturbed, steps)}: {checkpoint_names(disturbed)}",
            flush=True,
        )
        if number == signal.SIGKILL:
            assert running.exitcode == -signal.SIGKILL
        elif running.exitcode == 0:  # the signal came during training; earlier, the process just ends
            assert "stopped after step" in log.read_text() or "held-out NLL" in log.read_text(), (
                log.read_text()
            )
        else:
            assert running.exitcode == -number, (running.exitcode, log.read_text())
    last = start(disturbed, steps)
    last.join()
    assert last.exitcode == 0, disturbed.with_suffix(".log").read_text()
    found, expected = outcome(disturbed, steps), outcome(calm, steps)
    for key, value in expected.items():
        assert found[key] == value, f"{key} differs from that of the undisturbed run"
    return hit


def phase(out: Path, steps: int) -> str:
    """Return what the run was doing when it was stopped."""
    if not (out / "nll.json").exists():
        return "preparing"
    if list(out.glob("checkpoints/.step-*.tmp")):
        return "saving"
    last = [
        json.loads(line)["step"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    return "measuring" if last[-1:] == [steps] else "training" if last else "starting"


def checkpoint_names(out: Path) -> str:
    return ", ".join(sorted(path.name for path in out.glob("checkpoints/step-*"))) or "no checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--signals", default="KILL", help="signals to send, in turn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        signals = [signal.Signals[f"SIG{name}"] for name in args.signals.split(",")]
        hit = survive(Path(folder), (signals * args.kills)[: args.kills], args.steps, args.seed)
    print(f"disturbed {hit} times: the same weights, optimizer state, NLL and metrics, bit for bit")


if __name__ == "__main__":
    main()
