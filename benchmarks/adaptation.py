"""The paper's experiment on a real checkpoint: what does each part of the recipe bring?

    python benchmarks/adaptation.py --model DIR --twin DIR --data DIR --out DIR [--scale gpu] [--docs docs]

model: SmolLM2-135M with its own tokenizer.json, twin: the same with a SentencePiece tokenizer; both come from
benchmarks/smollm2.py. data: a folder with bible/, udhr/, sib200/ and taxi1500/. An arm of adaptation.toml is
one run of train.py. It is measured on text that no arm trains on:

- verses from the last fifth of each New Testament; the training text is the beginning;
- the Universal Declaration of Human Rights: another domain, and English;
- SIB-200 and Taxi1500, three shots, for arms with few_shot.

--out gets text/ (to train on and to measure), runs/ARM-SEED/ (what train.py and evaluate.py left),
adaptation.json (all figures) and curves.png. With --docs the tables in that folder's results.md are replaced,
and its picture. After an interruption the same command goes on: what is done is not run again.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import evaluate
from benchmarks.adaptation_report import fill_docs, report
from mala.cli import UserError, choose_device, run
from mala.generate import generate
from mala.running.distributed import World
from mala.storage.files import atomic_file, lock, read_json, write_json
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
ENGLISH = "eng_Latn"
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
    speed: bool = False  # measure how fast it writes
    scales: list[str] = field(default_factory=lambda: ["cores", "gpu"])
    seeds: dict[str, list[int]] = field(default_factory=dict)  # of a scale; default: 0


def read_arms(file: Path, name: str) -> tuple[dict[str, Any], list[Arm]]:
    """The settings of a scale, and its arms. Raises UserError for a key or a scale that is not known."""
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    if name not in table["scale"]:
        raise UserError(f"{file}: has no scale {name!r}, expected one of {', '.join(table['scale'])}")
    scale = table["scale"][name]
    try:
        arms = [Arm(key, **values) for key, values in table["arm"].items()]
    except TypeError as error:
        raise UserError(f"{file}: an arm has a key that is not known ({error})") from None
    for arm in arms:
        if arm.settings is not None:
            arm.settings = table["all"] | scale["settings"] | arm.settings
    return scale, [arm for arm in arms if name in arm.scales]


def write_text(data: Path, scale: dict[str, Any], out: Path) -> list[str]:
    """Write out/corpus, what arms train on, out/bible and out/declaration, what they are measured on, and
    out/replay, English from Python's own reference. Returns the languages."""
    files = {file.stem: file for file in sorted((data / "bible").glob("*.txt"))}
    languages = scale["languages"] or list(files)
    if missing := [language for language in languages if language not in files]:
        raise UserError(f"{data}/bible: has no {missing[0]}.txt")

    def write(name: str, lines: list[str]) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / name) as file:
            file.writelines(line + "\n" for line in lines)

    for language in languages:
        verses = files[language].read_text(encoding="utf-8").splitlines()
        end = len(verses) * 4 // 5
        later = verses[end:]
        chosen = later[:: max(1, len(later) // scale["test_documents"])][: scale["test_documents"]]
        write(f"corpus/{language}/train.txt", verses[:end][: scale["train_documents"]])
        write(f"corpus/{language}/test.txt", chosen)
        write(f"bible/{language}.txt", chosen)
    for language in [*languages, ENGLISH]:
        if (file := data / "udhr" / f"{language}.txt").exists():
            write(f"declaration/{language}.txt", file.read_text(encoding="utf-8").splitlines())
    english = list(dict.fromkeys(read_text()))
    write(f"replay/{ENGLISH}/train.txt", english[8:])
    write(f"replay/{ENGLISH}/test.txt", english[:8])
    return languages


def without_english(languages: list[str]) -> list[str]:
    return [language for language in languages if language != ENGLISH]


class Experiment:
    """All arms of a scale, in turn."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out
        self.scale, self.arms = read_arms(args.arms, args.scale)
        self.device, self.dtype = choose_device(self.scale["device"], self.scale["dtype"])
        self.languages = write_text(args.data, self.scale, self.out / "text")

    def run(self) -> dict[str, Any]:
        """Run and measure what is not done yet. Returns what adaptation.json holds."""
        found = {}
        for arm in self.arms:
            for seed in arm.seeds.get(self.args.scale, [0]) if arm.settings else [0]:
                key = f"{arm.name}-{seed}" if arm.settings else arm.name
                folder = self.out / "runs" / key
                folder.mkdir(parents=True, exist_ok=True)
                command = (
                    self.command(arm, seed, folder) if arm.settings else [str(vars(self.args)[arm.base])]
                )
                done = read_json(folder / "arm.json") if (folder / "arm.json").exists() else {}
                if not done:
                    began = time.perf_counter()
                    done = {"arm": arm.name, "what": arm.what, "seed": seed, "command": command}
                    done |= self.train(command, folder) if arm.settings else {}
                    done |= self.measure(arm, folder)
                    write_json(folder / "arm.json", done | {"seconds": time.perf_counter() - began})
                elif done["command"] != command:
                    raise UserError(f"{folder}: holds a run of another command; name another --out")
                found[key] = done
                bits = statistics.mean(one["bits_per_byte"] for one in done["bible"].values())
                print(f"{key}: {bits:.3f} bits a byte, mean of {len(self.languages)} languages", flush=True)
        machine = torch.cuda.get_device_name() if self.device != "cpu" else f"{os.cpu_count()} CPU cores"
        figures = {"scale": self.args.scale, "languages": self.languages, "machine": machine}
        figures |= {"torch": torch.__version__, "python": platform.python_version(), "arms": found}
        return figures

    def command(self, arm: Arm, seed: int, folder: Path) -> list[str]:
        """The command line of train.py."""
        settings = dict(arm.settings)
        if arm.steps_of:
            settings["steps"] = self.lines_of(self.out / "runs" / f"{arm.steps_of}-{seed}")[-1]["step"]
        if settings.pop("replay", False):
            settings["replay"] = self.out / "text/replay"
        settings |= {
            "model": vars(self.args)[arm.base],
            "data": self.out / "text/corpus",
            "out": folder / "train",
        }
        settings |= {"device": self.scale["device"], "dtype": self.scale["dtype"], "seed": seed}
        flags = []
        for name, value in settings.items():
            text = ",".join(value) if isinstance(value, list) else str(value)
            flags.append(f"--{name.replace('_', '-')}={text}")
        return ["train.py", *flags]

    def lines_of(self, folder: Path) -> list[dict[str, Any]]:
        text = (folder / "train/metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def train(self, command: list[str], folder: Path) -> dict[str, Any]:
        """Run train.py to its end, in a process of its own: its peak memory is the arm's."""
        with open(folder / "train.log", "a", encoding="utf-8") as log:
            words = [sys.executable, str(ROOT / command[0]), *command[1:]]
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
            try:
                process.wait()
            finally:  # an interruption: train.py saves a checkpoint
                process.terminate()
                process.wait()
        nll = folder / "train/nll.json"
        if process.returncode or not nll.exists() or "after" not in read_json(nll):
            ended = f"train.py ended with status {process.returncode} before its last step"
            raise UserError(f"{folder}/train.log: {ended}; its last lines say why")
        lines, speeds = self.lines_of(folder), []
        speeds = [line["tokens_per_second"] for line in lines if "first_step_seconds" not in line]
        speed = statistics.median(speeds or [lines[-1]["tokens_per_second"]])
        return {
            "steps": lines[-1]["step"],
            "tokens": lines[-1]["tokens"],
            "tokens_per_second": speed,
            "minutes": lines[-1]["tokens"] / speed / 60,
            "peak_memory_gb": max(line["peak_memory_gb"] for line in lines),
            "curve": [
                [line["tokens"], self.bits(line["languages"])] for line in lines if "languages" in line
            ],
        }

    def bits(self, nats: dict[str, float]) -> float:
        """The mean of the languages' bits per byte. nats: language -> nats a document, mean of the verses
        that train.py measures on the way, the first ones."""
        few, means = self.scale["settings"]["eval_documents"], []
        for language in self.languages:
            text = (self.out / f"text/bible/{language}.txt").read_text(encoding="utf-8")
            sizes = [len(verse.encode()) for verse in text.splitlines()[:few]]
            means.append(nats[language] / math.log(2) / statistics.mean(sizes))
        return statistics.mean(means)

    def bits_of(self, predictions: list[dict[str, Any]]) -> float:
        """The same of predictions of evaluate.py."""
        few, nats = self.scale["settings"]["eval_documents"], defaultdict(list)
        for one in predictions:
            if one["id"] < few:
                nats[one["lang"]].append(one["nll"])
        return self.bits({language: statistics.mean(values) for language, values in nats.items()})

    def measure(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """Bits per byte and tokens a word of both texts, speeds of reading and writing, the benchmarks."""
        model = folder / "train" if arm.settings else vars(self.args)[arm.base]
        texts = {name: self.evaluate(folder, model, "nll", name) for name in ("bible", "declaration")}
        base, adapter = find_model(str(model), None)
        tokenizer = load_tokenizer(base)
        found = {name: result["languages"] for name, result in texts.items()}
        for name, languages in found.items():
            for language, figures in languages.items():
                text = (self.out / f"text/{name}/{language}.txt").read_text(encoding="utf-8")
                figures["tokens_per_word"] = len(tokenizer.encode(text)) / len(text.split())
        read = sum(one["bytes"] for one in texts["bible"]["languages"].values())
        if not arm.settings:
            lines = (folder / "bible/predictions.jsonl").read_text(encoding="utf-8").splitlines()
            found["curve"] = [[0, self.bits_of([json.loads(line) for line in lines])]]
        found["bytes_read_per_second"] = read / texts["bible"]["seconds"]
        if arm.speed:
            found["tokens_written_per_second"] = self.write_speed(base, adapter, tokenizer)
        for bench in BENCHES if arm.few_shot else ():
            found[bench] = self.evaluate(folder, model, bench, None)["languages"]
            before, after = (self.out / "runs" / key / bench for key in ("base", folder.name))
            if before != after:
                found[f"{bench}_change"] = compare_runs(before, after, list)["languages"]
                found[f"{bench}_new"] = compare_runs(before, after, without_english)["macro"]
        return found

    def evaluate(self, folder: Path, model: Path, bench: str, text: str | None) -> dict[str, Any]:
        """evaluate.py, in this process: what its results.json holds."""
        data, out = (self.out / "text" / text if text else self.args.data / bench), folder / (text or bench)
        names = [language for language in [*self.languages, ENGLISH] if text or (data / language).is_dir()]
        of_task = {} if text else {"langs": tuple(names), "limit": self.scale["questions"]}
        settings = evaluate.Settings(bench=bench, model=str(model), data=str(data), out=str(out), **of_task)
        with open(folder / "evaluate.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            evaluate.evaluate(settings, data, self.dtype, World(device=self.device))
        return read_json(out / "results.json")

    def write_speed(self, base: Path, adapter: Path | None, tokenizer: Any) -> float:
        """Tokens a second that the model writes after the beginning of a verse, one sequence at a time."""
        model, _ = load_model(base, adapter, self.dtype, World(device=self.device))
        model.config.eos_token_id = None  # so that no text ends early
        verse = (self.out / f"text/bible/{self.languages[0]}.txt").read_text(encoding="utf-8").split("\n")[0]
        speeds = []
        for _ in range(3):
            began = time.perf_counter()
            count = len(list(generate(model, tokenizer.encode(verse)[:16], self.scale["written"], 0)))
            speeds.append(count / (time.perf_counter() - began))
        return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "twin", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--scale", default="cores", help="cores or gpu, of --arms")
    parser.add_argument("--arms", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--docs", type=Path, help="the folder of results.md, whose tables are replaced")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: train.py is told, too
    args.out.mkdir(parents=True, exist_ok=True)
    with lock(args.out):
        figures = Experiment(args).run()
        write_json(args.out / "adaptation.json", figures)
    tables = report(figures, args.out / "curves.png")
    for table in tables.values():
        print("\n" + table)
    if args.docs:
        fill_docs(args.docs, tables, args.out / "curves.png")


if __name__ == "__main__":
    run(main)
