"""A LLaMA tokenizer: a thin wrapper around a SentencePiece model file (`tokenizer.model`), or around a `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from mala.cli import UserError

WORD_START = "▁"  # how SentencePiece writes a space
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType in sentencepiece_model.proto


class Tokenizer:
    """Text to token ids and back.

    `model` keeps the file's bytes (a serialized `ModelProto`), since a tokenizer travels with every model that needs it.
    """

    def __init__(self, model: bytes, name: str = "tokenizer.model"):
        self.model = model
        self.name = name
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
            # Field 2 of a ModelProto is its TrainerSpec. It comes after the pieces: a file cut between two pieces lacks it.
            trainer_spec = b"".join(value for number, value in message_fields(model) if number == 2)
            if not trainer_spec:
                raise ValueError("no trainer_spec")
            self.model_type = MODEL_TYPES[dict(message_fields(trainer_spec)).get(3, 1)]
        except (RuntimeError, ValueError, TypeError, KeyError):
            raise UserError(f"{name}: truncated or no SentencePiece model ({len(model):,} bytes); download it again") from None
        self.bos_id: int = self.processor.bos_id()
        if self.bos_id < 0:
            raise UserError(f"{name}: the model has no beginning-of-sentence piece (<s>), which LLaMA needs")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """`path` is a `tokenizer.model`, or a folder that holds one."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.model"
        try:
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; expected a SentencePiece model") from None

    def __len__(self) -> int:
        return self.processor.get_piece_size()

    def check_fits(self, vocab_size: int) -> None:
        """Raise UserError where a token of this tokenizer would have no row among a model's `vocab_size`."""
        if len(self) > vocab_size:
            raise UserError(
                f"{self.name}: {len(self):,} pieces, but the model has {vocab_size:,} rows; "
                f"use the model's own tokenizer, or extend the model: python -m mala.vocab extend"
            )

    @cached_property
    def pieces(self) -> list[str]:
        try:
            return [self.processor.id_to_piece(i) for i in range(len(self))]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: damaged, a piece is not UTF-8 ({error}); download it again") from None

    def scores(self) -> dict[str, float]:
        """Piece -> score of all that text is made of: no control, unknown or byte pieces. In a BPE the higher merges first."""
        is_other = (self.processor.is_control, self.processor.is_unknown, self.processor.is_byte)
        return {
            piece: self.processor.get_score(i) for i, piece in enumerate(self.pieces) if not any(check(i) for check in is_other)
        }

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The pieces `<0x00>` … `<0xFF>`, in which characters are spelt that are no pieces."""
        return frozenset(i for i in range(len(self)) if self.processor.is_byte(i))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of one text, after `<s>` if `bos`. A `<s>` inside the text is text, never the control token."""
        return self.processor.encode(text, add_bos=bos)

    def encode_batch(self, texts: list[str], bos: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        return self.processor.encode(texts, add_bos=bos, num_threads=-1)

    def splits_at_spaces(self) -> bool:
        """Whether the tokens of a text, its words one space apart, are the tokens of its words.

        So it is in a BPE model that takes text as it is (NormalizerSpec: no precompiled_charsmap, field 2, and a space put
        before the text and kept, fields 3 and 5), of which no piece holds `▁` after another character, and that knows `▁` or
        bytes: unknown characters that are neighbours are one unknown token, across words, too.
        """
        fields = list(message_fields(self.model))
        normalizer = dict(message_fields(b"".join(value for number, value in fields if number == 3)))
        is_plain = not normalizer.get(2) and normalizer.get(3, 1) and normalizer.get(5, 1)
        # USER_DEFINED pieces (type 4, field 3 of a SentencePiece) are cut out before BPE begins, wherever they stand.
        types = (dict(message_fields(piece)).get(3, 1) for number, piece in fields if number == 1)
        pieces = self.scores()
        is_simple = 4 not in types and not any(WORD_START in piece.lstrip(WORD_START) for piece in pieces)
        is_known = WORD_START in pieces or len(self.byte_ids) == 256
        return self.model_type == "bpe" and bool(is_plain) and is_simple and is_known

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def segment(self, pieces: list[str]) -> list[list[int]]:
        """The segmentation of each piece's own text, `▁` being the space that it stands for; never empty.

        `encode` puts a word start before every text; here there must be none, since a piece may begin within a word. Field 3
        of a ModelProto is its NormalizerSpec and field 3 of that is `add_dummy_prefix`: appended, the last value (0) counts.
        """
        bare = Tokenizer(self.model + b"\x1a\x02\x18\x00", self.name)
        segments = bare.encode_batch([piece.replace(WORD_START, " ") for piece in pieces])
        if not all(segments):
            raise UserError(f"{self.name}: drops characters (its normalisation is not LLaMA's), so pieces have no segmentation")
        return segments


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, such as LLaMA 3's byte-level BPE, through the package `tokenizers`: text to ids and back, no more."""

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(f"{path}: a tokenizer.json takes the package tokenizers: pip install tokenizers") from None
        self.model, self.name = path.read_bytes(), str(path)
        try:
            self.fast = tokenizers.Tokenizer.from_str(self.model.decode())
        except Exception as error:  # the package raises nothing more particular
            raise UserError(f"{path}: truncated or no tokenizer.json ({str(error)[:200]}); download it again") from None
        # Traps: the file may ask for truncation and padding, and by default "</s>" in a text becomes the control token.
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True

    @cached_property
    def bos_id(self) -> int:
        """What begins a text, by `tokenizer_config.json` (`bos_token`), else by `config.json` (`bos_token_id`)."""
        for name, key in (("tokenizer_config.json", "bos_token"), ("config.json", "bos_token_id")):
            try:
                token = json.loads(Path(self.name).with_name(name).read_text(encoding="utf-8")).get(key)
            except (OSError, ValueError, AttributeError):
                continue
            token = token.get("content") if isinstance(token, dict) else token
            bos_id = self.fast.token_to_id(token) if isinstance(token, str) else token
            if type(bos_id) is int and 0 <= bos_id < len(self):
                return bos_id
        raise UserError(f"{self.name}: no usable bos_token in tokenizer_config.json nor bos_token_id in config.json beside it, "
                        "and a document begins with one; add it")  # fmt: skip

    def __len__(self) -> int:
        return 1 + max(self.fast.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: list[str], bos: bool = False) -> list[list[int]]:
        first = [self.bos_id] if bos else []
        return [first + encoding.ids for encoding in self.fast.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The `tokenizer.model` of a folder, else its `tokenizer.json`. Raises UserError where it has neither."""
    if not (folder / "tokenizer.model").exists() and (folder / "tokenizer.json").exists():
        return JsonTokenizer(folder / "tokenizer.json")
    return Tokenizer.from_pretrained(folder)


class WordPacker(dict):
    """A text's tokens as bytes, `<s>` first; a word's tokens are looked up where it has been seen before.

    This is several times faster than `encode` and the same to the bit: where no piece holds a word start `▁` after another
    character, BPE merges nothing across words. Where a text or a tokenizer is not so simple, `encode` has its way.
    dtype: uint16 or uint32, of the tokens, little-endian.
    """

    MAX_WORDS = 2**19  # about 100 MB

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        self.tokenizer, self.dtype = tokenizer, np.dtype(dtype).newbyteorder("<")
        self.bos = np.array([tokenizer.bos_id], self.dtype).tobytes()
        self.by_words = tokenizer.splits_at_spaces()

    def pack(self, text: str) -> bytes:
        if not self.by_words or "  " in text or WORD_START in text or text[:1] == " " or text[-1:] == " ":
            return np.array(self.tokenizer.encode(text, bos=True), self.dtype).tobytes()
        return self.bos + b"".join(map(self.__getitem__, text.split(" ")))

    def __missing__(self, word: str) -> bytes:
        if len(self) >= self.MAX_WORDS:
            self.clear()
        tokens = np.array(self.tokenizer.encode(word), self.dtype).tobytes()
        if len(word) < 64:  # a whole line of Thai is a word, too, but not one to come again
            self[word] = tokens
        return tokens


def message_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) for each field of a serialized protobuf message: integers as int, all else as bytes.

    Source: protobuf.dev, "Encoding". Raises ValueError where the message ends too soon.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(message):
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("the message ends within a number")

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        length = {1: lambda: 8, 2: varint, 5: lambda: 4}[wire_type]()
        if at + length > len(message):
            raise ValueError("the message ends within a field")
        yield number, message[at : at + length]
        at += length
