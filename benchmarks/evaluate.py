"""Examples per second of the few-shot evaluation, beside the published procedure, tests/published.py.

    python benchmarks/evaluate.py --data DIR    DIR holds SIB-200's eng_Latn; else the bundled sample is taken

The model has the shape of SmolLM2-135M and random weights: 30 layers, width 576, 9 query and 3 key/value
heads, V 49,152. Both sides take the same weights, the same texts and the same cores, in turn; the published
one at several batch sizes, of which the best counts. If the package lm-eval is installed,
lm-evaluation-harness is measured, too, from the same token ids. Text is encoded by --tokenizer; with another
than the model's own its ids stand for as many tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import published  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from mala.benchmarks.tasks import SIB200  # noqa: E402
from mala.model import Llama, LlamaConfig  # noqa: E402
from mala.scoring import encode_published, loglikelihoods  # noqa: E402
from mala.words.tokenizer import Tokenizer  # noqa: E402
from tools.tables import print_table  # noqa: E402

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "assets/demo/sib200")
    parser.add_argument(
        "--tokenizer", default=ROOT / "assets/tiny-llama", help="a tokenizer.model, or its folder"
    )
    parser.add_argument("--examples", type=int, default=16, help="per measurement")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    model = Llama(SHAPE)
    model.init_weights(0)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    task = SIB200(args.data)
    examples = task.examples("eng_Latn")[: args.examples]
    encoded = encode_published(tokenizer, examples, task.labels)
    tokens = sum(len(context) for context, _ in encoded) / len(encoded)

    def ours() -> list[list[float]]:
        asked = task.examples("eng_Latn")[: args.examples]
        return loglikelihoods(model, encode_published(tokenizer, asked, task.labels))

    def theirs(batch_size: int) -> list[list[float]]:
        rows = published.evaluate(
            reference,
            tokenizer.encode,
            args.data,
            "sib200",
            "eng_Latn",
            limit=args.examples,
            batch_size=batch_size,
        )
        return [list(row["loglikelihoods"].values()) for row in rows]

    peers = [(f"published, batches of {n}", lambda n=n: theirs(n)) for n in args.batch_sizes]
    if harness := lm_evaluation_harness(reference, args.tokenizer):
        requests = [
            (("", ""), context, labels) for context, continuations in encoded for labels in continuations
        ]

        def theirs_too(batch_size: int) -> list[list[float]]:
            harness.batch_size_per_gpu = batch_size
            scores = [score for score, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
            return [scores[i : i + len(task.labels)] for i in range(0, len(scores), len(task.labels))]

        peers += [
            (f"lm-evaluation-harness, batches of {n}", lambda n=n: theirs_too(n)) for n in args.batch_sizes
        ]

    seconds: dict[str, list[float]] = {}
    differences: dict[str, float] = {}
    for warm in range(args.repeats + 1):
        for name, measure in [("mala", ours), *peers]:
            began = time.perf_counter()
            scores = measure()
            if warm:  # a first round is not counted
                seconds.setdefault(name, []).append(time.perf_counter() - began)
            if name == "mala":
                expected = scores
            differences[name] = max(
                abs(a - b) for row, other in zip(expected, scores) for a, b in zip(row, other)
            )
    speed = {name: len(examples) / statistics.median(times) for name, times in seconds.items()}
    best = max(value for name, value in speed.items() if name.startswith("published"))
    versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{len(examples)} examples of eng_Latn, 3 shots, {tokens:.0f} tokens of context on average, float32, "
        f"{torch.get_num_threads()} threads, {versions}, tokenizer {args.tokenizer}"
    )
    print_table(
        ("", "examples/s", "of the best published", "largest difference, nats"),
        [
            (name, f"{value:.2f}", f"{value / best:.2f} x", f"{differences[name]:.1e}")
            for name, value in speed.items()
        ],
    )


def lm_evaluation_harness(model: transformers.LlamaForCausalLM, tokenizer: str | Path) -> Any:
    """The harness's own model class around the same weights, if the package lm-eval is installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError:
        return None
    return HFLM(
        pretrained=model, tokenizer=transformers.LlamaTokenizer.from_pretrained(tokenizer), max_length=2048
    )


if __name__ == "__main__":
    main()
