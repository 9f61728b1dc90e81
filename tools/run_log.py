"""What a run shows: a progress bar, or without a terminal a line for each logged step, such as

    step 20 of 162: loss 6.021, lr 5.00e-03, 3,120 tokens/s, 0.61 GB, 0:01:32 left

(on known GPUs with the MFU); metrics.jsonl; and TensorBoard if asked for.

metrics.jsonl holds one JSON object per logged step: `step`, `tokens` (seen so far), `loss` (nats a token, the
mean since the line before), `lr`, `grad_norm`, `tokens_per_second`, `waiting` (the share of the time in which
the model waited for data), `peak_memory_gb`, on known GPUs `mfu`, and if held-out text was measured
`nll_per_document` (nats, the macro-average) and `languages`, language -> nats a document; with --samples also
`samples`, language -> text. The first line of a process has `first_step_seconds`: that step compiles, and no
speed counts it.
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
    """Only the main process writes; the others keep the same state, which goes into every checkpoint. state:
    of the checkpoint that the run goes on from, else `{"step": 0}`. tokens and flops: of a step, in all
    processes. peak: FLOP/s of the GPU, 0 if that is not known."""

    def __init__(
        self, out: Path, state: dict, steps: int, tokens: int, flops: int, peak: float, world: World
    ):
        self.state = {"logged_step": 0, "loss": 0.0, **state}  # `loss` is summed up from one line to the next
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

            first = self.timed_from + 1 if self.timed_from else None  # from there on a killed run's goes
            self.tensorboard = SummaryWriter(str(self.path.with_name("tensorboard")), purge_step=first)

    def add(self, loss: float, waited: float) -> None:
        """After every step: its loss, and the seconds that it waited for data."""
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
        """A line of metrics.jsonl, for the steps since the last. nll: of held-out text, if measured. samples:
        language -> what the model made of a text."""
        seconds, steps = time.perf_counter() - self.time, step - self.timed_from
        if not steps:  # the line of the first step alone
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
            if self.bar.disable:  # there is no terminal
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
        """What a person wants to know of a line of metrics.jsonl. seconds: that a step takes."""
        said = [f"loss {line['loss']:.3f}", f"lr {line['lr']:.2e}"]
        said += [f"{line['tokens_per_second']:,.0f} tokens/s"]
        said += [f"MFU {line['mfu']:.1%}"] if "mfu" in line else []
        said += [f"{line['peak_memory_gb']:.2f} GB"]
        said += [f"NLL {line['nll_per_document']:.1f}"] if "nll_per_document" in line else []
        left = timedelta(seconds=round((self.bar.total - line["step"]) * seconds))
        return f"step {line['step']:,} of {self.bar.total:,}: {', '.join(said)}, {left} left"

    def flush(self) -> None:
        """To the disk itself: a checkpoint must not be there without the lines before it."""
        if self.file:
            with named(self.path):
                os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in the block, such as saving, does not count in the speed of training."""
        began = time.perf_counter()
        yield
        self.time += time.perf_counter() - began

    def close(self) -> None:
        for opened in (self.bar, self.file, self.tensorboard):
            if opened is not None:
                opened.close()


def rewind(metrics: Path, step: int) -> None:
    """Take away the lines after `step`, which a killed run wrote, the last maybe by half."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if step and metrics.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with atomic_file(metrics) as file:
        file.writelines(kept)


def peak_memory(device: str) -> int:
    """In bytes: of the GPU if there is one, else the resident memory of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # Linux's ru_maxrss is never below that of the parent process
    if found := status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
        return int(found[1]) * 1024
    import resource  # not on Windows, which no other part needs to know

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
