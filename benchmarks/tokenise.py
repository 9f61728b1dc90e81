"""Compare the speed of tokenising a corpus: mala.data and transformers' tokenizer in `datasets.map`, in MB/s.

    python benchmarks/tokenise.py --data CORPUS --tokenizer DIR [--rounds 3] [--processes 2]

DIR holds a `tokenizer.model` or a `tokenizer.json`. Both programs get the same lines, put the token that
begins a text before each, and write all tokens to the disk. `datasets.map` writes an Arrow table, which
Hugging Face's run_clm.py then groups into sequences in another pass; that pass is not counted. In each round
the two run one after the other, so each has the machine for itself. The table gives the medians. `datasets`
is not a dependency of the project: pip install datasets.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
# `datasets.map` already runs in several processes.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import mala.data  # noqa: E402
from mala.cli import UserError, run  # noqa: E402
from mala.data import file_digests, open_streams, tokenise  # noqa: E402
from mala.storage.corpus import Corpus  # noqa: E402
from mala.words.byte_level import load_tokenizer, reads_json  # noqa: E402
from tools.tables import print_table  # noqa: E402


def ours(corpus: Corpus, tokenizer: Path, folder: Path, processes: int) -> int:
    mala.data.cores = lambda: processes
    files = [file for files in corpus.files.values() for file in files]
    mala_tokenizer = load_tokenizer(tokenizer)
    tokenise(corpus, mala_tokenizer, file_digests(files, {}), folder)
    return sum(map(len, open_streams(corpus, folder).values()))


def theirs(corpus: Corpus, tokenizer: Path, folder: Path, processes: int) -> int:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    if reads_json(tokenizer):
        fast = transformers.AutoTokenizer.from_pretrained(tokenizer)
    else:
        fast = transformers.LlamaTokenizer.from_pretrained(tokenizer, legacy=True, add_bos_token=True)
    bos_id = load_tokenizer(tokenizer).bos_id
    lacks_bos = bos_id is not None and fast("a")["input_ids"][0] != bos_id  # no post_processor adds it

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = fast(rows["text"])["input_ids"]
        return {"input_ids": [[bos_id, *of_row] for of_row in ids] if lacks_bos else ids}

    files = [str(file) for files in corpus.files.values() for file in files]
    lines = datasets.load_dataset("text", data_files=files, split="train", cache_dir=str(folder))
    lines = lines.filter(lambda row: row["text"].strip() != "", num_proc=processes)
    started = time.perf_counter()
    table = lines.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
    # Count only the map. For us, reading the text is counted, too.
    theirs.seconds = time.perf_counter() - started
    return sum(len(ids) for batch in table.iter(1000) for ids in batch["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    corpus = Corpus(args.data, held_out=0)
    size = sum(file.stat().st_size for files in corpus.files.values() for file in files)
    times: dict[str, list[float]] = {"transformers in datasets.map": [], "mala.data": []}
    counts = {}
    for _ in range(args.rounds):
        for name, work in zip(times, (theirs, ours)):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                counts[name] = work(corpus, args.tokenizer, Path(folder), args.processes)
                times[name].append(getattr(work, "seconds", time.perf_counter() - started))
    if len(set(counts.values())) > 1:
        raise UserError(f"the two do not agree on the tokens: {counts}")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    slowest = medians["transformers in datasets.map"]
    print(
        f"{args.data}: {size / 1e6:.1f} MB, {len(corpus.languages)} languages, {counts['mala.data']:,} "
        f"tokens; {args.processes} processes, median of {args.rounds}"
    )
    print_table(
        ("", "seconds", "MB/s", "x datasets.map"),
        [
            (name, f"{seconds:.2f}", f"{size / seconds / 1e6:.1f}", f"{slowest / seconds:.2f}")
            for name, seconds in medians.items()
        ],
    )


if __name__ == "__main__":
    run(main)
