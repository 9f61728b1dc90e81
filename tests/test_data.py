"""Test mala.data: token files and batches."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

import mala.data
from mala.cli import UserError
from mala.data import Batches, Stream, TokenFile, file_digests, open_part, open_streams, read_ahead, tokenise
from mala.storage.corpus import Corpus
from mala.storage.corpus_formats import Reading
from mala.words.tokenizer import Tokenizer, append_pieces

TOKENIZER = Tokenizer.from_pretrained(ROOT / "assets/tiny-llama")
LINES = [
    "one",
    "two words",
    'a "quoted" line',
    "ጤና ይስጥልኝ",
    "tab\tinside",
    "u\u2028n",
    " two  spaces ",
    "<s> is text",
]


def expected_tokens(documents, tokenizer=TOKENIZER):
    return [token for text in documents for token in [tokenizer.bos_id, *tokenizer.encode(text)]]


def write_corpus(root, **languages):
    root.mkdir(exist_ok=True)
    for language, documents in languages.items():
        (root / f"{language}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in documents)
        )


def make(root, folder, held_out=0.0, tokenizer=TOKENIZER, **more):
    corpus = Corpus(root, held_out=held_out, **more)
    tokenise(
        corpus,
        tokenizer,
        file_digests([file for files in corpus.files.values() for file in files], {}),
        folder,
    )
    return open_streams(corpus, folder)


def all_of(stream):
    return stream.take(0, len(stream)).tolist()


def test_token_files_hold_every_document_after_bos_in_order(tmp_path):
    write_corpus(tmp_path / "corpus", swh_Latn=LINES, amh_Ethi=LINES[::-1] * 3, eng_Latn=["blank", " ", ""])
    shutil.copytree(tmp_path / "corpus", tmp_path / "deu_Latn")
    (tmp_path / "deu_Latn").rename(tmp_path / "corpus/deu_Latn")  # a language with several files
    streams = make(tmp_path / "corpus", tmp_path / "tokens")
    assert {language: stream.documents for language, stream in streams.items()} == {
        "amh_Ethi": 24, "deu_Latn": 33, "eng_Latn": 1, "swh_Latn": 8}  # fmt: skip
    assert all_of(streams["swh_Latn"]) == expected_tokens(LINES)
    assert all_of(streams["deu_Latn"]) == expected_tokens([*LINES[::-1] * 3, "blank", *LINES])
    lengths = [len(expected_tokens([line])) for line in LINES]
    content = np.array(expected_tokens(LINES), "<u2").tobytes() + np.array(lengths, "<u4").tobytes()
    assert (tmp_path / "tokens/swh_Latn.0.bin").read_bytes() == content
    with open(tmp_path / "tokens/index.json") as index:
        assert json.load(index)["dtype"] == "uint16"


@needs_shared
def test_blocks_are_those_of_mala_500s_grouping(tmp_path):
    """The oracle is run_clm.py's group_texts with transformers' tokenizer, with which MaLA-500 was packed."""
    lines = (SHARED / "bible/amu_Latn.txt").read_text().splitlines()[:400]
    write_corpus(tmp_path / "corpus", amu_Latn=lines)
    tokenizer = Tokenizer.from_pretrained(SHARED / "llama2")
    stream = make(tmp_path / "corpus", tmp_path / "tokens", tokenizer=tokenizer)["amu_Latn"]
    theirs = transformers.LlamaTokenizer.from_pretrained(SHARED / "llama2", legacy=True, add_bos_token=True)
    together = sum(theirs(lines)["input_ids"], [])
    assert len(together) == len(stream)
    batches = Batches(
        {"amu_Latn": stream}, seq_len=256, batch_size=1, steps=3 * (len(together) // 256), alpha=0.3, seed=0
    )
    blocks = {int(block): batches[step][0][0].tolist() for step, [block] in enumerate(batches.block_of_row)}
    for block in range(len(together) // 256):
        assert blocks[block] == together[256 * block : 256 * (block + 1)]


def test_only_what_changed_is_tokenised_again(tmp_path, monkeypatch):
    done = []
    original = mala.data._write_tokens
    monkeypatch.setattr(
        mala.data, "_write_tokens", lambda *args: (done.append(args[0].language), original(*args))[1]
    )
    corpus, tokens = tmp_path / "corpus", tmp_path / "tokens"
    write_corpus(corpus, swh_Latn=LINES, amh_Ethi=LINES, eng_Latn=LINES)

    def again(**more):
        done.clear()
        streams = make(corpus, tokens, **more)
        return sorted(done), streams

    assert again()[0] == ["amh_Ethi", "eng_Latn", "swh_Latn"]
    assert again()[0] == []
    (corpus / "swh_Latn.jsonl").touch()  # a new modification time, but the same text
    assert again(held_out=0.5)[0] == []  # documents are left out only when files are opened
    write_corpus(corpus, swh_Latn=LINES[:-1] + ["<s> is TEXT"])  # the same number of bytes
    names, streams = again()
    assert names == ["swh_Latn"] and all_of(streams["swh_Latn"]) == expected_tokens(
        LINES[:-1] + ["<s> is TEXT"]
    )
    (tokens / "eng_Latn.0.bin").write_bytes((tokens / "eng_Latn.0.bin").read_bytes()[:-2])  # truncated
    assert again()[0] == ["eng_Latn"]
    (corpus / "amh_Ethi.jsonl").rename(tmp_path / "amh_Ethi.jsonl")
    names, streams = again()
    assert names == [] and streams.keys() == {
        "eng_Latn",
        "swh_Latn",
    }  # other runs that share the token files may need amh_Ethi
    (tmp_path / "amh_Ethi.jsonl").rename(corpus / "amh_Ethi.jsonl")
    assert again()[0] == [] and again(languages=("swh_Latn",))[1].keys() == {"swh_Latn"}
    other = Tokenizer(append_pieces(TOKENIZER, {"two▁": -9999.0}), "other")
    names, streams = again(tokenizer=other)
    assert names == ["amh_Ethi", "eng_Latn", "swh_Latn"]
    (corpus / "eng_Latn.jsonl").unlink()
    names, streams = again()
    assert (
        names == ["amh_Ethi", "swh_Latn"] and not (tokens / "eng_Latn.0.bin").exists()
    )  # made with another tokenizer


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", **{f"{letter * 3}_Latn": LINES for letter in "abcdef"})
    original, done = mala.data._write_tokens, []

    def dies(token_file, root, tokenizer):
        done.append(token_file.language)
        if len(done) == 4:
            (root / f".{token_file.entry['file']}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return original(token_file, root, tokenizer)

    monkeypatch.setattr(mala.data, "_write_tokens", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "corpus", tmp_path / "tokens")
    streams = make(tmp_path / "corpus", tmp_path / "tokens")
    assert len(done) == 7 and len(set(done)) == 6  # the fourth twice, the others once
    assert all(all_of(stream) == expected_tokens(LINES) for stream in streams.values()) and len(streams) == 6


def test_many_processes_make_the_same_files(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", swh_Latn=LINES * 50, amh_Ethi=LINES[::-1] * 20, eng_Latn=LINES)
    make(tmp_path / "corpus", tmp_path / "alone")
    monkeypatch.setattr(mala.data, "POOL_BYTES", 0)
    make(tmp_path / "corpus", tmp_path / "pool")
    for file in sorted((tmp_path / "alone").iterdir()):
        assert file.read_bytes() == (tmp_path / "pool" / file.name).read_bytes()
    (tmp_path / "corpus/swh_Latn.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "corpus/eng_Latn.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match=r"swh_Latn.jsonl: line 2 is not a JSON object"):
        make(tmp_path / "corpus", tmp_path / "pool")


def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path):
    fifos = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for fifo in fifos:
        os.mkfifo(fifo)  # a worker that opens it waits forever

    def kill():
        while not multiprocessing.active_children():
            time.sleep(0.1)
        time.sleep(1)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    missing = [
        TokenFile("aaa_Latn", fifo, mala.data.POOL_BYTES, {"file": f"{fifo.name}.bin"}, Reading())
        for fifo in fifos
    ]
    with pytest.raises(UserError, match="a tokenising process was killed"):
        list(mala.data._in_parallel(missing, tmp_path, TOKENIZER))


def test_digests_follow_the_content_and_are_read_once(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("content")
    first = file_digests([file], {})
    known = {str(file.resolve()): [*first[str(file.resolve())][:2], "kept"]}
    assert file_digests([file], known) == known  # same size and time: not read
    os.utime(file, ns=(1, 1))
    assert file_digests([file], known)[str(file.resolve())][2] == first[str(file.resolve())][2]
    file.write_text("CONTENT")
    assert file_digests([file], first)[str(file.resolve())][2] != first[str(file.resolve())][2]


@given(lengths=st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=4), data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_stream_of_the_first_documents_of_token_files(tmp_path_factory, lengths, data):
    """lengths: the number of tokens of each document, for each file."""
    kept = data.draw(st.integers(0, 8))
    parts, expected, number = [], [], 0
    for of_file in lengths:
        if not sum(of_file):
            continue  # a stream has no files without tokens
        tokens = np.arange(number, number := number + sum(of_file), dtype=np.uint16)
        file = tmp_path_factory.mktemp("tokens") / "part.bin"
        file.write_bytes(tokens.tobytes() + np.array(of_file, "<u4").tobytes())
        parts.append(open_part(file, "uint16", len(of_file), sum(of_file), kept))
        expected += tokens[: sum(of_file[:kept])].tolist()
    if not expected:
        return
    stream = Stream(parts, 1)
    assert all_of(stream) == expected
    start, count = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 99))
    assert (
        stream.take(start, count).tolist()
        == np.take(expected, range(start, start + count), mode="wrap").tolist()
    )


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=5)


def make_batches(sizes, **changes):
    streams, first = {}, 0
    for i, (documents, tokens) in enumerate(sizes):
        middle = tokens // 3  # split into two files; the first may be empty
        ids = np.arange(first, first + tokens, dtype=np.uint32)
        streams[f"{chr(97 + i) * 3}_Latn"] = Stream(
            [part for part in (ids[:middle], ids[middle:]) if len(part)], documents
        )
        first += tokens
    return streams, Batches(
        streams, **{**dict(seq_len=16, batch_size=4, steps=200, alpha=0.3, seed=0), **changes}
    )


@given(sizes=lengths, seq_len=st.integers(1, 50), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_blocks_are_the_grouping_of_the_stream_and_leave_no_token_out(sizes, seq_len, seed):
    """Our blocks are MaLA-500's: the stream cut into blocks of seq_len.

    The last block is filled up from the beginning.
    """
    streams, batches = make_batches(sizes, seq_len=seq_len, seed=seed)
    for step in range(20):
        inputs, targets = batches[step]
        assert inputs.shape == targets.shape == (4, seq_len) and inputs.dtype == targets.dtype == torch.int64
        for row, language in enumerate(batches.languages_of(step)):
            stream = np.array(all_of(streams[language]))
            block, odd = divmod(inputs[row, 0].item() - stream[0], seq_len)
            assert odd == 0
            ring = np.resize(np.roll(stream, -block * seq_len), seq_len + 1)
            assert inputs[row].tolist() == ring[:-1].tolist() and targets[row].tolist() == ring[1:].tolist()
    for index, language in enumerate(batches.languages):  # each round has every block once
        seen = batches.block_of_row[batches.language_of_row == index]
        blocks = -(-len(streams[language]) // seq_len)
        for start in range(0, len(seen) - blocks + 1, blocks):
            assert sorted(seen[start : start + blocks]) == list(range(blocks))


def test_a_step_depends_on_seed_step_and_rank_alone():
    sizes = [(10, 500), (1000, 5000), (3, 40)]
    _, batches = make_batches(sizes)
    _, longer = make_batches(sizes, steps=300)
    _, other = make_batches(sizes, seed=1)
    in_order = [batches[step] for step in range(200)]
    for step in (150, 3, 77):
        assert torch.equal(batches[step][0], in_order[step][0]) and torch.equal(
            longer[step][0], in_order[step][0]
        )
        for processes in (1, 2, 4):  # together they get what one process would get
            shares = [batches.share(step, rank, processes) for rank in range(processes)]
            for whole, parts in zip(batches[step], zip(*shares)):
                assert torch.equal(whole, torch.cat(parts))
    assert any(not torch.equal(other[step][0], in_order[step][0]) for step in range(5))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_languages_are_drawn_by_n_to_the_alpha(alpha):
    sizes = [(10, 500), (1000, 5000), (100, 40)]
    _, batches = make_batches(sizes, alpha=alpha, steps=5000)
    expected = np.array([10, 1000, 100]) ** alpha
    expected /= expected.sum()
    drawn = np.bincount(batches.language_of_row.flat, minlength=3) / 20_000
    assert np.all(np.abs(drawn - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000))


def test_read_ahead_keeps_the_order_and_passes_errors_on():
    read = []
    steps = read_ahead(lambda step: read.append(step) or step * step, range(3, 10))
    assert next(steps) == 9
    deadline = time.monotonic() + 10
    while len(read) < 1 + mala.data.PREFETCH and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == [3, 4, 5]  # ahead, but only by PREFETCH
    assert list(steps) == [step * step for step in range(4, 10)]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda step: 1 // (5 - step), range(10)))
