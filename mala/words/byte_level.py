"""A `tokenizer.json`, read with the package `tokenizers`. If it is a byte-level BPE, it can be extended.

GPT-2 and LLaMA 3 use a byte-level BPE. A pre-tokenizer cuts the text into words. The bytes of each word are
written in an alphabet of 256 printable characters and merged pair by pair, in the order of a list. So no
character is unknown, but a token may end within a character. Source: huggingface.co/docs/tokenizers.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from mala.cli import UserError
from mala.words.tokenizer import Tokenizer

Pair = tuple[str, str]  # the left and the right piece of a merge
MAX_BYTES = 48  # of a new piece: 16 characters, as in SentencePiece, of three bytes each
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]  # written as U+0100, U+0101, …
ALPHABET = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


class JsonTokenizer(Tokenizer):
    """Converts text to token ids and back. model: the file's bytes; name: its path, or a name for errors."""

    def __init__(self, model: bytes, name: str = "tokenizer.json"):
        self.model, self.name = model, name
        # This silences a warning at a fork (mala/data.py). It is safe: forked processes encode text by text.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            import tokenizers

            self.fast = tokenizers.Tokenizer.from_str(model.decode())
        except ImportError:
            raise UserError(f"{name}: reading it requires tokenizers: pip install tokenizers") from None
        except Exception as error:  # the package raises only plain Exceptions
            found = f"truncated or not a tokenizer.json ({str(error)[:200]})"
            raise UserError(f"{name}: {found}; download it again") from None
        # Traps: the file may ask for truncation and padding; "</s>" in a text would become the control token.
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True

    @cached_property
    def bos_id(self) -> int | None:
        """The token that begins a text: `bos_token` of `tokenizer_config.json`, else `bos_token_id` of
        `config.json`, else None. Without it, the first token of a document's text is not predicted."""
        for name, key in (("tokenizer_config.json", "bos_token"), ("config.json", "bos_token_id")):
            try:
                token = json.loads(Path(self.name).with_name(name).read_text(encoding="utf-8")).get(key)
            except (OSError, ValueError, AttributeError):
                continue
            token = token.get("content") if isinstance(token, dict) else token
            bos_id = self.fast.token_to_id(token) if isinstance(token, str) else token
            if type(bos_id) is int and 0 <= bos_id < len(self):
                return bos_id
        found = "neither tokenizer_config.json nor config.json in its folder names a token that begins a text"
        print(f"{self.name}: {found}; documents get no such token", file=sys.stderr)
        return None

    @cached_property
    def pieces(self) -> list[str]:
        """All pieces, by id; "" for an unused id."""
        ids = self.fast.get_vocab(with_added_tokens=True)
        pieces = {id: piece for piece, id in ids.items()}
        return [pieces.get(id, "") for id in range(1 + max(pieces))]

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The ids of pieces that are not text by themselves: bytes and other parts of characters."""
        return frozenset(id for id, piece in enumerate(self.pieces) if to_text(piece) is None)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        ids = self.fast.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_batch(self, texts: list[str], bos: bool = False) -> list[list[int]]:
        first = [self.bos_id] if bos and self.bos_id is not None else []
        return [first + encoding.ids for encoding in self.fast.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids)

    def check_bpe(self) -> None:
        """Raise UserError unless this is a byte-level BPE that further merges can extend."""
        content, kind = json.loads(self.model), type(self.fast.model).__name__
        normalizer, steps = content.get("normalizer") or {}, json.dumps(content.get("pre_tokenizer"))
        faults = {
            f"a {kind} model": kind != "BPE",
            "no ByteLevel step in its pre_tokenizer": '"ByteLevel"' not in steps,
            f"a normalizer ({normalizer.get('type')})": normalizer.get("normalizers", normalizer),
        }
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            faults[f"{key} {content['model'].get(key)!r}"] = content["model"].get(key)
        for fault in (fault for fault, is_there in faults.items() if is_there):
            expected = "a byte-level BPE that leaves text unchanged, such as LLaMA 3's"
            remedy = "extend the model's tokenizer.model, if it has one, or train with --extend-vocab 0"
            raise UserError(f"{self.name}: has {fault}, expected {expected}; {remedy}")

    @cached_property
    def cut_out(self) -> re.Pattern:
        """A pattern for the added tokens that are cut out of a text first. Special tokens are not cut out."""
        added = self.fast.get_added_tokens_decoder().values()
        return re.compile("|".join(re.escape(one.content) for one in added if not one.special) or "(?!)")

    def words(self, text: str) -> Iterator[str]:
        """Yield the words of a text, in the alphabet of bytes. No merge crosses the border of a word."""
        for part in self.cut_out.split(text):
            yield from (word for word, _ in self.fast.pre_tokenizer.pre_tokenize_str(part))

    def segment(self, pieces: list[str]) -> list[list[int]]:
        """Segment each piece as a word, into token ids. An added token is plain text, not in the alphabet."""
        merged, is_added = self.fast.model.tokenize, re.compile(f"[^{re.escape(''.join(ALPHABET))}]").search
        return [self.encode(one) if is_added(one) else [token.id for token in merged(one)] for one in pieces]


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.model` or a `tokenizer.json`. In a folder, a SentencePiece model takes precedence."""
    file = path / "tokenizer.json" if path.is_dir() and reads_json(path) else path
    if file.suffix == ".json" and file.is_file():
        return JsonTokenizer(file.read_bytes(), str(file))
    return Tokenizer.from_pretrained(path)


