"""SentencePiece's `tokenizer.model`, which LLaMA 2 uses. For `tokenizer.json`, see byte_level.py.

A `tokenizer.model` is a serialized protobuf message `ModelProto { repeated SentencePiece pieces = 1; ... }`
with `SentencePiece { string piece = 1; float score = 2; Type type = 3; }` (sentencepiece_model.proto). Two
concatenated messages are one, with all pieces of both, so appending bytes adds pieces.
"""

import re
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import sentencepiece

from mala.cli import UserError

WORD_START = "▁"  # how SentencePiece writes a space
TRAINER_SPEC, NORMALIZER_SPEC = 2, 3  # field numbers in a ModelProto
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")  # a line has a token's bytes in base64 and its rank
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # ModelType, field 3 of a TrainerSpec


class Tokenizer:
    """Converts text to token ids and back. model: the file's bytes, kept to be saved with every model."""

    def __init__(self, model: bytes, name: str = "tokenizer.model"):
        self.model, self.name = model, name
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
            trainer_spec = self.specification(TRAINER_SPEC)
            if not trainer_spec:  # it follows the pieces: a file cut between two pieces lacks it
                raise ValueError
            self.model_type = MODEL_TYPES[trainer_spec.get(3, 1)]
        except (RuntimeError, ValueError, TypeError, KeyError):
            if TIKTOKEN.match(model):
                found = "a tiktoken file like LLaMA 3's, expected a SentencePiece model or tokenizer.json"
                remedy = "download the hub's tokenizer.json, or convert this file as docs/vocabulary.md shows"
                raise UserError(f"{name}: {found}; {remedy}") from None
            found = f"truncated or not a SentencePiece model ({len(model):,} bytes)"
            raise UserError(f"{name}: {found}; download it again") from None
        self.bos_id: int | None = self.processor.bos_id()
        if self.bos_id < 0:
            raise UserError(f"{name}: the model has no beginning-of-sentence piece (<s>), which LLaMA needs")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Load a `tokenizer.model`. path: the file, or a folder that holds it."""
        path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        try:
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; expected a SentencePiece model") from None

    def __len__(self) -> int:
        return self.processor.get_piece_size()

    def specification(self, number: int) -> dict[int, int | bytes]:
        """Return the fields of the model's TRAINER_SPEC or NORMALIZER_SPEC."""
        parts = [value for field, value in message_fields(self.model) if field == number]
        return dict(message_fields(b"".join(parts)))

    def check_fits(self, rows: int) -> None:
        """Raise UserError if a model's `rows` are fewer than this tokenizer's pieces."""
        if len(self) > rows:
            remedy = "use the model's own tokenizer, or extend the model: python -m mala.vocab extend"
            raise UserError(f"{self.name}: {len(self):,} pieces, but the model has {rows:,} rows; {remedy}")

    def check_extends(self, base: "Tokenizer") -> None:
        """Raise UserError unless this tokenizer begins with all pieces of `base`, in order."""
        if self.pieces[: len(base)] != base.pieces:
            raise UserError(f"{self.name}: does not begin with the pieces of {base.name}, expected them all")

    def check_bpe(self) -> None:
        """Raise UserError unless this is a BPE model. Its scores give the order of merges."""
        if self.model_type != "bpe":
            raise UserError(f"{self.name}: a {self.model_type} model, expected a BPE model like LLaMA's")

    @cached_property
    def pieces(self) -> list[str]:
        try:
            return self.processor.id_to_piece(list(range(len(self))))
        except UnicodeDecodeError:
            raise UserError(f"{self.name}: damaged, a piece is not UTF-8; download it again") from None

    @cached_property
    def types(self) -> list[int]:
        """Each piece's type: NORMAL (1), UNKNOWN (2), CONTROL (3), USER_DEFINED (4), UNUSED (5), BYTE (6)."""
        pieces = (value for field, value in message_fields(self.model) if field == 1)
        return [dict(message_fields(piece)).get(3, 1) for piece in pieces]

    def scores(self) -> dict[str, float]:
        """Return piece -> score for the pieces that hold text: no control, unknown or byte pieces."""
        kept = [id for id, kind in enumerate(self.types) if kind in (1, 4, 5)]
        return {self.pieces[id]: self.processor.get_score(id) for id in kept}

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The ids of `<0x00>` … `<0xFF>`. These pieces spell characters that are not pieces themselves."""
        return frozenset(id for id, kind in enumerate(self.types) if kind == 6)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Return a text's token ids, after `<s>` if `bos`. "<s>" in a text is text, not the control token."""
        return self.processor.encode(text, add_bos=bos)

    def encode_batch(self, texts: list[str], bos: bool = False) -> list[list[int]]:
        """Encode many texts, on all cores."""
        return self.processor.encode(texts, add_bos=bos, num_threads=-1)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([id for id in ids if id < len(self)])  # a model may have more rows

    @staticmethod
    def words(text: str) -> Iterator[str]:
        """Yield the words of a text, the parts between spaces. No merge crosses the border of a word."""
        for line in text.splitlines():  # SentencePiece learns from single lines
            # A tab would end the word in train_pieces. SentencePiece reserves ▅ and drops lines with it.
            yield from line.replace("\t", " ").replace("▅", " ").split(" ")

    def segment(self, pieces: list[str]) -> list[list[int]]:
        """Return the token ids of each piece as a part of a text, with spaces for `▁`. A piece that the
        normaliser removes is segmented without the normaliser, so no result is empty."""
        texts = [piece.replace(WORD_START, " ") for piece in pieces]
        # A piece may begin within a word, so no space is added before it, and its own spaces are not removed.
        as_part, as_it_stands = b"\x1a\x04\x18\x00\x20\x00", b"\x1a\x06\x18\x00\x20\x00\x12\x00"
        segments = Tokenizer(self.model + as_part, self.name).encode_batch(texts)
        if not all(segments):
            plain = Tokenizer(self.model + as_it_stands, self.name).encode_batch(texts)
            segments = [segment or other for segment, other in zip(segments, plain)]
        return segments

    def normalise(self, texts: list[str]) -> list[str]:
        """Return each text as it is before segmentation, with `▁` for spaces and no word start before it."""
        # Private-use characters around a text keep the spaces at its ends, and combine with nothing.
        normal = self.processor.normalize([f"\ue000{text}\ue000" for text in texts])
        return [text.partition("\ue000")[2].rpartition("\ue000")[0] for text in normal]


def append_pieces(base: Tokenizer, scores: dict[str, float]) -> bytes:
    """Return the base's ModelProto plus the pieces, in order, of type NORMAL (the default, not written)."""
    model = bytearray(base.model)
    for piece, score in scores.items():
        text = piece.encode()
        message = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
        model += b"\x0a" + _varint(len(message)) + message
    return bytes(model)


def _varint(value: int) -> bytes:
    """Encode a protobuf varint: seven bits per byte, the lowest first. The top bit says that more follow."""
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + _varint(value // 128)


def message_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) for each field of a serialized protobuf message: int for integers, else bytes.
    Source: protobuf.dev, "Encoding". Raises ValueError if the message ends too soon."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        if at > len(message):
            raise ValueError("the message ends within a field")
        return message[at - size : at]

    def varint() -> int:
        byte = take(1)[0]
        return byte if byte < 128 else byte - 128 + 128 * varint()

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        else:
            yield number, take(varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type])
