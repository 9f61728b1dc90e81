"""Kill a training run again and again, and see that nothing of it is lost: what is left is bit for bit an undisturbed run's.

    python tests/kill.py [--kills 20] [--steps 200] [--signals KILL,TERM] [--seed 0]

A run is started, killed at a random moment (while it prepares, trains, writes a checkpoint or measures) and started again with
the same command, until it has been killed so often; then it may finish. Compared are the last checkpoint's weights and
optimizer state, the adapter, nll.json, and metrics.jsonl without what a clock decides.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # a model so small gains nothing from more, which would wait on busy cores
TIMED = ("tokens_per_second", "waiting", "peak_memory_gb", "mfu")


def command(out: Path, steps: int) -> list[str]:
    settings = ["--langs", "swh_Latn,amh_Ethi", "--extend-vocab", "500", "--seq-len", "32", "--batch-size", "4",
                "--micro-batch-size", "2", "--warmup-steps", "2", "--log-every", "3", "--save-every", "7",
                "--eval-every", str(steps // 2)]  # fmt: skip
    return [sys.executable, str(ROOT / "train.py"), *settings, "--steps", str(steps), "--out", str(out)]


def outcome(out: Path, steps: int) -> dict[str, object]:
    """What must not differ: file -> its bytes, and the lines of metrics.jsonl."""
    last = out / "checkpoints" / f"step-{steps}"
    files = [last / "adapter_model.safetensors", last / "optimizer.safetensors", out / "adapter/adapter_model.safetensors",
             out / "nll.json"]  # fmt: skip
    found: dict[str, object] = {str(file.relative_to(out)): file.read_bytes() for file in files}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    state = json.loads((last / "training_state.json").read_text())
    return {**found, "state": state}


def survive(folder: Path, signals: list[signal.Signals], steps: int, seed: int) -> None:
    """Disturb a run with one signal after the other. Raise AssertionError where it ends otherwise than an undisturbed one."""
    calm, disturbed = folder / "calm", folder / "disturbed"
    began = time.perf_counter()
    subprocess.run(command(calm, steps), check=True, capture_output=True, env=ENVIRONMENT)
    seconds = time.perf_counter() - began
    rng = random.Random(seed)
    hit = finished = 0
    phases = set()
    while hit < len(signals):
        number = signals[hit]
        running = subprocess.Popen(
            command(disturbed, steps), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        moment = rng.uniform(0, seconds)
        try:
            out, err = running.communicate(timeout=moment)
            assert running.returncode == 0, err
            assert outcome(disturbed, steps) == outcome(calm, steps)
            finished += 1  # before its time had come: the next one is disturbed
            disturbed = folder / f"disturbed-{finished}"
            continue
        except subprocess.TimeoutExpired:
            running.send_signal(number)
            out, err = running.communicate(timeout=60)
        hit += 1
        phases.add(phase(disturbed, steps))
        print(f"{number.name} {hit} after {moment:.1f} s, {phase(disturbed, steps)}: {checkpoint_names(disturbed)}", flush=True)
        if number == signal.SIGKILL:
            assert running.returncode == -signal.SIGKILL
        elif running.returncode == 0:  # during training; before that there is nothing to save, and the process just ends
            assert "stopped after step" in out or "held-out NLL" in out, (out, err)
        else:
            assert running.returncode == -number, (running.returncode, err)
    done = subprocess.run(command(disturbed, steps), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "training" in phases, f"no signal came during training, only during {phases}; take another --seed"
    found, expected = outcome(disturbed, steps), outcome(calm, steps)
    for key, value in expected.items():
        assert found[key] == value, f"{key} differs from that of the undisturbed run"


def phase(out: Path, steps: int) -> str:
    """What the run was doing when it was stopped."""
    if not (out / "nll.json").exists():
        return "preparing"
    if list(out.glob("checkpoints/.step-*.tmp")):
        return "saving"
    last = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return "measuring" if last[-1:] == [steps] else "training" if last else "starting"


def checkpoint_names(out: Path) -> str:
    return ", ".join(sorted(path.name for path in out.glob("checkpoints/step-*"))) or "no checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--signals", default="KILL", help="taken in turn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        signals = [signal.Signals[f"SIG{name}"] for name in args.signals.split(",")]
        survive(Path(folder), (signals * args.kills)[: args.kills], args.steps, args.seed)
    print(f"disturbed {args.kills} times: the same weights, optimizer state, NLL and metrics, bit for bit")


if __name__ == "__main__":
    main()
