"""Report a run's progress: on a terminal with a bar, otherwise with a line for each logged step, such as

    step 20 of 162: loss 6.021, lr 5.00e-03, 3,120 tokens/s, 0.61 GB, 0:01:32 left

with the MFU (model FLOPs utilisation) on known GPUs. A run also writes metrics.jsonl, and if asked to,
TensorBoard's files. metrics.jsonl holds one JSON object per logged step:

- `step`; `tokens`: the number seen so far.
- `loss`: nats per token, the mean since the previous line; `lr`; `grad_norm`.
- `tokens_per_second`; `waiting`: the share of the time that the model waited for data; `peak_memory_gb`;
  `mfu`, on known GPUs.
- `nll_per_document`: nats, the macro-average, and `languages`: language -> nats per document, if held-out
  text was measured; `samples`: language -> text, with --samples.
- `first_step_seconds`, on the first line of a process: it compiles the model, and no speed includes it.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from mala.running.distributed import World
from mala.storage.files import atomic_file, named


class RunLog:
    """The log of a run. Only the main process writes; the others keep the same state for the checkpoints.

    - state: from the checkpoint that the run continues from, else `{"step": 0}`.
    - steps: the number of steps of the whole run.
    - tokens, flops: of one step, over all processes.
    - peak: FLOP/s of the GPU, or 0 if unknown.
    """

    def __init__(
        self, out: Path, state: dict, steps: int, tokens: int, flops: int, peak: float, world: World
    ):
        self.state = {"logged_step": 0, "loss": 0.0, **state}  # `loss`: the sum since the last line
        self.tokens, self.flops, self.peak, self.world = tokens, flops, peak, world
        self.timed_from, self.time, self.waited, self.first = state["step"], time.perf_counter(), 0.0, None
        self.file = self.tensorboard = None
        self.bar = tqdm(None, "training", steps, unit="step", initial=state["step"], disable=world.no_bar)
        self.path = out / "metrics.jsonl"
        if world.is_main:
            rewind(self.path, state["step"])
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)

    def open_tensorboard(self) -> None:
        if self.file:
            from torch.utils.tensorboard import SummaryWriter

            first = self.timed_from + 1 if self.timed_from else None  # drop a killed run's later points
            self.tensorboard = SummaryWriter(str(self.path.with_name("tensorboard")), purge_step=first)

    def add(self, loss: float, waited: float) -> None:
        """Record one step: its loss, and the seconds that it waited for data."""
        self.state["loss"] += loss
        self.waited += waited
        if self.first is None:
            self.first = time.perf_counter() - self.time
            self._time_from(self.timed_from + 1)
        self.bar.update()

    def _time_from(self, step: int) -> None:
        self.time, self.timed_from, self.waited = time.perf_counter(), step, 0.0

    def write(
        self,
        step: int,
        nll: dict[str, dict] | None = None,
        samples: dict[str, str] | None = None,
        **figures: float,
    ) -> None:
        """Write a line of metrics.jsonl for the steps since the last line.

        - nll: the results on held-out text, if it was measured.
        - samples: language -> a text that the model continued.
        - figures: more fields of the line, such as `lr`.
        """
        seconds, steps = time.perf_counter() - self.time, step - self.timed_from
        if not steps:  # only the first step so far: it is timed apart
            seconds, steps = self.first, 1
        speed = steps * self.tokens / seconds
        loss = self.state["loss"] / (step - self.state["logged_step"])
        line = {"step": step, "tokens": step * self.tokens, "loss": loss, **figures}
        line |= {"tokens_per_second": speed, "waiting": self.waited / seconds}
        line["peak_memory_gb"] = peak_memory(self.world.device) / 1e9
        if self.first:
            line["first_step_seconds"], self.first = self.first, 0.0
        if self.peak:
            line["mfu"] = steps * self.flops / seconds / (self.peak * self.world.size)
        scalars = {name: value for name, value in line.items() if name != "step"}
        if nll:
            line["nll_per_document"] = scalars["nll_per_document"] = nll["macro"]["nll_per_document"]
            of_languages = nll["languages"].items()
            line["languages"] = {language: one["nll_per_document"] for language, one in of_languages}
            scalars |= {f"nll/{language}": nats for language, nats in line["languages"].items()}
        if samples:
            line["samples"] = samples
        if self.file:
            with named(self.path):
                self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if self.bar.disable:  # no terminal
                print(self.describe(line, seconds / steps), flush=True)
            for language, text in (samples or {}).items():
                self.bar.write(f"{language}: {text}")
        if self.tensorboard:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, step)
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_second=f"{speed:,.0f}")
        self.state |= {"logged_step": step, "loss": 0.0}
        self._time_from(step)

    def describe(self, line: dict, seconds: float) -> str:
        """Return a line of metrics.jsonl as text for people. seconds: the time of one step."""
        said = [f"loss {line['loss']:.3f}", f"lr {line['lr']:.2e}"]
        said += [f"{line['tokens_per_second']:,.0f} tokens/s"]
        said += [f"MFU {line['mfu']:.1%}"] if "mfu" in line else []
        said += [f"{line['peak_memory_gb']:.2f} GB"]
        said += [f"NLL {line['nll_per_document']:.1f}"] if "nll_per_document" in line else []
        left = timedelta(seconds=round((self.bar.total - line["step"]) * seconds))
        return f"step {line['step']:,} of {self.bar.total:,}: {', '.join(said)}, {left} left"

    def flush(self) -> None:
        """Flush metrics.jsonl to the disk, so that no checkpoint outlives the lines before it."""
        if self.file:
            with named(self.path):
                os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the `with` block, for example for saving, from the training speed."""
        began = time.perf_counter()
        yield
        self.time += time.perf_counter() - began

    def close(self) -> None:
        for opened in (self.bar, self.file, self.tensorboard):
            if opened is not None:
                opened.close()


def rewind(metrics: Path, step: int) -> None:
    """Remove the lines after `step`. A killed run wrote them, and the last one may be incomplete."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if step and metrics.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with atomic_file(metrics) as file:
        file.writelines(kept)


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: of the GPU if there is one, else the process's resident memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # not ru_maxrss: on Linux it starts at the parent's peak
    if found := status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
        return int(found[1]) * 1024
    import resource  # imported here because Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
