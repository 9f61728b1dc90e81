"""A LLaMA tokenizer: a thin wrapper around a SentencePiece model file (`tokenizer.model`)."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from mala.cli import UserError


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
        except RuntimeError:
            raise UserError(f"{name}: not a SentencePiece model ({len(model)} bytes); download it again") from None
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

    @property
    def pieces(self) -> list[str]:
        return [self.processor.id_to_piece(i) for i in range(len(self))]

    def scores(self) -> dict[str, float]:
        """Piece -> score of all that text is made of: no control, unknown or byte pieces. In a BPE the higher merges first."""
        is_other = (self.processor.is_control, self.processor.is_unknown, self.processor.is_byte)
        return {
            piece: self.processor.get_score(i) for i, piece in enumerate(self.pieces) if not any(check(i) for check in is_other)
        }

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of one text, after `<s>` if `bos`. A `<s>` inside the text is text, never the control token."""
        return self.processor.encode(text, add_bos=bos)

    def encode_batch(self, texts: list[str], bos: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        return self.processor.encode(texts, add_bos=bos, num_threads=-1)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)
