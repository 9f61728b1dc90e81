"""Measure a LLaMA checkpoint, with or without an adapter, per language.

    python evaluate.py --bench nll|sib200|taxi1500|…    what `python train.py` left, on the bundled sample
    python evaluate.py --bench sib200 --model DIR --adapter DIR --data DIR --out DIR
    python evaluate.py --compare A/results.json B/results.json               what changed between two runs
    torchrun --nproc-per-node 8 evaluate.py …   languages are dealt out to the processes, or all share a model

Without --data the benchmark is looked for in $MALA_DATA/<bench>, then data/<bench>; if there is none, the
bundled sample is measured. results.json, predictions.jsonl and, with matplotlib, results.png are left in
--out. Every language is written to --out/done/ when it is done; the same command goes on with the others.
"""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from mala.cli import UserError, check_folder, choose_device, option, parse, run
from mala.running.distributed import World, start
from mala.scoring import PROTOCOLS, predict_documents, predict_labels
from mala.storage.corpus import some
from mala.storage.corpus_formats import Reading
from mala.storage.files import lock
from mala.storage.model_by_name import load_model
from tools.comparison import compare, read_languages
from tools.measurement import Measurement, deal, name_files
from tools.model_settings import ModelSettings, find_model
from tools.more_tasks import ALL_TASKS, find_encoding, find_task
from tools.parallel import read_documents
from tools.write_results import write_results

DEMO = Path(__file__).resolve().parent / "assets/demo"
COMPILE_FROM = 1e16  # FLOPs, 2 a parameter and token of four characters: compiling takes its time, too
# Settings that mean something for one kind of benchmark only.
OF_NLL = ("held_out", "max_held_out", "text_field", "skip_bad_lines", "parallel_to")
OF_QUESTIONS = ("protocol", "shots", "seed", "seeds")


@dataclass
class Settings(Reading, ModelSettings):
    bench: str = option("nll", "NLL of documents, or choices of answers", choices=("nll", *ALL_TASKS))
    data: str | None = option(None, "the benchmark's folder; for nll a corpus, with one entry per language")
    langs: tuple[str, ...] = option((), "measure these languages only")
    langs_file: str | None = option(None, "measure those languages only that this file lists, one a line")
    split: str = option("test", "which split, if the data have splits", choices=("train", "dev", "test"))
    held_out: float = option(1.0, "nll: if there are no splits, measure this last share of the documents")
    max_held_out: int = option(1000, "nll: at most this many of them, as in train.py; a share of 1 is all")
    parallel_to: str | None = option(None, "nll: bits per byte of the same documents in this language, too")
    shots: int | None = option(None, "labelled examples before each question; default: the benchmark's")
    seed: int | None = option(None, "chooses the shots and their order; default: 1234, with emma 42")
    seeds: tuple[int, ...] = option((), "several of them, for the spread over choices of shots")
    protocol: str | None = option(None, "how questions are asked; default: the task's", (*PROTOCOLS, "emma"))
    limit: int | None = option(None, "measure at most this many documents or examples a language")
    group_by: str | None = option(None, "macro-averages of groups of languages, too", choices=("script",))
    compare: tuple[str, ...] = option((), "two results.json, or their folders: print what changed")
    batch_size: int | None = option(None, "sequences a batch; default: to fill 1,024 tokens, 8,192 on a GPU")
    compile: str = option("auto", "torch.compile; auto: for long work on a GPU", ("auto", "on", "off"))
    shard: str = option("auto", "one model for all processes; auto: if need be", ("auto", "on", "off"))
    out: str | None = option(None, "where the results go; default: out/<bench>")

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("shots", 0), ("seed", 0), ("max_held_out", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}, expected a number from {least} on")
        for name in OF_QUESTIONS if self.bench == "nll" else OF_NLL:
            if getattr(self, name) != getattr(Settings, name):  # its default
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} changes nothing in --bench {self.bench}; leave it out")
        if self.bench != "nll":
            task = find_task(self.bench, self.protocol)
            self.protocol = self.protocol or task.protocol
            self.shots = task.shots if self.shots is None else self.shots
            self.seeds = tuple(dict.fromkeys(self.seeds)) or (task.seed if self.seed is None else self.seed,)
            if min(self.seeds) < 0:
                raise UserError(f"seeds are {', '.join(map(str, self.seeds))}, expected numbers from 0 on")
            self.seed = self.seeds[0] if len(self.seeds) == 1 else None  # several have no one seed
        if self.compare and len(self.compare) != 2:
            raise UserError(f"--compare is given {len(self.compare)} files, expected two results.json")
        if not self.compare:  # which writes only where it is told to
            self.out = self.out or f"out/{self.bench}"
        check_folder(self.out or ".")


def main() -> None:
    settings = parse(Settings, __doc__.split("\n\n")[0])
    if settings.compare:
        compare(settings.compare, partial(choose_languages, settings), settings.group_by, settings.out)
        return

    device, dtype = choose_device(settings.device, settings.dtype)
    with start(device, shards=settings.shard != "off") as world:
        if settings.shard == "on" and world.size == 1:
            raise UserError("--shard on takes several processes: torchrun --nproc-per-node N evaluate.py …")
        evaluate(settings, find_data(settings), dtype, world)


