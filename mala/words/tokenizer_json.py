"""A SentencePiece BPE model as a `tokenizer.json`, for transformers and the package `tokenizers`.

Source: huggingface.co/docs/tokenizers, and the files that transformers writes.
"""

import base64
from typing import Any

from mala.words.tokenizer import NORMALIZER_SPEC, WORD_START, Tokenizer

Object = dict[str, Any]  # of JSON


def to_json(tokenizer: Tokenizer, added: dict[int, str], before: list[int], after: list[int]) -> Object:
    """The content of the file that gives the model's ids, with the tokens `before` and `after` each text.
    added: id -> text of tokens that are not the model's. Trap: after a user-defined symbol, which LLaMA has
    none of, `tokenizers` begins a word anew and SentencePiece does not."""
    pieces, types = tokenizer.pieces, tokenizer.types

    def token(id: int, content: str, special: bool) -> Object:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": id, "content": content, **plain, "special": special}

    # UNKNOWN (2) and CONTROL (3) pieces are special; USER_DEFINED ones (4) are cut out of a text.
    tokens = [token(id, pieces[id], kind != 4) for id, kind in enumerate(types) if kind in (2, 3, 4)]
    tokens += [token(id, content, True) for id, content in added.items()]

    def template(text: str, type_id: int) -> list[Object]:
        parts = [("SpecialToken", pieces[id]) for id in before] + [("Sequence", text)]
        parts += [("SpecialToken", pieces[id]) for id in after]
        return [{kind: {"id": name, "type_id": type_id}} for kind, name in parts]

    special = {pieces[id]: {"id": pieces[id], "ids": [id], "tokens": [pieces[id]]} for id in before + after}
    templates = {"single": template("A", 0), "pair": template("A", 0) + template("B", 1)}
    steps, decoders = normalisation(tokenizer.specification(NORMALIZER_SPEC))
    model = {"type": "BPE", "dropout": None, "unk_token": pieces[tokenizer.processor.unk_id()]}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True}
    model |= {"byte_fallback": len(tokenizer.byte_ids) == 256, "ignore_merges": False}
    model |= {"vocab": {piece: id for id, piece in enumerate(pieces)}, "merges": merges(tokenizer)}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens}
    content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    content["post_processor"] = {"type": "TemplateProcessing", **templates, "special_tokens": special}
    return content | {"decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


def merges(tokenizer: Tokenizer) -> list[list[str]]:
    """Every way to cut a piece in two pieces, the highest score first. Trap: SentencePiece merges pieces of
    equal scores from left to right, and no list says that; so what we write has no equal scores."""
    scores = tokenizer.scores()
    ranked = sorted(scores, key=lambda piece: -scores[piece])  # stable: of equal ones the lower id
    cuts = [(piece[:at], piece[at:]) for piece in ranked for at in range(1, len(piece))]
    return [[left, right] for left, right in cuts if left in scores and right in scores]


def normalisation(spec: Object) -> tuple[list[Object], list[Object]]:
    """What a NormalizerSpec does to a text, and what takes it back."""
    steps: list[Object] = []
    if spec.get(2):  # precompiled_charsmap: NFKC or the like
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec[2]).decode()})
    if spec.get(4, 1):  # remove_extra_whitespaces
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    decoders = [{"type": "Replace", "pattern": {"String": WORD_START}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.get(3, 1):  # add_dummy_prefix
        steps.append({"type": "Prepend", "prepend": WORD_START})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return [*steps, spaces], decoders
