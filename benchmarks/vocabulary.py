"""Compare the two ways to extend a vocabulary, `union` and `continue`, with the same number of added pieces.

    python benchmarks/vocabulary.py --base BASE --data CORPUS [--sizes 8000,32000] [--json FILE]

The last 20 % of each language's documents, at most 1,000, are held out; both ways learn from the others.
Fertility and unreachable pieces are those of tools/fertility.py. A base with a `tokenizer.json` has no union:
only `continue` is measured, and --sizes are the numbers of pieces to add. Memory is the peak of the process
until the end of the learning.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mala.cli import run
from mala.storage.corpus import Corpus
from mala.vocab import count_words, sample, train_pieces
from mala.words.byte_level import JsonTokenizer, load_tokenizer
from mala.words.further_merges import continue_merges
from mala.words.merges_and_scores import merge
from mala.words.tokenizer import Tokenizer
from tools.fertility import fertility_report
from tools.run_log import peak_memory
from tools.tables import print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--sizes", default="8000,32000", help="pieces of the union's new model; with a tokenizer.json: to add"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    base, corpus = load_tokenizer(Path(args.base)), Corpus(args.data)
    every, held_out = Corpus(args.data, held_out=1).stream("test"), corpus.load("test")
    start = time.perf_counter()
    words = count_words(sample(corpus.stream("train"), 0.3, seed=0), base.words)
    print(f"{len(words):,} distinct words counted in {time.perf_counter() - start:.0f} s")

    rows, counted = [], peak_memory("cpu")
    methods = ("continue",) if isinstance(base, JsonTokenizer) else ("union", "continue")
    for size in map(int, args.sizes.split(",")):
        added = size
        for method in methods:
            start = time.perf_counter()
            if method == "union":
                merged = Tokenizer(merge(base, Tokenizer(train_pieces(words, size))))
                added = len(merged) - len(base)
            else:
                merged = type(base)(continue_merges(base, words, added))
            seconds, memory = time.perf_counter() - start, peak_memory("cpu")
            report, unseen = fertility_report(base, merged, every), fertility_report(base, merged, held_out)
            if not rows:
                rows.append(
                    {
                        "method": "base",
                        "new": 0,
                        "seconds": 0.0,
                        "memory": counted,
                        **report["pieces"],
                        "added": 0,
                        "unreachable_added": 0,
                        "fertility": report["macro"]["base"]["fertility"],
                        "held_out": unseen["macro"]["base"]["fertility"],
                    }
                )
            rows.append(
                {
                    "method": method,
                    "seconds": seconds,
                    "memory": memory,
                    **report["pieces"],
                    "fertility": report["macro"]["new"]["fertility"],
                    "held_out": unseen["macro"]["new"]["fertility"],
                }
            )
    columns = (
        "added",
        "unreachable",
        "of the base",
        "fertility, all text",
        "held-out text",
        "seconds to learn",
        "peak GB so far",
    )
    print_table(
        ("method", *columns),
        [
            (
                r["method"],
                f"{r['added']:,}",
                f"{r['unreachable_added']:,}",
                f"{r['unreachable_new'] - r['unreachable_added'] if r['added'] else r['unreachable_base']:,}",
                f"{r['fertility']:.3f}",
                f"{r['held_out']:.3f}",
                f"{r['seconds']:.1f}",
                f"{r['memory'] / 1e9:.2f}",
            )
            for r in rows
        ],
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
