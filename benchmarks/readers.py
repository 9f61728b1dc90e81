"""How many lines of a corpus other programs cut otherwise than SentencePiece does.

    python benchmarks/readers.py --base BASE --data CORPUS,CORPUS [--size 4000]

For each way to merge: AutoTokenizer of transformers and the package `tokenizers` on what we write, and on
`tokenizer.model` alone beside LLaMA 2's own tokenizer_config.json, as we left it before.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizers
import transformers

from mala.storage.corpus import Corpus
from mala.storage.tokenizer_files import copy_tokenizer
from mala.vocab import continue_merges, count_words, merge, sample, train_pieces
from mala.words.tokenizer import Tokenizer
from tools.tables import print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, help="corpora, the first is learnt from")
    parser.add_argument("--size", type=int, default=4000)
    args = parser.parse_args()
    folders = args.data.split(",")
    base = Tokenizer.from_pretrained(args.base)
    words = count_words(sample(Corpus(folders[0]).stream("train"), 0.3, 0, draws=20_000))
    corpora = [Corpus(folder, held_out=1).load("test") for folder in folders]
    texts = [text for corpus in corpora for of_language in corpus.values() for text in of_language]
    new, rows = Tokenizer(train_pieces(words, args.size)), []
    models = {"continue": continue_merges(base, words, args.size), "union": merge(base, new)}
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
            copy_tokenizer(Path(args.base), folder, len(merged), merged)
            counts.append(differences(transformers.AutoTokenizer.from_pretrained(folder), texts, expected))
            fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
            counts.append(sum(ours.ids != ids for ours, ids in zip(fast, expected)))
        tokens = sum(map(len, expected))
        rows.append((name, f"{len(merged):,}", f"{tokens:,}", *(f"{count:,}" for count in counts)))
    print(
        f"{len(texts):,} lines; transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    )
    print_table(("lines cut otherwise", "pieces", "tokens", "before", "AutoTokenizer", "tokenizers"), rows)


def differences(tokenizer: transformers.PreTrainedTokenizerBase, texts: list, expected: list) -> int:
    """How many of the texts have other ids."""
    ids = tokenizer(texts, return_attention_mask=False)["input_ids"]
    return sum(ours != theirs for ours, theirs in zip(ids, expected))


if __name__ == "__main__":
    main()
