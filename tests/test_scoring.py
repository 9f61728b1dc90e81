"""Test mala.scoring.

Compare documents' NLL with transformers' loss, windows with one long pass, and trees with a pass for every
label. Check that batches of all sizes work with compiled blocks and fit a GPU's memory.
"""

import math
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mala import model as model_file
from mala import scoring
from mala.benchmarks.tasks import SIB200, Example
from mala.cli import UserError
from mala.model import KVCache, Llama
from mala.scoring import documents_nll, loglikelihoods, nll_by_language, windows
from mala.storage.corpus import Corpus
from mala.words.tokenizer import Tokenizer
from tools.known_models import init_weights

TINY = ROOT / "assets/tiny-llama"
TOKENIZER = Tokenizer.from_pretrained(TINY)
DEMO = Corpus(ROOT / "assets/demo/sib200").load("test")


@given(length=st.integers(1, 500), context=st.integers(1, 60))
def test_windows_predict_every_token_once_from_enough_context(length, context):
    predicted = []
    for start, first, end in windows(length, context):
        assert 0 <= start < first < end <= length and end - 1 - start <= context
        assert start == 0 or first - start > context // 2
        predicted += range(first, end)
    assert predicted == list(range(1, length))


def test_documents_equal_transformers_loss(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", {"cpu": 300})  # several batches of several rows each
    documents = [text for language in ("eng_Latn", "swh_Latn", "amh_Ethi") for text in DEMO[language][:6]] + [
        "a"
    ]
    model = Llama.from_pretrained(TINY, dtype=torch.float32)
    reference = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    nll, counts = documents_nll(model, TOKENIZER, documents)
    for text, ours, count in zip(documents, nll, counts):
        ids = torch.tensor([TOKENIZER.encode(text, bos=True)])
        assert count == ids.shape[1] - 1
        assert ours == pytest.approx(reference(ids, labels=ids).loss.item() * count, rel=1e-4)


def test_a_long_document_is_the_sum_of_its_windows_and_one_pass_where_it_fits():
    model = Llama(tiny_config(vocab_size=2048, max_position_embeddings=20))
    init_weights(model, 0)
    text = " ".join(DEMO["eng_Latn"])
    ids = torch.tensor(TOKENIZER.encode(text, bos=True))
    assert len(ids) > 100
    expected = 0.0
    for start, first, end in windows(len(ids), 20):
        logits = model(ids[None, start : end - 1])[0].float()
        expected += torch.nn.functional.cross_entropy(
            logits[first - start - 1 :], ids[first:end], reduction="sum"
        ).item()
    assert documents_nll(model, TOKENIZER, [text])[0][0] == pytest.approx(expected, rel=1e-5)
    model.config.max_position_embeddings = len(ids)
    whole = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    assert documents_nll(model, TOKENIZER, [text])[0][0] == pytest.approx(whole, rel=1e-5)


def test_figures():
    model = Llama.from_pretrained(TINY, dtype=torch.float32).train()
    documents = {language: DEMO[language][:3] for language in ("swh_Latn", "amh_Ethi")}
    result = nll_by_language(model, TOKENIZER, documents, "")
    assert model.training
    for language, texts in documents.items():
        figures = result["languages"][language]
        total = sum(documents_nll(model, TOKENIZER, texts)[0])
        assert figures["documents"] == 3 and figures["bytes"] == len("".join(texts).encode())
        assert figures["tokens"] == sum(len(TOKENIZER.encode(text)) for text in texts)
        assert figures["nll_per_document"] == pytest.approx(total / 3)
        assert figures["bits_per_byte"] == pytest.approx(total / figures["bytes"] / math.log(2))
    for key in ("nll_per_document", "nll_per_token", "bits_per_byte"):
        assert result["macro"][key] == pytest.approx(
            sum(result["languages"][language][key] for language in documents) / 2
        )


RANDOM = Llama(tiny_config(vocab_size=50, max_position_embeddings=40, initializer_range=0.3))
init_weights(RANDOM, 0)
IDS = st.integers(0, 49)
CONTINUATIONS = st.builds(  # several often begin alike
    lambda alike, lists: [alike + ids for ids in lists],
    st.lists(IDS, max_size=3),
    st.lists(st.lists(IDS, min_size=1, max_size=6), min_size=1, max_size=5),
)


@given(
    encoded=st.lists(st.tuples(st.lists(IDS, min_size=1, max_size=60), CONTINUATIONS), max_size=4),
    max_length=st.integers(9, 50),
    batch_size=st.sampled_from([None, 1, 3]),
)
@settings(deadline=None, max_examples=25)
def test_a_tree_gives_what_one_pass_for_every_continuation_gives(encoded, max_length, batch_size):
    done = []
    ours = loglikelihoods(RANDOM, encoded, max_length, batch_size=batch_size, advance=done.append)
    assert sum(done) == pytest.approx(len(encoded)) and len(ours) == len(encoded)
    for (context, continuations), scores in zip(encoded, ours):
        for continuation, score in zip(continuations, scores, strict=True):
            ids = torch.tensor([(context + continuation)[-(min(max_length, 40) + 1) :]])
            log_p = torch.log_softmax(RANDOM(ids[:, :-1])[0].detach(), -1)[-len(continuation) :]
            expected = log_p.gather(1, torch.tensor(continuation)[:, None]).sum().item()
            assert score == pytest.approx(expected, abs=1e-4)


def test_a_label_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="a label takes 41 tokens, but the model reads at most 40"):
        loglikelihoods(RANDOM, [([1], [[2] * 41])])


