"""Measure the memory of an evaluation and a training run whose processes share a model.

test_distributed.py starts this script with torchrun. Each process prints a line of JSON: stage -> bytes, the peak of
its anonymous memory in that stage, minus its memory after a run with a tiny model. Memory-mapped files are not
anonymous memory and do not count.
"""

import contextlib
import functools
import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Shard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import train  # noqa: E402
from mala.running import distributed  # noqa: E402
from mala.running.settings import Settings  # noqa: E402
from mala.storage.weights import write_tensors  # noqa: E402


class Stages:
    """A thread that records the peak memory of each stage of a program."""

    def __init__(self):
        self.open, self.most, self.is_over = ["between"], {}, False
        threading.Thread(target=self.watch, daemon=True).start()

    def of(self, name, function):
        """Wrap `function` so that it counts as the stage `name` while it runs."""

        @functools.wraps(function)
        def named(*given, **by_name):
            self.open.append(name)
            try:
                return function(*given, **by_name)
            finally:
                self.open.pop()

        return named

    def watch(self):
        while not self.is_over:
            now, stage = anonymous(), self.open[-1]
            self.most[stage] = max(self.most.get(stage, 0), now)
            time.sleep(0.0005)


def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def gather_many(world, out, stages):
    """Write 16 sharded tensors of 16 MiB each, and record the memory that this takes beyond the shards."""
    part = [torch.ones(4096 // world.size, 1024) for _ in range(16)]
    tensors = {
        f"x{number}": DTensor.from_local(one, world.mesh, [Shard(0)]) for number, one in enumerate(part)
    }
    before = anonymous()
    stages.of("gathering", write_tensors)(Path(out) / "many.safetensors" if world.is_main else None, tensors)
    stages.most["gathering"] -= before


def evaluate_and_train(base, adapter, data, out, world, stages):
    # The text is so short that activations take almost no memory compared with the model.
    asked = evaluate.Settings(model=base, adapter=adapter, data=data, limit=2, shard="on", out=f"{out}/nll")
    evaluate.evaluate(asked, Path(data), torch.float32, world)
    gc.collect()
    settings = Settings(model=base, data=data, out=f"{out}/run", extend_vocab=0, seq_len=8, batch_size=4, micro_batch_size=1,
                        r=1, steps=2, save_every=2, gradient_checkpointing="on")  # fmt: skip
    with contextlib.ExitStack() as locks:
        stages.of("training", train.train)(settings, world, torch.float32, locks)
    gc.collect()


def main(tiny, base, adapter, data, out):
    stages = Stages()
    evaluate.load_model = stages.of("loading", evaluate.load_model)
    evaluate.predict_documents = stages.of("evaluating", evaluate.predict_documents)
    train.Run.__init__ = stages.of("loading", train.Run.__init__)
    train.nll_by_language = stages.of("measuring", train.nll_by_language)
    train.Run.save = stages.of("saving", train.Run.save)
    with distributed.start("cpu") as world:
        evaluate_and_train(tiny, None, data, f"{out}/tiny", world, stages)
        before, stages.most = stages.most["between"], {}
        evaluate_and_train(base, adapter, data, f"{out}/large", world, stages)
        large = {stage: most - before for stage, most in stages.most.items()}
        gather_many(world, out, stages)
        stages.is_over = True
    print(json.dumps({**large, "gathering": stages.most["gathering"]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
