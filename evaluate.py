"""Measure a LLaMA checkpoint, with or without an adapter, per language.

    python evaluate.py --bench nll                                              what `python train.py` left, on the bundled text
    python evaluate.py --bench nll --model DIR --adapter DIR --data CORPUS

Without --data the benchmark is looked for in $MALA_DATA/<bench>, then data/<bench>; where there is none, the bundled sample
is measured. results.json and predictions.jsonl are left in --out.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mala.checkpoint import atomic_file, read_json, write_json
from mala.cli import UserError, choose_device, option, parse, print_table, run
from mala.corpus import Corpus
from mala.lora import load_adapter
from mala.model import Llama
from mala.scoring import documents_nll, summarise, with_macro
from mala.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "assets/demo"


@dataclass
class Settings:
    bench: str = option("nll", "what to measure: nll, the negative log-likelihood of documents", choices=("nll",))
    model: str | None = option(None, "a checkpoint, or a folder that train.py left; default: out/demo, else assets/tiny-llama")
    adapter: str | None = option(None, "a LoRA adapter in PEFT's format; its tokenizer.model goes before the model's")
    data: str | None = option(None, "a corpus, a folder with one entry per language")
    langs: tuple[str, ...] = option((), "measure these languages only")
    split: str = option("test", "which split, where the corpus has splits", choices=("train", "dev", "test"))
    held_out: float = option(1.0, "last share of each language's documents that is measured, where the corpus has no splits")
    max_held_out: int = option(1000, "at most this many of them, as in train.py; with a share of 1 all are measured")
    limit: int | None = option(None, "measure at most this many documents a language")
    out: str = option("out/nll", "where the results go")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the weights and the computation; auto: float32 on a CPU, else bfloat16",
                        choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}, expected a positive number")


def find_data(settings: Settings) -> Path:
    if settings.data is not None:
        return Path(settings.data)
    places = [Path(os.environ["MALA_DATA"])] if "MALA_DATA" in os.environ else []
    for place in [*places, Path("data")]:
        if (place / settings.bench).is_dir():
            return place / settings.bench
    return DEMO / "sib200"


def find_model(settings: Settings) -> tuple[Path, Path | None]:
    """The folders of the base checkpoint and of the adapter, if there is one."""
    model = Path(settings.model) if settings.model else Path("out/demo")
    if not settings.model and not (model / "adapter").is_dir():
        model = ROOT / "assets/tiny-llama"
    adapter = Path(settings.adapter) if settings.adapter else None
    if adapter and not settings.model:  # the adapter's own base, where it names one that is here
        named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        return Path(named) if isinstance(named, str) and Path(named).is_dir() else model, adapter
    if (model / "adapter").is_dir():  # a folder that train.py left
        adapter = adapter or model / "adapter"
        if (model / "base").is_dir():
            return model / "base", adapter
        return Path(read_json(model / "adapter/adapter_config.json").get("base_model_name_or_path") or model), adapter
    return model, adapter


def load(base: Path, adapter: Path | None, settings: Settings) -> tuple[Llama, Tokenizer]:
    device, dtype = choose_device(settings.device, settings.dtype)
    model = Llama.from_pretrained(base, dtype, device)
    tokenizer_in = base
    if adapter is not None:
        load_adapter(model, adapter)
        if (adapter / "tokenizer.model").exists():
            tokenizer_in = adapter
    tokenizer = Tokenizer.from_pretrained(tokenizer_in)
    tokenizer.check_fits(model.config.vocab_size)
    return model, tokenizer


def main() -> None:
    settings = parse(Settings, __doc__.split("\n\n")[0])
    started = time.perf_counter()
    data = find_data(settings)
    is_sample = DEMO in [data.resolve(), *data.resolve().parents]
    notice = f"{data} is a bundled sample of machine-written text: its figures are no score of any benchmark"
    if is_sample:
        print(notice)

    documents = Corpus(data, settings.langs, settings.held_out, settings.max_held_out).load(settings.split)
    documents = {language: texts[: settings.limit] for language, texts in documents.items()}
    base, adapter = find_model(settings)
    model, tokenizer = load(base, adapter, settings)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)

    scoring = time.perf_counter()
    languages = {}
    with atomic_file(out / "predictions.jsonl") as predictions:
        for language, texts in tqdm(documents.items(), desc=settings.bench, unit="language", leave=False, disable=None):
            nll, tokens = documents_nll(model, tokenizer, texts)
            for number, (document_nll, document_tokens) in enumerate(zip(nll, tokens)):
                line = {"lang": language, "id": number, "nll": document_nll, "tokens": document_tokens}
                predictions.write(json.dumps(line) + "\n")
            languages[language] = summarise(texts, nll, tokens)
    result = with_macro(languages)
    seconds, scoring_seconds = time.perf_counter() - started, time.perf_counter() - scoring
    examples = sum(len(texts) for texts in documents.values())
    write_json(out / "results.json", {
        "bench": settings.bench, "data": str(data), "sample": is_sample, "model": str(base),
        "adapter": str(adapter) if adapter else None, "shots": None, "seed": None, "split": settings.split, **result,
        "seconds": seconds, "examples_per_second": examples / scoring_seconds,
    })  # fmt: skip

    keys = ("nll_per_document", "nll_per_token", "bits_per_byte")
    rows = [(language, str(scores["documents"]), *(f"{scores[key]:.2f}" for key in keys))
            for language, scores in [*result["languages"].items(),
                                     ("macro-average", {"documents": examples, **result["macro"]})]]  # fmt: skip
    print_table(("language", "documents", "NLL/document", "NLL/token", "bits/byte"), rows)
    print(f"{base}{f' + {adapter}' if adapter else ''}: {len(documents)} languages, {examples:,} documents, {seconds:.0f} s; "
          f"NLL in nats; {out / 'results.json'}")  # fmt: skip
    if is_sample:
        print(notice)


if __name__ == "__main__":
    run(main)