def test_only_label_positions_meet_the_head(monkeypatch):
    rows = []
    counting = model_file.token_nll
    monkeypatch.setattr(model_file, "token_nll", lambda x, *rest: rows.append(len(x)) or counting(x, *rest))
    loglikelihoods(RANDOM, [([1] * 30, [[2], [3, 4, 5]]), ([6] * 20, [[7, 8]])])
    assert sum(rows) == 1 + 3 + 2


@pytest.mark.parametrize(
    "continuations, passes",
    [
        ([[2], [3], [4]], [3]),
        ([[9, 2], [9, 3], [9, 4]], [4]),  # the shared beginning belongs to the stem
        ([[9, 2]], [4]),
        ([[9, 2], [3], [9, 4]], [3, 2]),
        ([[9, 5, 2], [9, 3], [9, 5, 6, 4]], [4, 3]),
    ],
)
def test_a_second_pass_reads_what_continuations_have_of_their_own(monkeypatch, continuations, passes):
    """Pass 1 reads the context's three tokens and the shared ones, pass 2 the others except each last one."""
    read, hidden_states = [], RANDOM.hidden_states
    monkeypatch.setattr(
        RANDOM,
        "hidden_states",
        lambda tokens, **how: read.append(tokens.shape[1]) or hidden_states(tokens, **how),
    )
    loglikelihoods(RANDOM, [([6, 7, 8], continuations)])
    assert read == passes


def test_compiled_blocks_serve_batches_of_all_sizes():
    """There is one graph per kind of pass, or two if sizes coincide, but not one per layer or batch."""
    torch._dynamo.reset()
    model = Llama(tiny_config(vocab_size=2048, num_hidden_layers=3, max_position_embeddings=200))
    init_weights(model, 0)
    model.eval()
    generator = random.Random(0)
    encoded = [
        (
            [generator.randrange(2048) for _ in range(generator.randrange(5, 99))],
            [[1, 2, 3], [1, 4], [1, 5, 6, 7]],
        )
        for _ in range(26)
    ]
    documents = DEMO["eng_Latn"][:12]

    def measure():
        few_shot = [loglikelihoods(model, encoded, batch_size=size) for size in (4, 5, 7)]
        return torch.tensor(few_shot), [
            documents_nll(model, TOKENIZER, documents, batch_size=n)[0] for n in (2, 5)
        ]

    expected, expected_nll = measure()
    counter = CompileCounterWithBackend("eager")
    for block in model.model["layers"]:
        block.compile(dynamic=True, backend=counter)
    found, nll = measure()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(nll), torch.tensor(expected_nll), rtol=1e-5, atol=1e-5)
    assert 3 <= counter.frame_count <= 6
    torch._dynamo.reset()


