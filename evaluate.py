"""Measure a LLaMA checkpoint, with or without an adapter, per language.

    python evaluate.py --bench nll|sib200|taxi1500|…   the model of `python train.py`, on the bundled sample
    python evaluate.py --bench sib200 --model DIR --adapter DIR --data DIR --out DIR
    python evaluate.py --compare A/results.json B/results.json              what changed between two runs
    torchrun --nproc-per-node 8 evaluate.py …   the processes divide the languages, or share one large model

Without --data, the script looks in $MALA_DATA/<bench>, then in data/<bench>, then uses the bundled sample. It
writes results.json, predictions.jsonl and, if matplotlib is installed, results.png to --out. It saves each
finished language in --out/done/. If a run is killed, the same command continues with the other languages.
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
COMPILE_FROM = 1e16  # FLOPs, 2 per parameter and token (4 characters); for less, compiling does not pay
# Settings that apply to only one kind of benchmark.
OF_NLL = ("held_out", "max_held_out", "text_field", "skip_bad_lines", "parallel_to")
OF_QUESTIONS = ("protocol", "shots", "seed", "seeds")


@dataclass
class Settings(Reading, ModelSettings):
    bench: str = option("nll", "what to measure: NLL, or accuracy on a benchmark", ("nll", *ALL_TASKS))
    data: str | None = option(None, "the benchmark's folder; for nll: a corpus with one entry per language")
    langs: tuple[str, ...] = option((), "measure only these languages")
    langs_file: str | None = option(None, "measure only the languages in this file, one per line")
    split: str = option("test", "split to measure, if the data has splits", choices=("train", "dev", "test"))
    held_out: float = option(1.0, "nll: if there are no splits, measure this last share of the documents")
    max_held_out: int = option(1000, "nll: at most this many of them, unless --held-out is 1")
    parallel_to: str | None = option(None, "nll: also report bits per byte of parallel text in this language")
    shots: int | None = option(None, "labelled examples in each prompt; default: the benchmark's")
    seed: int | None = option(None, "random seed of the shots; default: 1234, or 42 with emma")
    seeds: tuple[int, ...] = option((), "several seeds, to see how much the choice of shots matters")
    protocol: str | None = option(None, "how prompts are built; default: the task's", (*PROTOCOLS, "emma"))
    limit: int | None = option(None, "measure at most this many documents or examples per language")
    group_by: str | None = option(None, "also average over groups of languages", choices=("script",))
    compare: tuple[str, ...] = option((), "print what changed between two results.json, or their folders")
    batch_size: int | None = option(None, "sequences per batch; default: fill 1,024 tokens, 8,192 on a GPU")
    compile: str = option("auto", "use torch.compile; auto: for long runs on a GPU", ("auto", "on", "off"))
    shard: str = option("auto", "shard one model; auto: if it does not fit", ("auto", "on", "off"))
    out: str | None = option(None, "folder for the results; default: out/<bench>")

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("shots", 0), ("seed", 0), ("max_held_out", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}, expected a number of at least {least}")
        for name in OF_QUESTIONS if self.bench == "nll" else OF_NLL:
            if getattr(self, name) != getattr(Settings, name):  # its default
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} has no effect with --bench {self.bench}; leave it out")
        if self.bench != "nll":
            task = find_task(self.bench, self.protocol)
            self.protocol = self.protocol or task.protocol
            self.shots = task.shots if self.shots is None else self.shots
            self.seeds = tuple(dict.fromkeys(self.seeds)) or (task.seed if self.seed is None else self.seed,)
            if min(self.seeds) < 0:
                raise UserError(f"seeds are {', '.join(map(str, self.seeds))}, expected no negative number")
            self.seed = self.seeds[0] if len(self.seeds) == 1 else None  # None if there are several
        if self.compare and len(self.compare) != 2:
            raise UserError(f"--compare is given {len(self.compare)} files, expected two results.json")
        if not self.compare:  # --compare writes only if --out is given
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
            raise UserError("--shard on needs several processes: torchrun --nproc-per-node N evaluate.py …")
        evaluate(settings, find_data(settings), dtype, world)


def find_data(settings: Settings) -> Path:
    """Return --data, else the first folder that holds the benchmark, else the bundled sample."""
    if settings.data is not None:
        return Path(settings.data)
    for folder in (os.environ.get("MALA_DATA"), "data"):
        if folder and Path(folder, settings.bench).is_dir():
            return Path(folder, settings.bench)
    sample = DEMO / ("sib200" if settings.bench == "nll" else settings.bench)
    if not sample.is_dir():
        remedy = f"run python -m tools.get_benchmark {settings.bench}, or name a folder with --data"
        raise UserError(f"data/{settings.bench}: there is no such folder and no bundled sample; {remedy}")
    return sample


def evaluate(settings: Settings, data: Path, dtype: torch.dtype, world: World) -> None:
    """Measure the languages that are not done yet, then write the results of all."""
    is_sample = data.is_dir() and data.resolve().is_relative_to(DEMO)
    notice = f"{data} is a bundled sample of machine-written text: its figures are not benchmark scores"
    if settings.bench != "nll":
        notice += f"; python -m tools.get_benchmark {settings.bench} downloads the real one"
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
            block.compile(dynamic=True)  # compiles once for batches of all sizes
    out = Path(settings.out)
    locked = lock(out) if world.is_main else None  # held until this process ends
    name_files(measurements, out / "done", model, tokenizer, settings.bench, settings.protocol)
    predict = partial(predict_documents, model, tokenizer)
    if settings.bench != "nll":
        encode = find_encoding(settings.bench, settings.protocol)
        predict = partial(predict_labels, model, tokenizer, encode=encode)

    # Each process measures its own languages, largest first. Processes that share a model do all together.
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
    """Read all texts before any is measured, so mistakes in the data are found at once. Return what to
    measure, and what results.json says of the texts."""
    if settings.bench == "nll":
        documents, of_texts = read_documents(settings, data, partial(choose_languages, settings, world=world))
        return [Measurement(language, texts) for language, texts in documents.items()], of_texts
    task, found = find_task(settings.bench, settings.protocol)(data), []
    for language in choose_languages(settings, task.languages(settings.langs), world):
        asked = None
        for seed in settings.seeds:
            examples = task.examples(language, settings.split, settings.shots, seed)
            # A seed also orders the questions. With --limit all seeds use the questions of the first seed.
            asked = asked or {example.id for example in examples[: settings.limit]}
            found.append(Measurement(language, [one for one in examples if one.id in asked], seed))
    return found, {}


def choose_languages(settings: Settings, found: list[str], world: World | None = None) -> list[str]:
    """Select from `found` the languages of --langs and --langs-file. Raises UserError if none is left."""
    chosen = [language for language in found if not settings.langs or language in settings.langs]
    if file := settings.langs_file:
        listed = read_languages(Path(file))
        chosen = [language for language in chosen if language in listed]
        if world and world.is_main and len(chosen) < len(listed):
            print(f"{file}: names {len(listed)} languages; measuring {len(chosen)} of them")
    if found and not chosen:
        flags = {"--langs": settings.langs, "--langs-file": settings.langs_file}
        given = " and ".join(flag for flag, value in flags.items() if value)
        raise UserError(f"{given}: no such language is here; expected some of {some(found)}")
    return chosen


if __name__ == "__main__":
    run(main)
