"""Extend a LLaMA vocabulary to new languages: learn pieces, add them to a base, initialise their rows.

    python -m mala.vocab merge  --base BASE --data CORPUS --size 16000 --out merged.model
    python -m mala.vocab train  --data CORPUS --size 250000 --out new.model
    python -m mala.vocab merge  --method union --base BASE --new new.model --out merged.model
    python -m mala.vocab report --base BASE --new merged.model --data CORPUS
    python -m mala.vocab extend --model BASE --tokenizer merged.model --out DIR

BASE is a folder with a `tokenizer.model` or a `tokenizer.json`. For the latter, `merge` writes a folder.
"""

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np
import sentencepiece

from mala.cli import UserError, run
from mala.storage.corpus import language_shares
from mala.words.tokenizer import Tokenizer

MAX_WORDS = 10_000_000  # distinct words held in memory: about 2 GB; learning takes several times that
MAX_LINE = 4192  # bytes; by default SentencePiece drops longer lines
NFKC = sentencepiece.SentencePieceNormalizer(
    rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
)
Texts = Mapping[str, Collection[str]]  # language -> its documents
WordsOf = Callable[[str], Iterable[str]]  # text -> its words


def sample(documents: Texts, alpha: float, seed: int, draws: int | None = None) -> Iterator[tuple[str, int]]:
    """Yield (document, times drawn), in about `draws` draws. The default is the number of documents. A
    language's share is proportional to n^alpha, n being its number of documents. A small language's documents
    are repeated, a large one's are sampled. Each is read once, so the corpus may be larger than memory."""
    sizes = [len(texts) for texts in documents.values()]
    counts = np.ceil(language_shares(sizes, alpha) * (draws or sum(sizes))).astype(int).tolist()
    rng = np.random.default_rng(seed)
    for texts, count in zip(documents.values(), counts):
        times, wanted = divmod(count, len(texts))
        for left, text in zip(range(len(texts), 0, -1), texts):
            if not times and not wanted:
                break
            # Selection sampling: choose `wanted` of the `left` remaining documents (Knuth, TAOCP 3.4.2, S).
            chosen = rng.random() * left < wanted
            wanted -= chosen
            if times + chosen:
                yield text, times + int(chosen)


def count_words(drawn: Iterable[tuple[str, int]], words_of: WordsOf = Tokenizer.words) -> Counter[str]:
    """Return word -> how often it occurs in the drawn documents. BPE learns from these counts alone.
    words_of: a tokenizer's `words`, or `published_words`. Beyond MAX_WORDS, the rarest words are dropped."""
    words: Counter[str] = Counter()
    for text, times in drawn:
        for word in words_of(text):
            words[word] += times
        if len(words) > MAX_WORDS:
            words = Counter(dict(words.most_common(MAX_WORDS // 2)))
    words.pop("", None)
    return words


def published_words(text: str) -> Iterator[str]:
    """Yield a text's words by SentencePiece's defaults: normalised (nmt_nfkc), no lines over MAX_LINE."""
    lines = (line for line in text.splitlines() if len(line.encode()) <= MAX_LINE)
    return Tokenizer.words("\n".join(map(NFKC.normalize, lines)))


def train_pieces(words: Counter[str], size: int, published: bool = False, standalone: bool = False) -> bytes:
    """Train a SentencePiece BPE of `size` pieces; return its serialized ModelProto. LLaMA 2's settings leave
    text unchanged; `published` takes SentencePiece's defaults, as in MaLA-500. Every character gets a piece;
    if `standalone`, rare ones are spelled in bytes. Raises UserError if there are too few words."""
    if not words:
        raise UserError(f"cannot learn {size} pieces from this corpus: it holds no words")
    if size < 4:
        raise UserError(f"cannot learn {size} pieces: <unk>, <s> and </s> are 3 of them; ask for more")
    settings = {"model_type": "bpe", "vocab_size": size, "input_format": "tsv", "minloglevel": 2}
    if not published:
        settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        settings |= {"allow_whitespace_only_pieces": True, "split_digits": True, "max_sentence_length": 2**30}
        settings |= {"character_coverage": 0.99995 if standalone else 1.0, "byte_fallback": standalone}
    lines, model = (f"{word}\t{count}" for word, count in words.items()), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    except (RuntimeError, ValueError) as error:  # its text says how many pieces the corpus yields or needs
        why = " ".join(str(error).rpartition("] ")[2].split())
        raise UserError(f"cannot learn {size} pieces from this corpus; SentencePiece says: {why}") from None
    return model.getvalue()


if __name__ == "__main__":
    from tools.vocab_commands import main

    run(main)
