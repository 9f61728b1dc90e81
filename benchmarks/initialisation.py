"""Measure how well a checkpoint predicts held-out text after its vocabulary is extended, before any training.

    python benchmarks/initialisation.py --model DIR --data CORPUS [--size 8000] [--documents 20] [--langs a,b]

For each way to initialise the new rows (`--init` of `python -m mala.vocab extend`) it prints bits per byte:
the mean over the languages, and the least and largest value. The vocabulary is learnt on the train split,
`calibrated` is fitted on it, and the test split is measured.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mala.cli import run
from mala.model import Llama
from mala.scoring import nll_by_language
from mala.storage.corpus import Corpus
from mala.vocab import count_words, sample, train_pieces
from mala.words.further_merges import continue_merges
from mala.words.merges_and_scores import merge
from mala.words.new_rows import INITS, extend_model
from mala.words.tokenizer import Tokenizer
from tools.tables import print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--langs", default="")
    parser.add_argument("--size", type=int, default=8000, help="pieces to learn")
    parser.add_argument("--method", choices=["continue", "union"], default="continue")
    parser.add_argument("--documents", type=int, default=20, help="documents to measure per language")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    corpus = Corpus(args.data, tuple(args.langs.split(",")) if args.langs else ())
    train = corpus.load("train")
    test = {language: texts[: args.documents] for language, texts in corpus.load("test").items()}
    base, words = Tokenizer.from_pretrained(args.model), count_words(sample(train, 0.3, seed=0))
    if args.method == "union":
        merged = Tokenizer(merge(base, Tokenizer(train_pieces(words, args.size))))
    else:
        merged = Tokenizer(continue_merges(base, words, args.size))

    rows = {
        "no extension": nll_by_language(
            Llama.from_pretrained(args.model, torch.float32), base, test, "no extension"
        )
    }
    for init in INITS:
        model = Llama.from_pretrained(args.model, torch.float32)
        start = time.perf_counter()
        extend_model(model, base, merged, init, 0, sample(train, 0.3, seed=0))
        seconds = time.perf_counter() - start
        rows[init] = {**nll_by_language(model, merged, test, init), "seconds": seconds}
    documents = sum(map(len, test.values()))
    print(f"{len(base):,} pieces -> {len(merged):,}; {len(test)} languages, {documents:,} documents")

    def row(name: str, result: dict) -> list[str]:
        bits = [figures["bits_per_byte"] for figures in result["languages"].values()]
        return [
            name,
            f"{result['macro']['bits_per_byte']:.3f}",
            f"{min(bits):.2f}",
            f"{max(bits):.2f}",
            f"{result['macro']['nll_per_document']:.1f}",
            f"{result.get('seconds', 0):.1f}",
        ]

    print_table(
        ("--init", "bits per byte", "least", "largest", "nats per document", "seconds to extend"),
        [row(name, result) for name, result in rows.items()],
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
