"""A `tokenizer.json`, read by the package `tokenizers`; a byte-level BPE among them can be extended.

In such a BPE, GPT-2's and LLaMA 3's, a pre-tokenizer cuts a text into words. The bytes of a word, written in
an alphabet of 256 printable characters, are merged pair by pair, in the order of a list. So no character is
unknown, and a token may end within one. Source: huggingface.co/docs/tokenizers.
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

Pair = tuple[str, str]  # two tokens, the left one first
MAX_BYTES = 48  # of a new token: 16 characters, as for SentencePiece, of three bytes each
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]  # for these stand U+0100 and on
ALPHABET = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


class JsonTokenizer(Tokenizer):
    """Text to token ids and back. `model` holds the file's bytes; other files lie beside `name`."""

    def __init__(self, model: bytes, name: str = "tokenizer.json"):
        self.model, self.name = model, name
        # Else a fork, as in mala/data.py, warns and ends it. Forked processes encode text by text, alone.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            import tokenizers

            self.fast = tokenizers.Tokenizer.from_str(model.decode())
        except ImportError:
            raise UserError(f"{name}: a tokenizer.json takes the package: pip install tokenizers") from None
        except Exception as error:  # the package raises nothing more particular
            found = f"truncated or no tokenizer.json ({str(error)[:200]})"
            raise UserError(f"{name}: {found}; download it again") from None
        # Traps: the file may ask for truncation and padding, and "</s>" in a text becomes the control token.
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True

    @cached_property
    def bos_id(self) -> int | None:
        """What begins a text: `bos_token` of `tokenizer_config.json`, else `bos_token_id` of `config.json`,
        else nothing: then the first token of a document's own is not predicted."""
        for name, key in (("tokenizer_config.json", "bos_token"), ("config.json", "bos_token_id")):
            try:
                token = json.loads(Path(self.name).with_name(name).read_text(encoding="utf-8")).get(key)
            except (OSError, ValueError, AttributeError):
                continue
            token = token.get("content") if isinstance(token, dict) else token
            bos_id = self.fast.token_to_id(token) if isinstance(token, str) else token
            if type(bos_id) is int and 0 <= bos_id < len(self):
                return bos_id
        found = "neither tokenizer_config.json nor config.json beside it names a token that begins a text"
        print(f"{self.name}: {found}; a document begins with its first token", file=sys.stderr)
        return None

    @cached_property
    def pieces(self) -> list[str]:
        """By id; "" for an id that no token has."""
        ids = self.fast.get_vocab(with_added_tokens=True)
        pieces = {id: piece for piece, id in ids.items()}
        return [pieces.get(id, "") for id in range(1 + max(pieces))]

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The tokens that are no text by themselves: bytes and other parts of characters."""
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
        """Raise UserError if this is no BPE of bytes, on which further merges can be learnt."""
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
            expected = "a byte-level BPE that takes text as it is, such as LLaMA 3's"
            remedy = "extend the model's tokenizer.model, if it has one, or train it with --extend-vocab 0"
            raise UserError(f"{self.name}: has {fault}, expected {expected}; {remedy}")

    @cached_property
    def cut_out(self) -> re.Pattern:
        """What finds the added tokens that are cut out of a text first; special ones are not."""
        added = self.fast.get_added_tokens_decoder().values()
        return re.compile("|".join(re.escape(one.content) for one in added if not one.special) or "(?!)")

    def words(self, text: str) -> Iterator[str]:
        """The parts of a text that no merge crosses, in the alphabet of bytes."""
        for part in self.cut_out.split(text):
            yield from (word for word, _ in self.fast.pre_tokenizer.pre_tokenize_str(part))

    def segment(self, pieces: list[str]) -> list[list[int]]:
        """The tokens of each piece as a word of its own. One that was added is text, not in the alphabet."""
        merged, is_added = self.fast.model.tokenize, re.compile(f"[^{re.escape(''.join(ALPHABET))}]").search
        return [self.encode(one) if is_added(one) else [token.id for token in merged(one)] for one in pieces]


def load_tokenizer(path: Path) -> Tokenizer:
    """From a `tokenizer.model`, a `tokenizer.json`, or a folder; a SentencePiece model there goes first."""
    file = path / "tokenizer.json" if path.is_dir() and reads_json(path) else path
    if file.suffix == ".json" and file.is_file():
        return JsonTokenizer(file.read_bytes(), str(file))
    return Tokenizer.from_pretrained(path)


def reads_json(folder: Path) -> bool:
    """Whether `tokenizer.json` counts: no SentencePiece model lies beside it (LLaMA 3's .model is none)."""
    model = folder / "tokenizer.model"
    has_model = model.is_file() and model.read_bytes()[:1] == b"\x0a"  # as a ModelProto begins
    return (folder / "tokenizer.json").exists() and not has_model


def to_text(piece: str) -> str | None:
    """The text of a token in the alphabet of bytes; None if it is part of a character."""
    try:
        return bytes(ALPHABET[character] for character in piece).decode()
    except KeyError:  # an added token: it is text
        return piece
    except UnicodeDecodeError:
        return None


class Pairs:
    """How such a BPE merges: neighbours that stand in its list of pairs, pair by pair, in all of a word. If
    `ignore_merges` (LLaMA 3), a word that is a token is taken at once. known: all tokens of the base."""

    def __init__(self, known: Iterable[str], ignore_merges: bool):
        self.known, self.takes_words = set(known), ignore_merges

    def joinable(self, left: str, right: str) -> bool:
        return True  # the base's own pre-tokenizer has cut the text

    def candidates(self, symbols: list[str]) -> Iterator[tuple[Pair, int]]:
        """(pair, 1 token that it saves) for each place where a new token may arise. A pair that makes a known
        token is none: text without a new token is cut as before."""
        for left, right in zip(symbols, symbols[1:]):
            if len(left) + len(right) <= MAX_BYTES and left + right not in self.known:
                yield (left, right), 1

    def learn(self, pair: Pair) -> None:
        self.known.add("".join(pair))

    def merge(self, symbols: list[str], pair: Pair) -> list[str]:
        """Encode on symbols in which nothing could be merged until `pair` came."""
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
    """The base's file with a token for each pair, their ids after all ids, their merges after all merges."""
    content = json.loads(base.model)
    model = content["model"]
    # Trap: an added token that is not in `vocab` gets the id that follows there, whatever the file says.
    model["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    model["vocab"] |= {left + right: id for id, (left, right) in enumerate(pairs, len(base))}
    are_strings = any(isinstance(merge, str) for merge in model["merges"][:1])  # "a b", as older files have
    model["merges"] += [" ".join(pair) if are_strings else list(pair) for pair in pairs]
    return json.dumps(content, ensure_ascii=False).encode()
