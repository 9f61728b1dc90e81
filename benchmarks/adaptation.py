"""The paper's experiment on a real checkpoint: what does each part of the recipe bring?

    python benchmarks/adaptation.py --model DIR --twin DIR --data DIR --out DIR [--scale gpu] [--docs docs]

model: SmolLM2-135M with its own tokenizer.json, twin: the same with a SentencePiece tokenizer; both come from
benchmarks/smollm2.py. data: a folder with bible/, udhr/, sib200/ and taxi1500/. An arm of adaptation.toml is
one run of train.py. It is measured on text that no arm trains on, and for which no setting was chosen:

- verses from the last fifth of each New Testament; the training text is the beginning;
- the Universal Declaration of Human Rights: another domain, and English;
- SIB-200 and Taxi1500, three shots, for arms with few_shot.

--out gets text/ (to train on and to measure), runs/ARM-SEED/ (what train.py and evaluate.py left),
adaptation.json (all figures) and curves.png. With --docs the tables in that folder's results.md are replaced,
and its picture. After an interruption the same command goes on: what is done is not run again.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import evaluate
from benchmarks.adaptation_report import ENGLISH, check_docs, fill_docs, report, without_english
from mala.cli import UserError, choose_device, parse, run
from mala.generate import generate
from mala.lora import merge_lora
from mala.running.distributed import World
from mala.running.settings import Settings
from mala.scoring import predict_documents
from mala.storage.corpus_formats import read_lines
from mala.storage.files import atomic_directory, lock, read_json, write_json
from mala.storage.model_by_name import load_model
from mala.words.byte_level import load_tokenizer
from tools.comparison import compare_runs
from tools.make_tiny_llama import read_text
from tools.model_settings import find_model

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ("sib200", "taxi1500")


@dataclass
class Arm:
    """A row of the table: a way to adapt the base, or with no `settings` the base as it is."""

    name: str
    what: str  # in words
    base: str = "model"  # or twin
    settings: dict[str, Any] | None = None  # of train.py
    steps_of: str | None = None  # the arm whose number of steps it takes: equal compute
    few_shot: bool = False
    speed: bool = False  # measure how fast it reads and writes
    scales: list[str] = field(default_factory=lambda: ["cores", "gpu"])
    seeds: dict[str, list[int]] = field(default_factory=dict)  # of a scale; default: 0


def read_arms(file: Path, name: str) -> tuple[dict[str, Any], list[Arm]]:
    """The settings of a scale, and its arms. Raises UserError for a mistake in the table."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        scale = table["scale"].get(name)
        arms = [Arm(key, **values) for key, values in table["arm"].items()]
    except (KeyError, TypeError, ValueError) as error:
        found = f"is no table of scales and arms ({error})"
        raise UserError(f"{file}: {found}; see benchmarks/adaptation.toml") from None
    if scale is None:
        raise UserError(f"{file}: has no scale {name!r}, expected one of {', '.join(table['scale'])}")
    arms = [arm for arm in arms if name in arm.scales]
    for number, arm in enumerate(arms):
        if arm.settings is not None:
            arm.settings = table.get("all", {}) | scale["settings"] | arm.settings
        if arm.steps_of and arm.steps_of not in [earlier.name for earlier in arms[:number]]:
            missing = f"no arm {arm.steps_of!r} runs before it, as steps_of says"
            raise UserError(f"{file}: arm {arm.name}: {missing}")
    if arms[0].name != "base" or not (arms[0].few_shot and arms[0].speed):
        expected = "the first arm must be base, with few_shot and speed: all are compared with it"
        raise UserError(f"{file}: {expected}")
    return scale, arms


