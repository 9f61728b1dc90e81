"""The paper's experiment on a real checkpoint: what does each part of the recipe contribute?

    python benchmarks/adaptation.py --model DIR --twin DIR --data DIR --out DIR [--scale gpu] [--docs docs]

- model, twin: SmolLM2-135M with its tokenizer.json, and with a SentencePiece tokenizer (smollm2.py).
- data: a folder with bible/, udhr/, sib200/ and taxi1500/.
- out: gets text/ (to train on and to measure), runs/ARM-SEED/ (the output of train.py and evaluate.py),
  adaptation.json (all figures) and curves.png. After an interruption, the same command continues.
- docs: the folder of results.md, whose tables and picture are replaced.

An arm of adaptation.toml is one run of train.py. It is measured on verses from the last fifth of each New
Testament, on the Universal Declaration of Human Rights (another domain, and English) and, if it has few_shot,
on SIB-200 and Taxi1500 with three shots. No arm trains on these texts, and no setting was chosen on them.
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
import timeit
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
    """A row of the table: a way to adapt the base, or the unchanged base if it has no `settings`."""

    name: str
    what: str  # its description in the tables
    base: str = "model"  # or twin
    settings: dict[str, Any] | None = None  # of train.py
    steps_of: str | None = None  # train for as many steps as this arm: equal compute
    few_shot: bool = False
    speed: bool = False  # measure how fast it reads and writes text
    scales: list[str] = field(default_factory=lambda: ["cores", "gpu"])
    seeds: dict[str, list[int]] = field(default_factory=dict)  # scale -> seeds; default: 0


def read_arms(file: Path, name: str) -> tuple[dict[str, Any], list[Arm]]:
    """Return the settings of scale `name`, and its arms. Raises UserError for a mistake in the table."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        scale = table["scale"].get(name)
        arms = [Arm(key, **values) for key, values in table["arm"].items()]
    except (KeyError, TypeError, ValueError) as error:
        found = f"is not a table of scales and arms ({error})"
        raise UserError(f"{file}: {found}; see benchmarks/adaptation.toml") from None
    if scale is None:
        raise UserError(f"{file}: has no scale {name!r}, expected one of {', '.join(table['scale'])}")
    arms = [arm for arm in arms if name in arm.scales]
    for number, arm in enumerate(arms):
        if arm.settings is not None:
            arm.settings = table.get("all", {}) | scale["settings"] | arm.settings
        if arm.steps_of and arm.steps_of not in [earlier.name for earlier in arms[:number]]:
            raise UserError(f"{file}: arm {arm.name}: no arm {arm.steps_of!r} runs before it; see steps_of")
    if arms[0].name != "base" or not (arms[0].few_shot and arms[0].speed):
        raise UserError(f"{file}: the first arm must be base, with few_shot and speed, for the comparisons")
    return scale, arms


def find_languages(data: Path, scale: dict[str, Any]) -> dict[str, Path]:
    """Return language -> file of its New Testament. Raises UserError if `data` lacks a folder or language."""
    for name in ("bible", "udhr", *BENCHES):
        if not (data / name).is_dir():
            raise UserError(f"{data / name}: there is no such folder; --data needs one with it")
    files = {file.stem: file for file in sorted((data / "bible").glob("*.txt"))}
    languages = scale["languages"] or files
    if missing := [language for language in languages if language not in files]:
        raise UserError(f"{data}/bible: has no {missing[0]}.txt, which the scale names; add it")
    return {language: files[language] for language in languages}


