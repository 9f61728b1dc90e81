"""The unit of an evaluation. Each is written to its own file once measured, so a killed run can continue."""

import contextlib
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mala.benchmarks.tasks import Example
from mala.cli import UserError
from mala.model import Llama
from mala.running import distributed
from mala.storage.files import read_json, write_json
from mala.words.tokenizer import Tokenizer

VERSION = 2  # raise this with every change of the predictions: kept files are then no longer used


@dataclass
class Measurement:
    """The texts of one language: documents, or the examples of a benchmark with one choice of shots."""

    language: str
    texts: list[str] | list[Example]
    seed: int | None = None  # of the choice of shots
    file: Path | None = None  # {"seconds": ..., "predictions": [...]}, written when it is done

    def size(self) -> int:
        """Return the number of characters, for `deal`."""
        return sum(len(text if isinstance(text, str) else text.context) for text in self.texts)

    def write(self, seconds: float, predictions: list[dict[str, Any]]) -> None:
        write_json(self.file, {"seconds": seconds, "predictions": predictions})

    def read(self) -> dict[str, Any] | None:
        """Return what `write` wrote, or None if nothing usable is there. Name a damaged file on stderr."""
        with contextlib.suppress(UserError, KeyError, TypeError):
            done = read_json(self.file)
            if len(done["predictions"]) == len(self.texts) and done["seconds"] >= 0:
                return done
        if self.file.exists():
            print(f"{self.file}: damaged, so {self.language} is measured again", file=sys.stderr)
        return None


def checksum(parameter: Tensor) -> int:
    """Return Σ (2 · position + 1) · bits, modulo 2^64, with each number's bits taken as an integer. It always
    changes if one number changes, and if two numbers swap places in a parameter of fewer than 2^31 numbers.
    It is computed on the parameter's device."""
    total = position = 0
    for rows in distributed.parts(parameter):  # part by part if the model is sharded
        numbers = rows.reshape(-1).view({2: torch.int16, 4: torch.int32}[rows.itemsize])
        for some in numbers.split(2**24 if rows.is_cuda else 2**14):  # these fit a CPU's caches
            factors = torch.arange(2 * position + 1, 2 * (position + len(some)), 2, device=rows.device)
            total, position = total + (some * factors).sum(), position + len(some)
    return int(total)


def name_files(
    parts: list[Measurement],
    folder: Path,
    model: Llama,
    tokenizer: Tokenizer,
    bench: str,
    protocol: str | None,
) -> None:
    """Set the file of each measurement. Its name has a digest of all that the predictions depend on, so a run
    reuses only files that are still valid."""
    digest = hashlib.sha256(tokenizer.model)
    lora = model.lora_config
    begins = None if protocol == "published" else tokenizer.bos_id
    device = model.lm_head.weight.device.type
    for value in (VERSION, torch.__version__, vars(model.config), lora, begins, device, bench, protocol):
        digest.update(repr(value).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {checksum(parameter)}".encode())
    for one in parts:
        own = digest.copy()
        own.update(repr((one.language, one.texts, one.seed)).encode())
        seed = "" if one.seed is None else f"-{one.seed}"
        one.file = folder / f"{one.language}{seed}-{own.hexdigest()[:16]}.json"


def deal(sizes: list[int], processes: int) -> list[list[int]]:
    """Return the task numbers of each process. The largest tasks go first, to the least loaded process."""
    hands, loads = [[] for _ in range(processes)], [0] * processes
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        process = loads.index(min(loads))
        hands[process].append(number)
        loads[process] += sizes[number]
    return hands