def find_data(settings: Settings) -> Path:
    """--data, else where the benchmark may lie, else the bundled sample."""
    if settings.data is not None:
        return Path(settings.data)
    for folder in (os.environ.get("MALA_DATA"), "data"):
        if folder and Path(folder, settings.bench).is_dir():
            return Path(folder, settings.bench)
    sample = DEMO / ("sib200" if settings.bench == "nll" else settings.bench)
    if not sample.is_dir():
        remedy = f"python -m tools.get_benchmark {settings.bench} brings it, or name its folder with --data"
        raise UserError(f"data/{settings.bench}: there is no such folder, and no bundled sample; {remedy}")
    return sample


def evaluate(settings: Settings, data: Path, dtype: torch.dtype, world: World) -> None:
    """Measure what is not measured yet, language by language, then put everything together."""
    is_sample = data.is_dir() and data.resolve().is_relative_to(DEMO)
    notice = f"{data} is a bundled sample of machine-written text: its figures are no score of any benchmark"
    if settings.bench != "nll":
        notice += f"; python -m tools.get_benchmark {settings.bench} brings the real one"
    if is_sample and world.is_main:
        print(notice)
    measurements, of_texts = read_data(settings, data, world)
    base, adapter = find_model(settings.model, settings.adapter)
    model, tokenizer = load_model(base, adapter, dtype, world, settings.shard)
    is_shared = isinstance(model, FSDPModule)
    flops = 2 * sum(one.size() for one in measurements) / 4 * sum(map(torch.numel, model.parameters()))
    pays = world.device != "cpu" and flops > COMPILE_FROM
    if settings.compile == "on" or settings.compile == "auto" and pays:
        for block in model.model["layers"]:
            block.compile(dynamic=True)  # once, for batches of all sizes
    out = Path(settings.out)
    locked = lock(out) if world.is_main else None  # until this process ends
    name_files(measurements, out / "done", model, tokenizer, settings.bench, settings.protocol)
    predict = partial(predict_documents, model, tokenizer)
    if settings.bench != "nll":
        encode = find_encoding(settings.bench, settings.protocol)
        predict = partial(predict_labels, model, tokenizer, encode=encode)

    # The largest first, each process its own; with one model they do all together, and take turns in each.
    todo = world.from_main(lambda: [number for number, one in enumerate(measurements) if not one.read()])
    hands = deal([measurements[number].size() for number in todo], 1 if is_shared else world.size)
    mine = [measurements[todo[i]] for i in hands[0 if is_shared else world.rank]]
    how = {"batch_size": settings.batch_size, "world": world if is_shared else World()}
    texts = sum(len(one.texts) for one in mine)
    with tqdm(desc=settings.bench, total=texts, unit="text", leave=False, disable=world.no_bar) as bar:
        for number, one in enumerate(mine, 1):
            bar.set_postfix(language=f"{one.language}, {number} of {len(mine)}")
            began = time.perf_counter()
            seed = {} if one.seed is None else {"seed": one.seed}
            predictions = predict(one.language, one.texts, advance=bar.update, **seed, **how)
            if world.is_main or not is_shared:
                one.write(time.perf_counter() - began, predictions)
    world.wait()
    if world.is_main:
        of_run = {"data": str(data), "sample": is_sample, "model": str(base)}
        of_run |= {"adapter": str(adapter) if adapter else None, "dtype": str(dtype).removeprefix("torch.")}
        asked = {name: None if settings.bench == "nll" else getattr(settings, name) for name in OF_QUESTIONS}
        write_results(measurements, out, settings, of_run | asked | of_texts)
        if is_sample:
            print(notice)
        locked.close()


def read_data(settings: Settings, data: Path, world: World) -> tuple[list[Measurement], dict[str, Any]]:
    """All that is to be measured, read before any of it is: a mistake in the data is found at once. And what
    results.json says of it."""
    if settings.bench == "nll":
        documents, of_texts = read_documents(settings, data, partial(choose_languages, settings, world=world))
        return [Measurement(language, texts) for language, texts in documents.items()], of_texts
    task, found = find_task(settings.bench, settings.protocol)(data), []
    for language in choose_languages(settings, task.languages(settings.langs), world):
        asked = None
        for seed in settings.seeds:
            examples = task.examples(language, settings.split, settings.shots, seed)
            # With --limit every seed asks what the first one asks first: seeds choose shots, not questions.
            asked = asked or {example.id for example in examples[: settings.limit]}
            found.append(Measurement(language, [one for one in examples if one.id in asked], seed))
    return found, {}


def choose_languages(settings: Settings, found: list[str], world: World | None = None) -> list[str]:
    """Those of `found` that --langs and --langs-file name."""
    chosen = [language for language in found if not settings.langs or language in settings.langs]
    if file := settings.langs_file:
        listed = read_languages(Path(file))
        chosen = [language for language in chosen if language in listed]
        if world and world.is_main and len(chosen) < len(listed):
            print(f"{file}: names {len(listed)} languages, of which {len(chosen)} are measured here")
    if found and not chosen:
        flags = {"--langs": settings.langs, "--langs-file": settings.langs_file}
        given = " and ".join(flag for flag, value in flags.items() if value)
        raise UserError(f"{given}: no such language is here; there are {some(found)}")
    return chosen


if __name__ == "__main__":
    run(main)