def write_text(languages: dict[str, Path], data: Path, scale: dict[str, Any], out: Path) -> None:
    """Write the texts of the experiment to the folder `out`:

    - corpus/: the training text (train.txt), and verses to measure during training (test.txt);
    - curve/: the verses of test.txt again, to measure them after training as well;
    - bible/ and declaration/: the other texts to measure after training;
    - replay/: English from Python's language reference.
    """

    def write(name: str, lines: list[str]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    with atomic_directory(out, replace=True) as folder:
        for language, file in languages.items():
            verses = file.read_text(encoding="utf-8").splitlines()
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


def digest(folder: Path) -> str:
    """Return the SHA-256 of a folder's files and their names."""
    content = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return content.hexdigest()


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Return the command-line flags for settings of train.py."""
    texts = {name: ",".join(value) if isinstance(value, list) else value for name, value in settings.items()}
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]


class Experiment:
    """All arms of a scale, run one after the other."""

    def __init__(self, args: argparse.Namespace):
        """Find mistakes in the table, the data and the bases before anything is written."""
        self.args, self.out = args, args.out
        self.scale, self.arms = read_arms(args.arms, args.scale)
        self.device, self.dtype = choose_device(self.scale["device"], self.scale["dtype"])
        for base in (args.model, args.twin):
            load_tokenizer(base)
        self.languages = find_languages(args.data, self.scale)
        for arm in self.arms:
            if arm.settings:
                parse(Settings, "", self.command(arm, 0, self.out, steps=1)[1:])

    def run(self) -> None:
        """Run and measure the arms that are not done yet. Write adaptation.json after each of them."""
        write_text(self.languages, self.args.data, self.scale, self.out / "text")
        of_scale = {name: self.scale[name] for name in ("questions", "written", "dtype", "device")}
        self.measured_on = of_scale | {"text": digest(self.out / "text"), "data": str(self.args.data)}
        runs, failed = {}, []
        machine = torch.cuda.get_device_name() if self.device != "cpu" else f"{os.cpu_count()} CPU cores"
        figures = {"scale": self.args.scale, "languages": list(self.languages), "machine": machine}
        figures |= {"torch": torch.__version__, "arms": runs}
        for arm in self.arms:
            seeds = arm.seeds.get(self.args.scale, [0]) if arm.settings else [None]
            for seed in seeds:
                key = arm.name if seed is None else f"{arm.name}-{seed}"
                try:
                    done = self.run_arm(arm, seed, key, is_first=seed == seeds[0])
                except UserError as error:  # the other arms still run
                    failed.append(str(error))
                    print(f"{key}: {error}", flush=True)
                    continue
                runs[key] = {"arm": arm.name, "what": arm.what, "base": arm.base, "seed": seed, **done}
                write_json(self.out / "adaptation.json", figures)
                bits = statistics.mean(one["bits_per_byte"] for one in done["bible"].values())
                print(f"{key}: {bits:.3f} bits per byte, mean of {len(self.languages)} languages", flush=True)
        if failed:
            raise UserError(f"{len(failed)} arms failed, the first: {failed[0]}")

    def run_arm(self, arm: Arm, seed: int | None, key: str, is_first: bool) -> dict[str, Any]:
        """Run and measure an arm, or read its arm.json if that is done. Return the figures. is_first: whether
        this is the arm's first seed, the only one that answers questions and is timed. Raises UserError if
        another command made arm.json."""
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
        """Return the command line of train.py. steps: how many, if the arm of `steps_of` has not run yet."""
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
        """Run train.py to its end in its own process, which has its own peak memory. Return the figures."""
        nll = folder / "train/nll.json"
        if not (nll.exists() and "after" in read_json(nll)):
            gc.collect()
            torch.cuda.empty_cache()  # train.py plans with the free memory
            with open(folder / "train.log", "a", encoding="utf-8") as log:
                words = [sys.executable, str(ROOT / command[0]), *command[1:]]
                process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
                try:
                    process.wait()
                finally:  # if interrupted, train.py saves a checkpoint
                    process.terminate()
                    process.wait()
            if process.returncode or "after" not in read_json(nll):
                ended = f"train.py ended with status {process.returncode} before its last step"
                raise UserError(f"{folder}/train.log: {ended}; its last lines say why")
        lines = self.lines_of(folder)
        speeds = [line["tokens_per_second"] for line in lines if "first_step_seconds" not in line]
        last, memory = lines[-1], max(line["peak_memory_gb"] for line in lines)
        speed = statistics.median(speeds or [last["tokens_per_second"]])
        figures = {"steps": last["step"], "tokens": last["tokens"], "tokens_per_second": speed}
        return figures | {"minutes": last["tokens"] / speed / 60, "peak_memory_gb": memory}

    def measure(self, arm: Arm, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
        """Return bits per byte and tokens per word of the texts, the curve, and what else is `asked`."""
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
        """Return points [tokens read, bits per byte of text/curve]. end: the figures after training."""
        lines = self.lines_of(folder) if (folder / "train").exists() else []
        points = []
        for line in lines:
            if "languages" in line:
                # On the same verses, bits per byte are proportional to nats.
                ratios = [line["languages"][one] / end[one]["nll_per_document"] for one in self.languages]
                bits = [ratio * end[one]["bits_per_byte"] for ratio, one in zip(ratios, self.languages)]
                points.append([line["tokens"], statistics.mean(bits)])
        last = statistics.mean(end[one]["bits_per_byte"] for one in self.languages)
        return [*points, [lines[-1]["tokens"] if lines else 0, last]]

    def evaluate(self, folder: Path, model: Path, bench: str, text: str | None) -> dict[str, Any]:
        """Run evaluate.py in this process and return its results.json. text: a folder of text/, for NLL."""
        data, out = (self.out / "text" / text if text else self.args.data / bench), folder / (text or bench)
        names = [language for language in [*self.languages, ENGLISH] if text or (data / language).is_dir()]
        of_task = {} if text else {"langs": tuple(names), "limit": self.scale["questions"]}
        settings = evaluate.Settings(bench=bench, model=str(model), data=str(data), out=str(out), **of_task)
        with open(folder / "evaluate.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            evaluate.evaluate(settings, data, self.dtype, World(device=self.device))
        return read_json(out / "results.json")

    def speeds(self, base: Path, adapter: Path | None) -> dict[str, float]:
        """Measure bytes of Bible verses read, and tokens written, per second, with the adapter merged. One
        sequence is written at a time. Each figure is the median of three tries after a warm-up."""
        model, tokenizer = load_model(base, adapter, self.dtype, World(device=self.device))
        if adapter:  # as `mala.lora merge` does
            merge_lora(model)
            model.to(self.dtype)
        model.config.eos_token_id = None  # no text ends early
        texts = [file.read_text(encoding="utf-8") for file in sorted((self.out / "text/bible").iterdir())]
        verses = [verse for text in texts for verse in text.splitlines()]
        prompt, written = tokenizer.encode(verses[0])[:16], self.scale["written"]

        def seconds(work: Callable[[], Any]) -> float:
            return statistics.median(timeit.repeat(work, number=1, repeat=4)[1:])

        read = seconds(lambda: predict_documents(model, tokenizer, "all", verses))
        write = seconds(lambda: list(generate(model, prompt, written, temperature=0)))
        size = sum(len(verse.encode()) for verse in verses)
        return {"bytes_read_per_second": size / read, "tokens_written_per_second": written / write}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "twin", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--scale", default="cores", help="a scale of --arms: cores or gpu [cores]")
    parser.add_argument("--arms", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--docs", type=Path, help="folder of results.md, whose tables are replaced")
    args = parser.parse_args()
    if args.docs:
        check_docs(args.docs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: train.py is stopped, too
    experiment = Experiment(args)
    with lock(args.out):
        experiment.run()
    tables = report(read_json(args.out / "adaptation.json"), args.out / "curves.png")
    for table in tables.values():
        print("\n" + table)
    if args.docs:
        fill_docs(args.docs, tables, args.out / "curves.png")


if __name__ == "__main__":
    run(main)