def reads_json(folder: Path) -> bool:
    """Return whether a folder's tokenizer is its `tokenizer.json`: it holds no SentencePiece model."""
    model = folder / "tokenizer.model"
    has_model = model.is_file() and model.read_bytes()[:1] == b"\x0a"  # a ModelProto; LLaMA 3's is not
    return (folder / "tokenizer.json").exists() and not has_model


def to_text(piece: str) -> str | None:
    """Return the text of a piece in the alphabet of bytes, or None if it is part of a character."""
    try:
        return bytes(ALPHABET[character] for character in piece).decode()
    except KeyError:  # an added token is plain text
        return piece
    except UnicodeDecodeError:
        return None


class Pairs:
    """The merge rules of a byte-level BPE: each pair of its list in turn, everywhere in a word. known: all
    pieces of the base. With `ignore_merges` (LLaMA 3), a word that is a piece needs no merges."""

    def __init__(self, known: Iterable[str], ignore_merges: bool):
        self.known, self.takes_words = set(known), ignore_merges

    def joinable(self, left: str, right: str) -> bool:
        return True  # the base's pre-tokenizer has already cut the text into words

    def candidates(self, symbols: list[str]) -> Iterator[tuple[Pair, int]]:
        """Yield (pair, 1) for each place where a new piece could arise and save 1 token. A pair that makes a
        known piece is no candidate, so text without new pieces is segmented as before."""
        for left, right in zip(symbols, symbols[1:]):
            if len(left) + len(right) <= MAX_BYTES and left + right not in self.known:
                yield (left, right), 1

    def learn(self, pair: Pair) -> None:
        self.known.add("".join(pair))

    def merge(self, symbols: list[str], pair: Pair) -> list[str]:
        """Merge `pair` in symbols that all earlier merges have been applied to."""
        union, merged, places = "".join(pair), [], iter(range(len(symbols)))
        if self.takes_words and "".join(symbols) == union:
            return [union]
        for i in places:
            is_pair = tuple(symbols[i : i + 2]) == pair
            merged.append(union if is_pair else symbols[i])
            if is_pair:
                next(places)
        return merged


def append_pairs(base: JsonTokenizer, pairs: list[Pair]) -> bytes:
    """Return the base's file with a new piece for each pair. New ids and merges follow all old ones."""
    content = json.loads(base.model)
    model = content["model"]
    # Trap: an added token that `vocab` lacks gets the id after the last of `vocab`, whatever the file says.
    model["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    model["vocab"] |= {left + right: id for id, (left, right) in enumerate(pairs, len(base))}
    are_strings = any(isinstance(merge, str) for merge in model["merges"][:1])  # "a b", in older files
    model["merges"] += [" ".join(pair) if are_strings else list(pair) for pair in pairs]
    return json.dumps(content, ensure_ascii=False).encode()
