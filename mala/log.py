"""What a run shows as it goes: a progress bar, metrics.jsonl, and TensorBoard if asked for.

metrics.jsonl holds one JSON object per logged step: `step`, `tokens` (seen so far), `loss` (nats a token, the mean since the
line before), `lr`, `grad_norm`, `tokens_per_second`, `waiting` (the share of the time in which the model waited for data),
`peak_memory_gb`, on known GPUs `mfu`, and where held-out text was measured `nll_per_document` (nats, the macro-average) and
`languages`, language -> nats a document.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mala.checkpoint import atomic_file, named


class RunLog:
    """Only the main process writes; the others keep the same state, which goes into every checkpoint.

    steps, tokens_a_step: of the whole run. flops: of a step. peak_flops: of all devices per second, if known.
    """

    def __init__(self, out: Path, state: dict[str, Any], steps: int, tokens_a_step: int, flops: int, peak_flops: float | None,
                 device: str, is_main: bool, tensorboard: bool):  # fmt: skip
        self.state = {"logged_step": 0, "loss": 0.0, **state}  # the loss is summed up from one line to the next
        first_step = self.timed_from = state["step"]
        self.tokens_a_step, self.flops, self.peak_flops, self.device = tokens_a_step, flops, peak_flops, device
        self.time, self.waited = time.perf_counter(), 0.0
        self.file = self.tensorboard = None
        self.bar = tqdm(total=steps, initial=first_step, desc="training", unit="step", disable=None if is_main else True)
        if is_main:
            self.path = out / "metrics.jsonl"
            rewind(self.path, first_step)
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)
            self.tensorboard = summary_writer(out / "tensorboard", first_step) if tensorboard else None

    def add(self, loss: float, waited: float) -> None:
        """After every step: its loss, and the seconds that it waited for data."""
        self.state["loss"] += loss
        self.waited += waited
        self.bar.update()

    def write(self, step: int, nll: dict[str, dict] | None = None, **figures: float) -> None:
        """A line of metrics.jsonl, for the steps since the last one. nll: of held-out text, if it was measured."""
        seconds = time.perf_counter() - self.time
        speed = (step - self.timed_from) * self.tokens_a_step / seconds
        line = {"step": step, "tokens": step * self.tokens_a_step,
                "loss": self.state["loss"] / (step - self.state["logged_step"]), **figures, "tokens_per_second": speed,
                "waiting": self.waited / seconds, "peak_memory_gb": peak_memory(self.device) / 1e9}  # fmt: skip
        if self.peak_flops:
            line["mfu"] = speed / self.tokens_a_step * self.flops / self.peak_flops
        if nll:
            line["nll_per_document"] = nll["macro"]["nll_per_document"]
            line["languages"] = {language: scores["nll_per_document"] for language, scores in nll["languages"].items()}
        if self.file:
            with named(self.path):
                self.file.write(json.dumps(line) + "\n")
        if self.tensorboard:
            for name, value in [*line.items(), *((f"nll/{key}", value) for key, value in line.get("languages", {}).items())]:
                if name not in ("step", "languages"):
                    self.tensorboard.add_scalar(name, value, step)
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_second=f"{speed:,.0f}")
        self.state |= {"logged_step": step, "loss": 0.0}
        self.time, self.timed_from, self.waited = time.perf_counter(), step, 0.0

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
        self.bar.close()
        if self.file:
            self.file.close()
        if self.tensorboard:
            self.tensorboard.close()


def rewind(metrics: Path, step: int) -> None:
    """Take away the lines after `step`, which a killed run wrote after its last checkpoint, the last maybe by half."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if step and metrics.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_file(metrics) as file:
        file.writelines(kept)


def summary_writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def peak_memory(device: str) -> int:
    """In bytes: of the GPU where there is one, else the resident memory of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, which no other part needs to know

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
