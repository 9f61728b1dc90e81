"""Measure a LLaMA checkpoint, with or without an adapter, per language.

    python evaluate.py --bench nll|sib200|taxi1500                    what `python train.py` left, on the bundled sample
    python evaluate.py --bench sib200 --model DIR --adapter DIR --data DIR --out DIR
    python evaluate.py --compare A/results.json B/results.json        what changed between two runs
    torchrun --nproc-per-node 8 evaluate.py …                         languages are dealt out to the processes

Without --data the benchmark is looked for in $MALA_DATA/<bench>, then data/<bench>; where there is none, the bundled sample
is measured. results.json, predictions.jsonl and, with matplotlib, results.png are left in --out. Every language is written
as it is done, to --out/done/; the same command goes on with what is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mala import plots
from mala.checkpoint import atomic_file, lock, read_json, write_json
from mala.cli import UserError, check_folder, choose_device, option, parse, run
from mala.corpus import Corpus, some
from mala.distributed import World, start
from mala.load import ModelSettings, find_model, load_model
from mala.lora import LoRALinear
from mala.model import Llama
from mala.results import (
    Prediction,
    compare,
    print_comparison,
    print_results,
    read_languages,
    summarise,
    with_macro,
)
from mala.scoring import PROTOCOLS, Advance, predict_documents, predict_labels
from mala.tasks import TASKS, Example
from mala.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "assets/demo"
# Settings that mean something for one kind of benchmark only.
OF_NLL, OF_QUESTIONS = ("held_out", "max_held_out"), ("shots", "seed", "seeds", "protocol")


@dataclass
class Settings(ModelSettings):
    bench: str = option("nll", "nll: the negative log-likelihood of documents; sib200, taxi1500: few-shot classification",
                        choices=("nll", *TASKS))  # fmt: skip
    data: str | None = option(None, "the benchmark's folder; for nll a corpus, a folder with one entry per language")
    langs: tuple[str, ...] = option((), "measure these languages only")
    langs_file: str | None = option(None, "measure those of the data's languages that this file lists, one a line")
    split: str = option("test", "which split, where the data have splits", choices=("train", "dev", "test"))
    held_out: float = option(1.0, "nll: last share of each language's documents that is measured, where there are no splits")
    max_held_out: int = option(1000, "nll: at most this many of them, as in train.py; with a share of 1 all are measured")
    shots: int = option(3, "labelled examples before each question")
    seed: int = option(1234, "chooses the shots and the order of the examples")
    seeds: tuple[int, ...] = option((), "several of them, for the spread over choices of shots")
    protocol: str = option("published", "how a question is encoded, see docs/evaluation.md", choices=tuple(PROTOCOLS))
    limit: int | None = option(None, "measure at most this many documents or examples a language")
    group_by: str | None = option(None, "macro-averages of groups of languages, too", choices=("script",))
    compare: tuple[str, ...] = option((), "two results.json, or their folders: print what changed from the first to the second")
    batch_size: int | None = option(None, "sequences a batch; default: as many as fill 1,024 tokens on a CPU, 4,096 on a GPU")
    out: str | None = option(None, "where the results go; default: out/<bench>")

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("shots", 0), ("seed", 0), ("max_held_out", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}, expected a number from {least} on")
        defaults = {field.name: field.default for field in fields(self)}
        for name in OF_QUESTIONS if self.bench == "nll" else OF_NLL:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name.replace('_', '-')} changes nothing in --bench {self.bench}; leave it out")
        self.seeds = tuple(dict.fromkeys(self.seeds)) or (self.seed,)
        if min(self.seeds) < 0:
            raise UserError(f"seeds are {', '.join(map(str, self.seeds))}, expected numbers from 0 on")
        if self.compare and len(self.compare) != 2:
            raise UserError(f"--compare is given {len(self.compare)} files, expected two results.json")
        if not self.compare:  # which writes only where it is told to
            self.out = self.out or f"out/{self.bench}"
        if self.out:
            check_folder(self.out)


@dataclass
class Job:
    """What is measured and written at once: a language, with one choice of shots."""

    language: str
    documents: list[str]  # or, where the benchmark asks questions:
    examples: list[Example]
    seed: int | None = None  # of the examples
    file: Path | None = None  # {"seconds": ..., "predictions": [...]}, once it is done

    def __len__(self) -> int:
        return len(self.documents) + len(self.examples)

    def size(self) -> int:
        return sum(map(len, self.documents)) + sum(len(example.context) for example in self.examples)


def main() -> None:
    settings = parse(Settings, __doc__.split("\n\n")[0])
    if settings.compare:
        result = compare(*map(Path, settings.compare), lambda found: choose_languages(settings, found), settings.group_by)
        print_comparison(result)
        if settings.out:
            write_json(Path(settings.out) / "compare.json", result)
        return

    device, dtype = choose_device(settings.device, settings.dtype)
    with start(device, shards=False) as world:
        data = find_data(settings)
        notice = None
        if DEMO in [data.resolve(), *data.resolve().parents] and data.is_dir():
            notice = f"{data} is a bundled sample of machine-written text: its figures are no score of any benchmark"
            if settings.bench != "nll":
                notice += f"; python -m mala.tasks download {settings.bench} brings the real one"
        if notice and world.is_main:
            print(notice)
        evaluate(settings, data, notice is not None, dtype, world)
        if notice and world.is_main:
            print(notice)


def evaluate(settings: Settings, data: Path, is_sample: bool, dtype: torch.dtype, world: World) -> None:
    out = Path(settings.out)
    jobs = read_jobs(settings, data, world)
    base, adapter = find_model(settings.model, settings.adapter)
    model, tokenizer = load_model(base, adapter, dtype, world.device)
    held = lock(out) if world.is_main else None  # until this process ends
    name_files(jobs, out / "done", model, tokenizer, settings)

    # Score: the largest jobs first, each process its own.
    todo = world.from_main(lambda: [number for number, job in enumerate(jobs) if not read_done(job)])
    mine = [jobs[todo[i]] for i in deal([jobs[number].size() for number in todo], world.size)[world.rank]]
    bar = tqdm(
        total=sum(map(len, mine)), desc=settings.bench, unit="text", leave=False, disable=None if world.is_main else True
    )
    with bar:
        for number, job in enumerate(mine):
            bar.set_postfix(language=f"{job.language}, {number + 1} of {len(mine)}")
            began = time.perf_counter()
            predictions = predict(job, model, tokenizer, settings, bar.update)
            write_done(job.file, time.perf_counter() - began, predictions)
    world.wait()
    if world.is_main:
        write_results(jobs, out, settings, data, is_sample, base, adapter, dtype)
        held.close()


def read_jobs(settings: Settings, data: Path, world: World) -> list[Job]:
    """Everything that is to be measured, read before any of it is: a mistake in the data is found at once."""
    if settings.bench == "nll":
        corpus = Corpus(data, settings.langs, settings.held_out, settings.max_held_out)
        corpus.languages = choose_languages(settings, corpus.languages, world)
        jobs = [Job(language, list(islice(documents, settings.limit)), [])
                for language, documents in corpus.stream(settings.split).items()]  # fmt: skip
        empty = set(settings.langs) - {job.language for job in jobs}
        if empty:
            raise UserError(f"{data}: {', '.join(sorted(empty))} has no document in its {settings.split} split; leave it out")
        return jobs
    task, jobs = TASKS[settings.bench](data), []
    for language in choose_languages(settings, task.languages(settings.langs), world):
        by_seed = {seed: task.examples(language, settings.split, settings.shots, seed) for seed in settings.seeds}
        # With --limit every seed asks the questions that the first seed asks first: seeds choose shots, not questions.
        asked = {example.id for example in by_seed[settings.seeds[0]][: settings.limit]}
        jobs += [Job(language, [], [example for example in examples if example.id in asked], seed)
                 for seed, examples in by_seed.items()]  # fmt: skip
    return jobs


def choose_languages(settings: Settings, found: list[str], world: World | None = None) -> list[str]:
    """Those of `found` that --langs and --langs-file name."""
    chosen = [language for language in found if not settings.langs or language in settings.langs]
    if settings.langs_file:
        listed = read_languages(Path(settings.langs_file))
        chosen = [language for language in chosen if language in listed]
        if world and world.is_main and len(chosen) < len(listed):
            print(f"{settings.langs_file}: names {len(listed)} languages, of which {len(chosen)} are measured here")
    if found and not chosen:
        flags = [flag for flag, given in (("--langs", settings.langs), ("--langs-file", settings.langs_file)) if given]
        raise UserError(f"{' and '.join(flags)}: no such language is here; there are {some(found)}")
    return chosen


def name_files(jobs: list[Job], folder: Path, model: Llama, tokenizer: Tokenizer, settings: Settings) -> None:
    """Where each job's predictions are kept: under a digest of all that they depend on. So another model, another text or
    another version of this code never takes them for its own, and every run may go on with what it finds."""
    digest = hashlib.sha256(tokenizer.model)
    for source in (ROOT / "evaluate.py", *sorted((ROOT / "mala").glob("*.py"))):
        digest.update(source.read_bytes())
    scaling = [module.scaling for module in model.modules() if isinstance(module, LoRALinear)]
    begins = tokenizer.bos_id if settings.bench == "nll" or settings.protocol == "natural" else None
    device = model.lm_head.weight.device.type
    for value in (torch.__version__, vars(model.config), scaling, begins, device, settings.bench, settings.protocol):
        digest.update(repr(value).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    for job in jobs:
        of_job = digest.copy()
        of_job.update(repr((job.language, job.documents, job.examples, job.seed)).encode())
        seed = "" if job.seed is None else f"-{job.seed}"
        job.file = folder / f"{job.language}{seed}-{of_job.hexdigest()[:16]}.json"


def deal(sizes: list[int], processes: int) -> list[list[int]]:
    """The jobs of each process, as their numbers, the largest first; each goes to the process that has least to do."""
    hands: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        process = loads.index(min(loads))
        hands[process].append(number)
        loads[process] += sizes[number]
    return hands


def predict(job: Job, model: Llama, tokenizer: Tokenizer, settings: Settings, advance: Advance) -> list[Prediction]:
    how, language = {"batch_size": settings.batch_size, "advance": advance}, job.language
    if settings.bench == "nll":
        return predict_documents(model, tokenizer, language, job.documents, **how)
    labels = TASKS[settings.bench].labels
    return predict_labels(model, tokenizer, language, job.examples, labels, job.seed, settings.protocol, **how)


def write_done(file: Path, seconds: float, predictions: list[Prediction]) -> None:
    with atomic_file(file) as opened:
        json.dump({"seconds": seconds, "predictions": predictions}, opened, ensure_ascii=False)


def read_done(job: Job) -> dict[str, Any] | None:
    """What `write_done` wrote; None where the job is not done, or its file is damaged, which is named on stderr."""
    if not job.file.exists():
        return None
    try:
        done = read_json(job.file)
        if len(done["predictions"]) == len(job) and done["seconds"] >= 0:
            return done
    except (UserError, KeyError, TypeError):
        pass
    print(f"{job.file}: damaged, so {job.language} is measured again", file=sys.stderr)
    return None


def write_results(jobs: list[Job], out: Path, settings: Settings, data: Path, is_sample: bool, base: Path, adapter: Path | None,
                  dtype: torch.dtype) -> None:  # fmt: skip
    (out / "results.json").unlink(missing_ok=True)  # an earlier run's: it must not stand beside other predictions
    seconds, by_language = 0.0, {}
    with atomic_file(out / "predictions.jsonl") as predictions:
        for job in jobs:
            done = read_json(job.file)
            seconds += done["seconds"]
            by_language.setdefault(job.language, []).extend(done["predictions"])
            predictions.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in done["predictions"])
    languages = {language: summarise(predictions) for language, predictions in by_language.items()}
    is_nll, texts = settings.bench == "nll", sum(map(len, jobs))
    result = {
        "bench": settings.bench, "data": str(data), "sample": is_sample, "model": str(base),
        "adapter": str(adapter) if adapter else None, "dtype": str(dtype).removeprefix("torch."),
        "protocol": None if is_nll else settings.protocol, "shots": None if is_nll else settings.shots,
        "seed": None if is_nll or len(settings.seeds) > 1 else settings.seeds[0],
        "seeds": None if is_nll else list(settings.seeds), "split": settings.split, "limit": settings.limit,
        **with_macro(languages, settings.group_by),
        "seconds": seconds, "examples_per_second": texts / seconds,  # of scoring, of all processes and runs together
    }  # fmt: skip
    write_json(out / "results.json", result)
    print_results(result)
    what = f"{texts:,} documents, NLL in nats" if is_nll else f"{texts:,} examples"
    print(f"{base}{f' + {adapter}' if adapter else ''}: {len(languages)} languages, {what}, {seconds:.0f} s; "
          f"{out / 'results.json'}")  # fmt: skip
    if plots.is_available():
        try:
            plots.draw_results(result, out / "results.png")
        except UserError as error:  # the figures are safe
            print(f"no picture: {error}", file=sys.stderr)


def find_data(settings: Settings) -> Path:
    if settings.data is not None:
        return Path(settings.data)
    places = [Path(os.environ["MALA_DATA"])] if "MALA_DATA" in os.environ else []
    for place in [*places, Path("data")]:
        if (place / settings.bench).is_dir():
            return place / settings.bench
    return DEMO / ("sib200" if settings.bench == "nll" else settings.bench)


if __name__ == "__main__":
    run(main)
