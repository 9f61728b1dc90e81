"""Count the lines of a corpus that other programs tokenise differently from us.

    python benchmarks/readers.py --base BASE --data CORPUS,CORPUS [--sizes 4000]

The other programs are transformers' AutoTokenizer and the package `tokenizers`. They read the folder that we
write.

- A base with a `tokenizer.model` gets a row for each way to merge. The column "before" is AutoTokenizer with
  that file and LLaMA 2's own tokenizer_config.json, which is all that we wrote in the past.
- A base with a `tokenizer.json` has one way to merge. More is counted: lines that do not decode to
  themselves; lines without a new token, and how many of them get other ids than from the base; new tokens
  that no text encodes to, and base tokens that became so; special tokens with another id.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizers
import transformers

from mala.storage.corpus import Corpus
from mala.storage.corpus_formats import read_documents
from mala.storage.tokenizer_files import write_extended
from mala.vocab import count_words, sample, train_pieces
from mala.words.byte_level import JsonTokenizer, load_tokenizer
from mala.words.further_merges import continue_merges
from mala.words.merges_and_scores import merge
from mala.words.tokenizer import Tokenizer
from tools.fertility import unreachable
from tools.tables import print_table

SENTENCEPIECE = ("before", "AutoTokenizer", "tokenizers")
MUST_BE_0 = ("AutoTokenizer", "tokenizers", "decoded", "than base", "unreachable", "lost", "moved")
BYTE_LEVEL = ("without new", *MUST_BE_0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, help="corpora; the vocabulary is learnt from the first")
    parser.add_argument("--sizes", default="4000", help="pieces of the new model; tokenizer.json: to add")
    args = parser.parse_args()
    base = load_tokenizer(Path(args.base))
    is_json, rows = isinstance(base, JsonTokenizer), []
    corpora = [Corpus(folder, held_out=0 if is_json else 0.2) for folder in args.data.split(",")]
    draws = None if is_json else 20_000  # from the first corpus; None: as many as it has documents
    words = count_words(sample(corpora[0].stream("train"), 0.3, 0, draws), base.words)
    files = [file for corpus in corpora for files in corpus.files.values() for file in files]
    texts = [text for file in files for text in read_documents(file)]
    for size in map(int, args.sizes.split(",")):
        rows += (byte_level if is_json else sentencepiece)(base, words, size, texts)
    print(
        f"{len(texts):,} lines; transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    )
    print_table(
        ("lines with other ids", "pieces", "tokens", *(BYTE_LEVEL if is_json else SENTENCEPIECE)),
        [(name, *(f"{count:,}" for count in counts)) for name, *counts in rows],
    )


def sentencepiece(base: Tokenizer, words: Counter, size: int, texts: list[str]) -> list[tuple]:
    """Return a row for each way to merge: its name, pieces, tokens, differences."""
    new, rows = Tokenizer(train_pieces(words, size)), []
    models = {"continue": continue_merges(base, words, size), "union": merge(base, new)}
    models["union, --published"] = merge(base, new, published=True)
    for name, model in models.items():
        merged, counts = Tokenizer(model), []
        expected = merged.encode_batch(texts, bos=True)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "tokenizer.model").write_bytes(model)
            own = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
            (folder / "tokenizer_config.json").write_text(json.dumps(own))
            counts.append(differences(transformers.AutoTokenizer.from_pretrained(folder), texts, expected))
            write_extended(Path(base.name).parent, base, merged, folder)
            counts.append(differences(transformers.AutoTokenizer.from_pretrained(folder), texts, expected))
            fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
            counts.append(sum(ours.ids != ids for ours, ids in zip(fast, expected)))
        rows.append((name, len(merged), sum(map(len, expected)), *counts))
    return rows


def differences(tokenizer: transformers.PreTrainedTokenizerBase, texts: list, expected: list) -> int:
    """Count the texts that get other ids than `expected`."""
    ids = tokenizer(texts, return_attention_mask=False)["input_ids"]
    return sum(ours != theirs for ours, theirs in zip(ids, expected))


def byte_level(base: JsonTokenizer, words: Counter, size: int, texts: list[str]) -> list[tuple]:
    """Return one row: its name, pieces, tokens, lines without a new token, and the counts of MUST_BE_0."""
    merged, counts = JsonTokenizer(continue_merges(base, words, size), base.name), Counter()
    with tempfile.TemporaryDirectory() as folder:
        write_extended(Path(base.name).parent, base, merged, Path(folder))
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        fast = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    for start in range(0, len(texts), 10_000):  # the encodings of all lines would fill the memory
        lines = texts[start : start + 10_000]
        by_auto = auto(lines, add_special_tokens=False)["input_ids"]
        by_fast = fast.encode_batch(lines, add_special_tokens=False)
        answers = zip(lines, merged.encode_batch(lines), base.encode_batch(lines), by_auto, by_fast)
        for line, ids, by_base, ids_of_auto, encoding in answers:
            counts["tokens"] += len(ids)
            counts["AutoTokenizer"] += ids_of_auto != ids
            counts["tokenizers"] += encoding.ids != ids
            counts["decoded"] += merged.decode(ids) != line
            counts["without new"] += max(ids) < len(base)
            counts["than base"] += max(ids) < len(base) and ids != by_base
    lost, old = set(unreachable(merged)), set(base.pieces)
    counts["unreachable"], counts["lost"] = len(lost - old), len(lost & old - set(unreachable(base)))
    for id, token in base.fast.get_added_tokens_decoder().items():
        ids = (auto.convert_tokens_to_ids(token.content), fast.token_to_id(token.content))
        counts["moved"] += ids != (id, id)
    return [(f"continue, {size:,} more", len(merged), counts["tokens"], *(counts[key] for key in BYTE_LEVEL))]


if __name__ == "__main__":
    main()
