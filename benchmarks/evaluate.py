"""Measure the speed of the few-shot evaluation against the published procedure, tests/published.py.

    python benchmarks/evaluate.py --data DIR    DIR holds SIB-200's eng_Latn; default: the bundled sample
    python benchmarks/evaluate.py --data DIR --tokenizer DIR --shape tinyllama-1.1b     on a GPU, in bfloat16

The model has random weights and the shape of SmolLM2-135M: 30 layers, hidden_size 576, 9 query and 3
key/value heads, V 49,152. Both sides get the same weights, texts and cores, and take turns. The published
procedure is measured at several batch sizes, and the best one counts. If the package lm-eval is installed,
lm-evaluation-harness is measured as well, from the same token ids. Any --tokenizer with at most V pieces
will do: the weights are random, so only the number of tokens matters.

With --shape, or if there is a GPU, other shapes are measured instead (by default 1.1 and 7 billion
parameters), with compiled blocks, and the NLL of documents as well. The published procedure then gets fewer
examples. --shape demo tries this out on a CPU.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import published  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from mala.benchmarks.tasks import SIB200  # noqa: E402
from mala.model import Llama, LlamaConfig  # noqa: E402
from mala.scoring import documents_nll, encode_published, loglikelihoods, trees  # noqa: E402
from mala.storage.config_json import to_config_json  # noqa: E402
from mala.storage.corpus import Corpus  # noqa: E402
from mala.words.tokenizer import Tokenizer  # noqa: E402
from tools.gpus import peak_flops  # noqa: E402
from tools.known_models import init_weights, named  # noqa: E402
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


# Shape -> (rows of embed_tokens and lm_head, number of examples for the published procedure).
GPU_SHAPES = {"tinyllama-1.1b": (32000, 64), "llama-2-7b": (260164, 24), "demo": (32000, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "assets/demo/sib200")
    parser.add_argument(
        "--tokenizer", default=ROOT / "assets/tiny-llama", help="tokenizer.model, or its folder"
    )
    parser.add_argument("--shape", nargs="+", choices=GPU_SHAPES, default=[])
    parser.add_argument("--examples", type=int, help="examples per measurement [16; with --shape: all]")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="[1 2 4 8 16; with --shape: 8 32]")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.shape or torch.cuda.is_available():
        args.batch_sizes = args.batch_sizes or [8, 32]
        for shape in args.shape or ["tinyllama-1.1b", "llama-2-7b"]:
            measure_shape(args, shape)
            torch._dynamo.reset()  # another shape's blocks must not count as recompilations
            gc.collect()
            torch.cuda.empty_cache()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
    else:
        args.examples, args.batch_sizes = args.examples or 16, args.batch_sizes or [1, 2, 4, 8, 16]
        measure_on_a_cpu(args)


@torch.no_grad()
def measure_shape(args: argparse.Namespace, shape: str) -> None:
    """Print the tables of one of GPU_SHAPES, with random weights in bfloat16."""
    began = time.perf_counter()
    rows, few = GPU_SHAPES[shape]
    model = random_model(named(shape, vocab_size=rows))
    of_head = model.lm_head.weight.numel()
    of_blocks = sum(parameter.numel() for parameter in model.model["layers"].parameters())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = peak_flops(gpu)

    def share(tokens: int, predicted: int, seconds: float) -> str:
        """Format the share of peak FLOP/s: two FLOPs per weight and token, without attention's products."""
        flops = 2 * (of_blocks * tokens + of_head * predicted) / seconds
        return f"{flops / peak:.1%}" if peak else f"{flops / 1e12:.2f} TFLOP/s"

    tokenizer, task = Tokenizer.from_pretrained(args.tokenizer), SIB200(args.data)
    examples = task.examples("eng_Latn")[: args.examples]
    few = min(few, len(examples))
    encoded = encode_published(tokenizer, examples)
    read = sum(len(stem) + len(tokens) for (stem, _), (tokens, _), _ in trees(encoded, max_length=2048))
    predicted = sum(len(ids) for _, labels in encoded for ids in labels)
    ours = partial(loglikelihoods, model, encoded)
    scores, speed, of_peak = {}, {}, {}
    scores["ours"], first, seconds = timed(ours, args.repeats)
    speed["ours"], of_peak["ours"] = len(examples) / seconds, share(read, predicted, seconds)
    with torch.compiler.set_stance("force_eager"):
        name = "ours, not compiled"
        scores[name], _, seconds = timed(ours, 1)
        speed[name], of_peak[name] = len(examples) / seconds, share(read, predicted, seconds)

    documents = Corpus(args.data, ["eng_Latn"]).load("train")["eng_Latn"]
    long = [" ".join(documents[start : start + 20]) for start in range(0, len(documents), 20)]
    nll = []
    for kind, texts in (("sentences", documents), ("20 sentences each", long)):
        (_, counts), _, seconds = timed(partial(documents_nll, model, tokenizer, texts), args.repeats)
        rates = f"{len(texts) / seconds:.1f}", f"{sum(counts) / seconds:,.0f}"
        nll.append((kind, str(len(texts)), *rates, share(sum(counts), sum(counts), seconds)))
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0

    reference = as_transformers(model)
    for size in args.batch_sizes:
        name = f"published, batches of {size}"
        what = (reference, tokenizer.encode, args.data, "sib200", "eng_Latn")
        try:
            found, _, seconds = timed(partial(published.evaluate, *what, limit=few, batch_size=size), 1)
        except torch.OutOfMemoryError:
            print(f"{shape}, {name}: out of memory")
            continue
        scores[name] = [list(line["loglikelihoods"].values()) for line in found]
        speed[name] = few / seconds
    del reference, what

    exact, of_what = scores["ours"], "ours"
    if of_blocks < 2e9:  # it fits in float32, too
        with torch.compiler.set_stance("force_eager"):
            exact, of_what = loglikelihoods(model.float(), encoded[:few]), "float32"
    best = max((speed[name] for name in speed if name.startswith("published")), default=float("nan"))
    lines = []
    for name, found in scores.items():
        pairs = list(zip(exact[:few], found))
        difference = max(abs(a - b) for row, other in pairs for a, b in zip(row, other))
        same = sum(row.index(max(row)) == other.index(max(other)) for row, other in pairs)
        rates = f"{speed[name]:.1f}", f"{speed[name] / best:.2f} x", of_peak.get(name, "")
        lines.append((name, *rates, f"{difference:.3f}", f"{same} of {few}"))

    versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{gpu}, {shape}, {rows:,} rows, bfloat16, {versions}")
    print(
        f"{len(examples)} examples of eng_Latn, 3 shots, {read / len(examples):.0f} tokens read of each "
        f"({few} for the published procedure); first time, with compilation, {first:.1f} s; {memory:.1f} GB"
    )
    header = (
        "",
        "examples/s",
        "of the best published",
        "of peak",
        f"largest difference from {of_what}, nats",
    )
    print_table((*header, "same prediction"), lines)
    print_table(("NLL of documents", "documents", "documents/s", "tokens/s", "of peak"), nll)
    print(f"{shape}: {time.perf_counter() - began:.0f} s in all")


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """Return the result of work(), the seconds of its first call, and the median of `repeats` further calls.
    `work` must return its result on the CPU, so that a GPU's time is included."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, seconds[0], statistics.median(seconds[1:])


@torch.no_grad()
def random_model(config: LlamaConfig) -> Llama:
    """Make a model in bfloat16 with compiled blocks, on the GPU if there is one."""
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.ndim == 2 else parameter.fill_(1)
    for block in model.model["layers"]:
        block.compile(dynamic=True)
    return model.eval()


def as_transformers(model: Llama) -> transformers.LlamaForCausalLM:
    """Return the same model in transformers. It shares the weights."""
    config = transformers.LlamaConfig(**to_config_json(model.config))
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    reference.load_state_dict(model.state_dict(), assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config).to(model.lm_head.weight.device)
    return reference.eval()


def measure_on_a_cpu(args: argparse.Namespace) -> None:
    """Print the table for SmolLM2-135M's shape, with random weights in float32."""
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    model = Llama(SHAPE)
    init_weights(model, 0)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    task = SIB200(args.data)
    examples = task.examples("eng_Latn")[: args.examples]
    encoded = encode_published(tokenizer, examples)
    tokens = sum(len(context) for context, _ in encoded) / len(encoded)

    def ours() -> list[list[float]]:
        asked = task.examples("eng_Latn")[: args.examples]
        return loglikelihoods(model, encode_published(tokenizer, asked))

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
            if warm:  # the first round is not counted
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
    """Return the harness's model class around the same weights, or None if lm-eval is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError:
        return None
    return HFLM(
        pretrained=model, tokenizer=transformers.LlamaTokenizer.from_pretrained(tokenizer), max_length=2048
    )


if __name__ == "__main__":
    main()