def write_text(data: Path, scale: dict[str, Any], out: Path) -> list[str]:
    """Fill the folder `out`. Returns the languages. It gets

    - corpus/: what is trained on, and what train.py measures on the way, which is in curve/, too;
    - bible/ and declaration/: what is measured in the end;
    - replay/: English from Python's own reference.
    """
    for name in ("bible", "udhr", *BENCHES):
        if not (data / name).is_dir():
            raise UserError(f"{data / name}: there is no such folder; --data takes one with it")
    files = {file.stem: file for file in sorted((data / "bible").glob("*.txt"))}
    languages = scale["languages"] or list(files)
    if missing := [language for language in languages if language not in files]:
        raise UserError(f"{data}/bible: has no {missing[0]}.txt, which the scale names")

    def write(name: str, lines: list[str]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    with atomic_directory(out, replace=True) as folder:
        for language in languages:
            verses = files[language].read_text(encoding="utf-8").splitlines()
            end = len(verses) * 4 // 5
            step = max(2, (len(verses) - end) // scale["test_documents"])
            trained = verses[: min(end, scale["train_documents"])]
            seen = {*trained}
            later = [verse for verse in verses[end:] if verse not in seen]
            watched = later[::step][: scale["settings"]["eval_documents"]]
            write(f"corpus/{language}/train.txt", trained)
            write(f"corpus/{language}/test.txt", watched)
            write(f"curve/{language}.txt", watched)
            write(f"bible/{language}.txt", later[step // 2 :: step][: scale["test_documents"]])
        for language in [*languages, ENGLISH]:
            if (file := data / "udhr" / f"{language}.txt").exists():
                write(f"declaration/{language}.txt", file.read_text(encoding="utf-8").splitlines())
        english = list(dict.fromkeys(read_text()))
        write(f"replay/{ENGLISH}/train.txt", english[8:])
        write(f"replay/{ENGLISH}/test.txt", english[:8])
    return languages


def digest(folder: Path) -> str:
    """SHA-256 of all that a folder holds."""
    content = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return content.hexdigest()


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Settings of train.py as its command line has them."""
    texts = {name: ",".join(value) if isinstance(value, list) else value for name, value in settings.items()}
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]


class Experiment:
    """All arms of a scale, in turn."""

    def __init__(self, args: argparse.Namespace):
        """Find mistakes in the table, the text or the bases before the first arm runs."""
        self.args, self.out = args, args.out
        self.scale, self.arms = read_arms(args.arms, args.scale)
        self.device, self.dtype = choose_device(self.scale["device"], self.scale["dtype"])
        for base in (args.model, args.twin):
            load_tokenizer(base)
        self.languages = write_text(args.data, self.scale, self.out / "text")
        for arm in self.arms:
            if arm.settings:
                parse(Settings, "", self.command(arm, 0, self.out, steps=1)[1:])
        of_scale = {name: self.scale[name] for name in ("questions", "written", "dtype", "device")}
        self.measured_on = of_scale | {"text": digest(self.out / "text"), "data": str(args.data)}

    def run(self) -> None:
        """Run and measure what is not done yet, and write adaptation.json after each arm."""
        runs, failed = {}, []
        machine = torch.cuda.get_device_name() if self.device != "cpu" else f"{os.cpu_count()} CPU cores"
        figures = {"scale": self.args.scale, "languages": self.languages, "machine": machine}
        figures |= {"torch": torch.__version__, "arms": runs}
        for arm in self.arms:
            seeds = arm.seeds.get(self.args.scale, [0]) if arm.settings else [None]
            for seed in seeds:
                key = arm.name if seed is None else f"{arm.name}-{seed}"
                try:
                    done = self.run_arm(arm, seed, key, is_first=seed == seeds[0])
                except UserError as error:  # the night goes on
                    failed.append(str(error))
                    print(f"{key}: {error}", flush=True)
                    continue
                runs[key] = {"arm": arm.name, "what": arm.what, "base": arm.base, "seed": seed, **done}
                write_json(self.out / "adaptation.json", figures)
                bits = statistics.mean(one["bits_per_byte"] for one in done["bible"].values())
                print(f"{key}: {bits:.3f} bits a byte, mean of {len(self.languages)} languages", flush=True)
        if failed:
            raise UserError(f"{len(failed)} arms failed, the first: {failed[0]}")

    def run_arm(self, arm: Arm, seed: int | None, key: str, is_first: bool) -> dict[str, Any]:
        """The figures of one run, from its arm.json if it is done. Raises UserError if that is of another.
        is_first: of its arm's seeds, which alone answers questions and is timed."""
        folder = self.out / "runs" / key
        folder.mkdir(parents=True, exist_ok=True)
        command = self.command(arm, seed, folder) if arm.settings else [str(vars(self.args)[arm.base])]
        asked = {"few_shot": arm.few_shot and is_first, "speed": arm.speed and is_first, **self.measured_on}
        file = folder / "arm.json"
        done = read_json(file) if file.exists() else {"command": command, "asked": None}
        if done["command"] != command:
            raise UserError(f"{file}: was made by another command; name another --out")
        if done["asked"] != asked:
            done = {"command": command, "asked": asked}
            done |= self.train(command, folder) if arm.settings else {}
            done |= self.measure(arm, folder, asked)
            write_json(file, done)
            shutil.rmtree(folder / "train/checkpoints", ignore_errors=True)
        return done

    def command(self, arm: Arm, seed: int, folder: Path, steps: int | None = None) -> list[str]:
        """The command line of train.py. steps: if that of the other arm's run is not known yet."""
        settings = dict(arm.settings)
        if arm.steps_of:
            settings["steps"] = steps or self.lines_of(self.out / f"runs/{arm.steps_of}-{seed}")[-1]["step"]
        if settings.pop("replay", False):
            settings["replay"] = self.out / "text/replay"
        base, corpus = vars(self.args)[arm.base], self.out / "text/corpus"
        settings |= {"model": base, "data": corpus, "out": folder / "train", "seed": seed}
        settings |= {"device": self.scale["device"], "dtype": self.scale["dtype"]}
        return ["train.py", *flags_of(settings)]

    def lines_of(self, folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in read_lines(folder / "train/metrics.jsonl")]

    def train(self, command: list[str], folder: Path) -> dict[str, Any]:
        """Run train.py to its end, in a process of its own: its peak memory is the arm's."""
        nll = folder / "train/nll.json"
        if not (nll.exists() and "after" in read_json(nll)):
            gc.collect()
            torch.cuda.empty_cache()  # train.py plans with what is free
            with open(folder / "train.log", "a", encoding="utf-8") as log:
                words = [sys.executable, str(ROOT / command[0]), *command[1:]]
                process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
                try:
                    process.wait()
                finally:  # an interruption: train.py saves a checkpoint
                    process.terminate()
                    process.wait()
            if process.returncode or "after" not in read_json(nll):
                ended = f"train.py ended with status {process.returncode} before its last step"
                raise UserError(f"{folder}/train.log: {ended}; its last lines say why")
        lines = self.lines_of(folder)
        speeds = [line["tokens_per_second"] for line in lines if "first_step_seconds" not in line]
        speed = statistics.median(speeds or [lines[-1]["tokens_per_second"]])
        return {
            "steps": lines[-1]["step"],
            "tokens": lines[-1]["tokens"],
            "tokens_per_second": speed,
            "minutes": lines[-1]["tokens"] / speed / 60,
            "peak_memory_gb": max(line["peak_memory_gb"] for line in lines),
        }

    def measure(self, arm: Arm, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
        """Bits per byte and tokens a word of the texts, the curve, and what else is asked of this run."""
        model = folder / "train" if arm.settings else vars(self.args)[arm.base]
        texts = ("bible", "declaration", "curve")
        found = {name: self.evaluate(folder, model, "nll", name)["languages"] for name in texts}
        for name in texts:
            for language, figures in found[name].items():
                text = (self.out / f"text/{name}/{language}.txt").read_text(encoding="utf-8")
                figures["tokens_per_word"] = figures["tokens"] / len(text.split())
        base, adapter = find_model(str(model), None)
        found["new_tokens"] = len(load_tokenizer(base)) - len(load_tokenizer(vars(self.args)[arm.base]))
        found["curve"] = self.curve(folder, found["curve"])
        if asked["speed"]:
            found |= self.speeds(base, adapter)
        for bench in BENCHES if asked["few_shot"] else ():
            found[bench] = self.evaluate(folder, model, bench, None)["languages"]
            before, after = (self.out / "runs" / key / bench for key in ("base", folder.name))
            if before != after:
                found[f"{bench}_change"] = compare_runs(before, after, list)["languages"]
                found[f"{bench}_new"] = compare_runs(before, after, without_english)["macro"]
        return found

    def curve(self, folder: Path, end: dict[str, dict]) -> list[list[float]]:
        """[tokens read, bits per byte], the latter on the verses of text/curve. end: figures of the end."""
        lines = self.lines_of(folder) if (folder / "train").exists() else []
        points = []
        for line in lines:
            if "languages" in line:
                # Of the same verses bits are as many times fewer as nats.
                ratios = [line["languages"][one] / end[one]["nll_per_document"] for one in self.languages]
                bits = [ratio * end[one]["bits_per_byte"] for ratio, one in zip(ratios, self.languages)]
                points.append([line["tokens"], statistics.mean(bits)])
        last = statistics.mean(end[one]["bits_per_byte"] for one in self.languages)
        return [*points, [lines[-1]["tokens"] if lines else 0, last]]

    def evaluate(self, folder: Path, model: Path, bench: str, text: str | None) -> dict[str, Any]:
        """evaluate.py, in this process: what its results.json holds."""
        data, out = (self.out / "text" / text if text else self.args.data / bench), folder / (text or bench)
        names = [language for language in [*self.languages, ENGLISH] if text or (data / language).is_dir()]
        of_task = {} if text else {"langs": tuple(names), "limit": self.scale["questions"]}
        settings = evaluate.Settings(bench=bench, model=str(model), data=str(data), out=str(out), **of_task)
        with open(folder / "evaluate.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            evaluate.evaluate(settings, data, self.dtype, World(device=self.device))
        return read_json(out / "results.json")

    def speeds(self, base: Path, adapter: Path | None) -> dict[str, float]:
        """Bytes of the Bible's verses that the model, its adapter merged, reads a second, and tokens that it
        writes a second, one sequence at a time: medians of three, after one that does not count."""
        model, tokenizer = load_model(base, adapter, self.dtype, World(device=self.device))
        if adapter:  # as the checkpoint that `mala.lora merge` makes of it
            merge_lora(model)
            model.to(self.dtype)
        model.config.eos_token_id = None  # so that no text ends early
        texts = [file.read_text(encoding="utf-8") for file in sorted((self.out / "text/bible").iterdir())]
        verses = [verse for text in texts for verse in text.splitlines()]
        prompt, written = tokenizer.encode(verses[0])[:16], self.scale["written"]

        def seconds(work: Callable[[], Any]) -> float:
            times = []
            for _ in range(4):
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
            return statistics.median(times[1:])

        read = seconds(lambda: predict_documents(model, tokenizer, "all", verses))
        write = seconds(lambda: list(generate(model, prompt, written, temperature=0)))
        size = sum(len(verse.encode()) for verse in verses)
        return {"bytes_read_per_second": size / read, "tokens_written_per_second": written / write}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "twin", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--scale", default="cores", help="cores or gpu, of --arms")
    parser.add_argument("--arms", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--docs", type=Path, help="the folder of results.md, whose tables are replaced")
    args = parser.parse_args()
    if args.docs:
        check_docs(args.docs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: train.py is told, too
    args.out.mkdir(parents=True, exist_ok=True)
    with lock(args.out):
        Experiment(args).run()
    tables = report(read_json(args.out / "adaptation.json"), args.out / "curves.png")
    for table in tables.values():
        print("\n" + table)
    if args.docs:
        fill_docs(args.docs, tables, args.out / "curves.png")


if __name__ == "__main__":
    run(main)
