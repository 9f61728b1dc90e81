"""The two ways to extend a vocabulary, `union` and `continue`, with the same number of added pieces.

    python benchmarks/vocabulary.py --base tokenizer.model --data CORPUS [--sizes 8000,32000] [--json FILE]

Both learn from the first 80 % of each language's documents. Fertility is tokens per word between spaces, the mean over the
languages; a piece is unreachable if no text encodes to it (see mala/bpe.py).
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mala.cli import print_table, run
from mala.data import Corpus
from mala.tokenizer import Tokenizer
from mala.vocab import continue_merges, merge, sample, segment, train_pieces


def fertility(tokenizer: Tokenizer, documents: dict[str, list[str]]) -> float:
    rates = [
        sum(map(len, tokenizer.encode_batch(texts))) / sum(len(text.split()) for text in texts) for texts in documents.values()
    ]
    return sum(rates) / len(rates)


def unreachable(merged: Tokenizer, first: int) -> int:
    segments = segment(merged, merged.pieces[first:])
    return sum(ids != [piece] for piece, ids in enumerate(segments, first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--sizes", default="8000,32000")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    base, corpus = Tokenizer.from_pretrained(args.base), Corpus(args.data)
    train, test = corpus.load("train"), corpus.load("test")
    every = {language: train[language] + test.get(language, []) for language in train}
    results = [{"method": "base", "added": 0, "unreachable": 0, "fertility": fertility(base, every),
                "held_out": fertility(base, test), "seconds": 0.0}]  # fmt: skip
    for size in map(int, args.sizes.split(",")):
        added = 0
        for method in ("union", "continue"):
            start = time.perf_counter()
            documents = sample(train, 0.3, seed=0)
            if method == "union":
                merged = Tokenizer(merge(base, Tokenizer(train_pieces(documents, size))))
                added = len(merged) - len(base)
            else:
                merged = Tokenizer(continue_merges(base, documents, added))
            results.append({"method": method, "added": len(merged) - len(base), "unreachable": unreachable(merged, len(base)),
                            "fertility": fertility(merged, every), "held_out": fertility(merged, test),
                            "seconds": time.perf_counter() - start})  # fmt: skip
    print_table(
        ("method", "added pieces", "unreachable", "fertility, all text", "held-out text", "seconds"),
        [(r["method"], f"{r['added']:,}", f"{r['unreachable']:,}", f"{r['fertility']:.3f}", f"{r['held_out']:.3f}",
          f"{r['seconds']:.0f}") for r in results],
    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