class Peak(TorchDispatchMode):
    """Record the largest number of bytes that tensors made within this context hold at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.let_go, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def let_go(self, key):
        self.now -= self.held.pop(key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"intermediate_size": 400}, {"num_key_value_heads": 2, "intermediate_size": 1024}, {"head_dim": 64}],
)
def test_a_gpus_batches_fit_its_free_memory(monkeypatch, sizes, dtype):
    shape = dict(
        vocab_size=64, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8
    )
    model = Llama(tiny_config(**{**shape, "num_key_value_heads": 8, **sizes})).to(dtype)
    init_weights(model, 0)
    with torch.no_grad(), Peak() as memory:
        model.hidden_states(torch.zeros(4, 256, dtype=torch.int64), cache=KVCache(model, 4, 256))
    weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), numel=lambda: 10**6)
    on_gpu = SimpleNamespace(config=model.config, lm_head=SimpleNamespace(weight=weight), compute_dtype=dtype)
    head = scoring.CHUNK_BYTES["cuda"] + 10**6 * dtype.itemsize
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 10**6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 10**6)
    for free in (10**7, 2 * 10**7, 5 * 10**7):  # in addition to the head; PyTorch holds 2 MB of it unused
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device, free=free: (free + head - 2 * 10**6, 10**11)
        )
        tokens = scoring.batch_tokens(on_gpu)
        assert 0.3 * free < tokens * memory.peak / 1024 < 0.9 * free
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**11, 10**11))
    assert scoring.batch_tokens(on_gpu) == scoring.BATCH_TOKENS["cuda"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**11))
    assert scoring.batch_tokens(on_gpu) == 1


@given(widths=st.lists(st.integers(1, 3000)), batch_size=st.none() | st.integers(1, 5))
def test_batches_hold_every_sequence_once_and_no_more_than_fits(widths, batch_size):
    dealt = scoring.batches(widths, 1024, batch_size)
    assert sorted(number for batch in dealt for number in batch) == list(range(len(widths)))
    assert [widths[number] for batch in dealt for number in batch] == sorted(widths, reverse=True)
    for batch in dealt:
        if batch_size:
            assert len(batch) <= batch_size
        else:
            assert len(batch) == 1 or len(batch) * widths[batch[0]] <= 1024


def test_natural_and_published_encodings():
    examples = SIB200(ROOT / "assets/demo/sib200").examples("swh_Latn")[:5]
    natural = scoring.encode_natural(TOKENIZER, examples)
    published = scoring.encode_published(TOKENIZER, examples)
    for example, (context, continuations), (bare, apart) in zip(examples, natural, published):
        for label, continuation, alone in zip(SIB200.labels, continuations, apart):
            assert context + continuation == TOKENIZER.encode(f"{example.context} {label}", bos=True)
            assert TOKENIZER.decode(continuation) == label
            assert bare == TOKENIZER.encode(example.context) and alone == TOKENIZER.encode(f" {label}")
            # The published encoding has a second space before the label.
            assert alone[0] == TOKENIZER.processor.piece_to_id("▁") and alone[1:] == continuation

    # If a label's beginning changes how the context is tokenised, the context is what all labels share.
    class Greedy:
        def encode_batch(self, texts, bos):
            return [[0] + [len(word) for word in text.replace("s t", "st").split()] for text in texts]

    [(context, continuations)] = scoring.encode_natural(
        Greedy(), [Example("1", "a is", "to", [], ["to", "be"])]
    )
    assert context == [0, 1] and continuations == [[4], [2, 2]]
