"""Test mala.storage.corpus and corpus_formats on published corpora as downloaded. Their own libraries are oracles."""

import json
import random

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from mala.benchmarks.tasks import SIB200
from mala.cli import UserError
from mala.data import file_digests, open_streams, tokenise
from mala.running.prepare import IDENTITY
from mala.storage.corpus import Corpus
from mala.storage.corpus_formats import Reading, read_documents, say_once
from mala.words.tokenizer import Tokenizer
from tools import vocab_commands

TEXTS = [f'a "text" {i}, ጤና\u2028\ttab\nnewline' for i in range(10)]
HEADER = "index_id\tcategory\ttext\n"
datasets.disable_progress_bars()


def dataset(texts):
    return datasets.Dataset.from_dict({"text": texts, "source": ["x"] * len(texts)})


def write_jsonl(file, texts, field="text"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)), "utf-8")


def write_parquet(file, texts, field="text"):
    file.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame({"id": range(len(texts)), field: texts}).to_parquet(file)


def splits_of(root, language="swh_Latn", **more):
    corpus = Corpus(root, **more)
    return {split: list(corpus.documents(language, split)) for split in ("train", "dev", "test")}


def refusal(work, *args, **more):
    with pytest.raises(UserError) as caught:
        work(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_glot500_as_save_to_disk_leaves_it(tmp_path, capsys):
    whole = {"train": dataset(TEXTS[:7]), "test": dataset(TEXTS[7:])}
    folder = tmp_path / "a" / "swh_Latn"
    datasets.DatasetDict(whole).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    dataset(TEXTS).save_to_disk(tmp_path / "b" / "swh_Latn", num_shards=3)
    loaded = datasets.load_from_disk(folder)
    assert splits_of(tmp_path / "a") == {
        "train": loaded["train"]["text"],
        "dev": [],
        "test": loaded["test"]["text"],
    }
    assert (
        splits_of(tmp_path / "b", held_out=0)["train"]
        == datasets.load_from_disk(tmp_path / "b" / "swh_Latn")["text"]
    )

    stale = folder / "train" / "data-00000-of-00001.arrow"  # from an earlier save with other shards
    stale.write_bytes((folder / "test/data-00000-of-00001.arrow").read_bytes())
    assert splits_of(tmp_path / "a")["train"] == TEXTS[:7] == datasets.load_from_disk(folder)["train"]["text"]
    assert capsys.readouterr().err == ""
    (folder / "train/data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow: there is no such file, but state.json names it" in refusal(
        Corpus, tmp_path / "a"
    )
    (folder / "train/state.json").write_text('{"_data_files": [1]}')
    assert "state.json: does not name shards" in refusal(Corpus, tmp_path / "a")


def test_the_cache_of_datasets(tmp_path):
    write_jsonl(tmp_path / "in/train.jsonl", TEXTS[:8])
    write_jsonl(tmp_path / "in/test.jsonl", TEXTS[8:])
    loaded = datasets.load_dataset(str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"))
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/swh_Latn").symlink_to(info.parent)
    expected = {"train": loaded["train"]["text"], "dev": [], "test": loaded["test"]["text"]}
    assert splits_of(tmp_path / "corpus") == expected
    (info.parent / "old-train.arrow").write_bytes(next(info.parent.glob("*-test.arrow")).read_bytes())
    assert splits_of(tmp_path / "corpus") == expected  # not named: stale
    next(info.parent.glob("*-test.arrow")).unlink()
    assert "there is no such file, but dataset_info.json names it" in refusal(Corpus, tmp_path / "corpus")


def test_fineweb_2_and_glotcc(tmp_path, capsys):
    fineweb, glotcc = tmp_path / "fineweb", tmp_path / "glotcc"
    write_parquet(fineweb / "data/swh_Latn/train/000_00000.parquet", TEXTS[:4])
    write_parquet(fineweb / "data/swh_Latn/train/000_00001.parquet", TEXTS[4:8])
    write_parquet(fineweb / "data/swh_Latn/test/000_00000.parquet", TEXTS[8:])
    write_parquet(fineweb / "data/swh_Latn_removed/train/000_00000.parquet", ["thrown away"])
    (fineweb / "README.md").write_text("not a corpus file")
    (fineweb / "assets").mkdir()
    for root in (fineweb, fineweb / "data"):
        assert splits_of(root) == {"train": TEXTS[:8], "dev": [], "test": TEXTS[8:]}
    assert "skipped swh_Latn_removed: not named for a language" in capsys.readouterr().err

    write_parquet(glotcc / "v1.0/swh-Latn/swh-Latn_0.parquet", TEXTS, "content")
    for root in (glotcc, glotcc / "v1.0"):
        corpus = Corpus(root, held_out=0)
        assert corpus.languages == ["swh_Latn"]
        frame = pandas.read_parquet(glotcc / "v1.0/swh-Latn/swh-Latn_0.parquet")
        assert corpus.load("train")["swh_Latn"] == frame["content"].tolist() == TEXTS
    write_parquet(glotcc / "v1.0/swh_Latn/0.parquet", TEXTS)
    assert "swh_Latn has two entries" in refusal(Corpus, glotcc / "v1.0")
    write_parquet(glotcc / "v1.1/swh-Latn/0.parquet", TEXTS)
    assert "the folders v1.0, v1.1 hold languages" in refusal(Corpus, glotcc)


def test_without_a_test_split(tmp_path, capsys):
    write_jsonl(tmp_path / "aka_Latn/train.jsonl", TEXTS[:6])  # the MaLA corpus
    write_jsonl(tmp_path / "aka_Latn/validation.jsonl", TEXTS[6:])
    write_jsonl(tmp_path / "swh_Latn/train/0.jsonl", TEXTS[:3])
    write_jsonl(tmp_path / "swh_Latn/train/1.jsonl", TEXTS[3:])
    assert splits_of(tmp_path, "aka_Latn") == {"train": TEXTS[:6], "dev": TEXTS[6:], "test": TEXTS[6:]}
    assert splits_of(tmp_path) == {"train": TEXTS[:8], "dev": [], "test": TEXTS[8:]}
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert "no test split in aka_Latn; using the validation split instead" in err
    assert "no test split in swh_Latn; using the last 20% of train instead" in err

    tokenizer, corpus = Tokenizer.from_pretrained(ROOT / "assets/tiny-llama"), Corpus(tmp_path)
    files = file_digests([file for files in corpus.files.values() for file in files], {})
    tokenise(corpus, tokenizer, files, tmp_path / "tokens")
    for language, stream in open_streams(corpus, tmp_path / "tokens").items():
        train = list(corpus.documents(language, "train"))  # held-out documents are never trained on
        tokens = [token for text in train for token in tokenizer.encode(text, bos=True)]
        assert stream.take(0, len(stream)).tolist() == tokens


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_which_field_holds_the_text(write, tmp_path):
    file = tmp_path / f"swh_Latn.{write.__name__.removeprefix('write_')}"
    write(file, TEXTS, "body")
    assert "its fields are id, body; choose one with --text-field" in refusal(list, read_documents(file))
    assert list(read_documents(file, Reading("body"))) == TEXTS
    assert "id" in refusal(list, read_documents(file, Reading("id")))  # a number
    write(file, TEXTS, "content")
    assert list(read_documents(file)) == TEXTS
    assert "no column 'text'" in (m := refusal(list, read_documents(file, Reading("text")))) or '"text"' in m


def test_a_change_of_the_field_is_tokenised_anew(tmp_path):
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": "one", "title": "another text"})] * 3
    (tmp_path / "corpus/swh_Latn.jsonl").write_text("\n".join(lines))
    tokenizer, found = Tokenizer.from_pretrained(ROOT / "assets/tiny-llama"), []
    for field in (None, "title"):
        corpus = Corpus(tmp_path / "corpus", held_out=0, reading=Reading(field))
        tokenise(corpus, tokenizer, file_digests(list(corpus.files["swh_Latn"]), {}), tmp_path / "tokens")
        stream = open_streams(corpus, tmp_path / "tokens")["swh_Latn"]
        found.append(stream.take(0, len(stream)).tolist())
    assert found == [tokenizer.encode(text, bos=True) * 3 for text in ("one", "another text")]


KINDS = {
    "string": pa.string(), "large": pa.large_string(), "view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()), "large dictionary": pa.dictionary(pa.int8(), pa.large_string()),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tables(kind, tmp_path):
    texts = ["one", None, "", "two words", "ጤና", "one"]
    column = pa.array(texts)
    column = column.dictionary_encode().cast(KINDS[kind]) if "dict" in kind else column.cast(KINDS[kind])
    table = pa.table({"text": column})
    for number, make in enumerate((pa.ipc.new_stream, pa.ipc.new_file)):
        with make(str(tmp_path / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    if kind != "large dictionary":
        pq.write_table(table, tmp_path / "2.parquet")
        (tmp_path / "3.arrow").write_bytes((tmp_path / "2.parquet").read_bytes())  # the name is wrong
    for file in tmp_path.iterdir():
        assert list(read_documents(file)) == ["one", "two words", "ጤና", "one"], file


def test_damaged_tables_and_others(tmp_path):
    write_parquet(tmp_path / "whole.parquet", TEXTS)
    whole = (tmp_path / "whole.parquet").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name, content, message in (
        ("half.parquet", whole[: len(whole) // 2], "not a whole Parquet or Arrow file"),
        ("empty.parquet", b"", "not a whole Parquet or Arrow file"),
        ("page.parquet", b"<!DOCTYPE html>", "not a whole Parquet or Arrow file"),
        ("page.arrow", b"ARROW1 and no more", "not a whole Parquet or Arrow file"),
        *(
            (f"x{end}", pointer, "found a Git LFS pointer")
            for end in (".parquet", ".arrow", ".jsonl", ".txt", ".tsv")
        ),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: {message}" in refusal(list, read_documents(tmp_path / name))
    raw = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    with pa.ipc.new_stream(str(tmp_path / "bytes.arrow"), pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": raw}))
    assert "bytes.arrow: not a whole" in refusal(list, read_documents(tmp_path / "bytes.arrow"))


BAD_LINES = [
    (b"\xff", "is not UTF-8"), (b"{", "is not a JSON object"), (b"[1]", "is not a JSON object"),
    (b'{"title": "x"}', "its fields are title"), (b'{"text": 5}', "is not a JSON object with a string"), (b'{"text": "\\ud800"}', "is not a JSON object with a string"),
]  # fmt: skip


def test_bad_lines_are_refused_or_counted(tmp_path, capsys):
    for line, message in BAD_LINES:
        (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": null}\n' + line + b'\n{"text": "b"}\n')
        found = refusal(list, read_documents(tmp_path / "x.jsonl"))
        assert "x.jsonl: line 3 " in found and message in found
        say_once.cache_clear()
        assert list(read_documents(tmp_path / "x.jsonl", Reading(None, True))) == ["a", "b"]
        assert f"x.jsonl: skipped 1 bad line: {found.split(': ', 1)[1]}" in capsys.readouterr().err
    lines = [line for line, _ in BAD_LINES]
    (tmp_path / "swh_Latn.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "a"}', b'{"text": "b"}']))
    (tmp_path / "eng_Latn.txt").write_bytes(b"one\n\xfe\xff\ntwo\n")
    (tmp_path / "x.jsonl").unlink()
    corpus = Corpus(tmp_path, held_out=0.5, reading=Reading(None, True))
    assert corpus.load("train") == {"eng_Latn": ["one"], "swh_Latn": ["a"]}
    assert corpus.load("test") == {"eng_Latn": ["two"], "swh_Latn": ["b"]}
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 2 and "swh_Latn.jsonl: skipped 6 bad lines, the first: line 1 is not UTF-8" in err
    )


def test_text_that_nobody_sees_is_no_document(tmp_path):
    blank = ["\u200b", "\ufeff \u200c\u200d", "\u2060\xad", "\u3000\xa0\u2028", "\u202e\u2066", "\U000e0041"]
    write_jsonl(tmp_path / "x.jsonl", [*blank, "\u200ba", "\u0627\u200c", "😀"])
    assert list(read_documents(tmp_path / "x.jsonl")) == ["\u200ba", "\u0627\u200c", "😀"]


def test_what_is_skipped_and_why(tmp_path, capsys):
    write_jsonl(tmp_path / "swh_Latn/train.jsonl", TEXTS)
    write_jsonl(tmp_path / "swh_Latn/more/train.jsonl", TEXTS)
    for name in (
        "aaa_Latn.json",
        "bbb_Latn.jsonl.zst",
        "ddd_Latn/x.csv",
        "swh_Latn/test.jsonl.zst",
        "sw.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in (
        "_SUCCESS",
        ".part.crc",
        "train.jsonl.lock",
        "x.parquet.crc",
        "README.txt",
        "LICENSE.txt",
        ".hidden.txt",
    ):
        (tmp_path / "swh_Latn" / name).write_text("x")
    (tmp_path / "ccc_Latn/test").mkdir(parents=True)
    corpus = Corpus(tmp_path, held_out=0)
    assert corpus.load("train") == {"swh_Latn": TEXTS}
    other = "not a corpus format (.txt .jsonl .tsv .parquet .arrow, text formats also with .gz)"
    assert sorted(capsys.readouterr().err.replace(f"{tmp_path}: skipped ", "").splitlines()) == [
        f"aaa_Latn.json, bbb_Latn.jsonl.zst, ddd_Latn/x.csv, swh_Latn/test.jsonl.zst: {other}",
        "ccc_Latn/test: a folder without a corpus file",
        "sw.txt: not named for a language, such as swh_Latn",
        "swh_Latn/more: only files in <language>/ and <language>/<split>/ are read",
    ]


def test_a_root_that_is_no_corpus(tmp_path):
    write_jsonl(tmp_path / "swh_Latn/train/0.jsonl", TEXTS)
    found = refusal(Corpus, tmp_path / "swh_Latn")
    assert (
        "swh_Latn: one language's folder" in found
        and "give the folder above it, with --langs swh_Latn" in found
    )
    assert "0.jsonl: a file; expected" in refusal(Corpus, tmp_path / "swh_Latn/train/0.jsonl")
    (tmp_path / "x").mkdir()
    assert "x: not a corpus; expected entries" in refusal(Corpus, tmp_path / "x")
    (tmp_path / "x/swh_Latn.jsonl.zst").write_text("x")
    assert "x: not a corpus; skipped swh_Latn.jsonl.zst: not a corpus format" in refusal(
        Corpus, tmp_path / "x"
    )


def read_sib200(file):
    table = pandas.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    return table["text"].tolist()


CELLS = st.text(st.sampled_from("ab\"\t\n ,'\u2028é"), max_size=12)


@given(
    texts=st.lists(CELLS, min_size=1, max_size=8),
    mark=st.sampled_from(["", "\ufeff"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(deadline=None, max_examples=200)
def test_sib200_is_read_as_pandas_writes_it(texts, mark, end, tmp_path_factory):
    root = tmp_path_factory.mktemp("sib200")
    (root / "swh_Latn").mkdir()
    frame = pandas.DataFrame({"index_id": range(len(texts)), "category": "travel", "text": texts})
    file = root / "swh_Latn" / "test.tsv"
    file.write_bytes((mark + frame.to_csv(sep="\t", index=False, lineterminator=end)).encode())
    assert [row.text for row in SIB200(root).rows("swh_Latn", "test")] == texts == read_sib200(file)
    seen = [text for text in texts if text.strip()]
    assert list(read_documents(file)) == seen


def test_sib200_s_own_files():
    files = sorted((SHARED / "sib200").glob("*/*.tsv"))
    if not files:
        pytest.skip("no SIB-200 here")
    for file in files:
        rows = SIB200(SHARED / "sib200").rows(file.parent.name, file.stem)
        assert [row.text for row in rows] == read_sib200(file)


def row(number, text):
    return f"{number}\ttravel\t{text}\n"


UNBALANCED = {
    "never closed": (row(1, "x") + row(2, '"go') + row(3, "y"), 3),
    "closed by a later row's": (row(1, '"a\nb"') + row(2, '"go') + row(3, "he said go\"") + row(4, "z"), 4),
    "closed within a later row": (row(1, '"go') + row(2, 'the "x" y'), 2),
    "closed too early": (row(1, "x") + "\n" + row(2, '"go" he said'), 4),
    "too few columns": (row(1, '"a\n\nb"') + "2\ttravel\n", 5),
}  # fmt: skip


@pytest.mark.parametrize("case", UNBALANCED)
def test_a_quote_that_is_not_closed_is_refused(case, tmp_path):
    content, line = UNBALANCED[case]
    file = tmp_path / "swh_Latn" / "test.tsv"
    file.parent.mkdir()
    file.write_text(HEADER + content)
    for found in (refusal(SIB200(tmp_path).rows, "swh_Latn", "test"), refusal(list, read_documents(file))):
        assert f"test.tsv: line {line} " in found
        assert (
            "has 2 columns" if case == "too few columns" else "not CSV with tabs as pandas writes it"
        ) in found


def test_other_mistakes_in_sib200_name_their_line(tmp_path):
    file = tmp_path / "swh_Latn" / "test.tsv"
    file.parent.mkdir()
    start = HEADER + row(1, '"a\nb"')
    for more, message in (
        (row(1, "x").encode(), "line 4 has the same id as line 2, '1'"),
        (b"2\ttrave\tx\n", "line 4 has the label 'trave'"),
        (row(2, "x").encode() + b"3\ttravel\t\xff\n", "line 5 is not UTF-8"),
    ):
        file.write_bytes(start.encode() + more)
        assert message in refusal(SIB200(tmp_path).rows, "swh_Latn", "test")


def test_taxi1500_stays_raw(tmp_path):
    file = tmp_path / "eng_Latn" / "eng_Latn_test.tsv"
    file.parent.mkdir()
    verses = ['"Go," he said', '"never closed', 'a ""b"" c', "a\ttab"]
    random.Random(0).shuffle(verses)
    file.write_text("".join(f"{i}\tFaith\t{verse}\n" for i, verse in enumerate(verses)))
    assert list(read_documents(file)) == verses


def test_the_commands_take_how_a_corpus_is_read(tmp_path):
    write_jsonl(tmp_path / "swh_Latn.jsonl", TEXTS, "body")
    learning = vocab_commands.Train(data=tmp_path, size=100, out="x", text_field="body")
    assert Corpus.from_settings(learning).load("train")["swh_Latn"] == TEXTS[:8]
    measuring = evaluate.Settings(text_field="body", skip_bad_lines=True)
    assert Corpus.from_settings(measuring, tmp_path).load("test")["swh_Latn"] == TEXTS
    assert "--text-field has no effect with --bench sib200" in refusal(
        evaluate.Settings, bench="sib200", text_field="x"
    )
    assert {"text_field", "skip_bad_lines"} <= set(IDENTITY)
