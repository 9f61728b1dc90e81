"""Test mala.storage.corpus: reading documents and holding them out."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mala.cli import UserError
from mala.storage.corpus import Corpus, read_documents

LINES = ["one", "two words", 'a "quoted" line', "ጤና ይስጥልኝ", "tab\tinside", "u\u2028n"]


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_every_format_gives_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = "\n".join(LINES) + "\n"
    jsonl = "".join(json.dumps({"text": line, "source": "x"}) + "\n" for line in LINES)
    write(tmp_path / "aaa_Latn.txt", plain)
    write(tmp_path / "bbb_Latn.txt.gz", plain)
    write(tmp_path / "ccc_Latn.jsonl", jsonl)
    write(tmp_path / "ddd_Latn.jsonl.gz", jsonl)
    write(tmp_path / "eee_Latn.txt", "\ufeff" + plain.replace("\n", "\r\n\r\n"))  # BOM, CRLF, blank lines
    write(tmp_path / "fff_Latn" / "1.txt", "\n".join(LINES[:3]))  # no newline at the end
    write(tmp_path / "fff_Latn" / "2.jsonl", "".join(jsonl.splitlines(keepends=True)[3:]))
    table = pa.table({"text": LINES})
    (tmp_path / "ggg_Latn").mkdir()
    pq.write_table(table, tmp_path / "ggg_Latn" / "part.parquet")
    (tmp_path / "hhh_Latn").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "hhh_Latn" / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "README.md").write_text("not a corpus file")
    corpus = Corpus(tmp_path, held_out=0)
    assert corpus.languages == [f"{c * 3}_Latn" for c in "abcdefgh"]
    assert all(documents == LINES for documents in corpus.load("train").values())


def test_tsv_layouts(tmp_path):
    write(tmp_path / "swh_Latn" / "train.tsv", 'index_id\tcategory\ttext\n7\ttravel\tHe said "go\n')
    write(tmp_path / "swh_Latn" / "test.tsv", "index_id\tcategory\ttext\n8\ttravel\tx\n\n9\thealth\ty\n\n")
    write(tmp_path / "swh_Latn" / "README.txt", "not a document")
    write(tmp_path / "eng_Latn" / "eng_Latn_train.tsv", "40001001\tFaith\tIn the morning\n")
    corpus = Corpus(tmp_path)
    assert corpus.load("train") == {"eng_Latn": ["In the morning"], "swh_Latn": ['He said "go']}
    assert corpus.load("test") == {"swh_Latn": ["x", "y"]}
    write(tmp_path / "swh_Latn" / "test.tsv", "index_id\tcategory\ttext\n8\ttravel\n")
    with pytest.raises(UserError, match=r"test\.tsv: line 2 has 2 columns, expected 3"):
        corpus.load("test")


def test_split_files_of_the_hub(tmp_path):
    for split in ("train", "validation", "test"):
        for shard in "01":
            write(
                tmp_path / "swh_Latn" / f"{split}-0000{shard}-of-00002.jsonl",
                json.dumps({"text": split + shard}),
            )
    corpus = Corpus(tmp_path)
    assert {s: list(corpus.documents("swh_Latn", s)) for s in ("train", "dev", "test")} == {
        "train": ["train0", "train1"], "dev": ["validation0", "validation1"], "test": ["test0", "test1"]}  # fmt: skip
    write(tmp_path / "swh_Latn" / "more.txt", "in no split")
    with pytest.raises(UserError, match=r"more\.txt: in no split"):
        corpus = Corpus(tmp_path).load("train")


@given(n=st.integers(0, 50), held_out=st.floats(0, 1), most=st.integers(0, 30))
@settings(deadline=None)
def test_the_splits_are_the_document_in_order(n, held_out, most, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write(root / "swh_Latn.txt", "".join(f"{i}\n" for i in range(n)))
    corpus = Corpus(root, held_out=held_out, max_held_out=most)
    train, test = (list(corpus.documents("swh_Latn", split)) for split in ("train", "test"))
    assert train + test == [str(i) for i in range(n)]
    assert len(test) == n if held_out == 1 else len(test) <= most and len(test) <= held_out * n


BAD = {
    "no folder": ({}, r"corpus: there is no such folder"),
    "nothing in it": ({"README.md": ""}, r"corpus: not a corpus"),
    "only blank": ({"swh_Latn.txt": "\n \n"}, r"corpus: no language has a document"),
    "bytes": ({"swh_Latn.txt": b"good\nalso\nbad \xff\n"}, r"swh_Latn\.txt: line 3 is not UTF-8 \(byte 0xff at column 5\)"),
    "bytes after BOM": ({"swh_Latn.txt": b"\xef\xbb\xbfab\xff\n"}, r"line 1 is not UTF-8 \(byte 0xff at column 6\)"),
    "half a surrogate": ({"swh_Latn.jsonl": '{"text": "\\ud800"}\n'}, r"swh_Latn\.jsonl: line 1 is not a JSON object"),
    "bytes in gzip": ({"swh_Latn.txt.gz": b"\xff\n"}, r"swh_Latn\.txt\.gz: line 1 is not UTF-8"),
    "no text": ({"swh_Latn.jsonl": '{"text": "a"}\n{"txt": "b"}\n'}, r"swh_Latn\.jsonl: line 2 is not a JSON object"),
    "text is a number": ({"swh_Latn.jsonl": '{"text": 1}\n'}, r"line 1 is not a JSON object with a string"),
    "a number of thousands of digits": ({"swh_Latn.jsonl": '{"text": ' + "1" * 6000 + "}\n"}, r"line 1 is not a JSON object"),
    "nested too deeply": ({"swh_Latn.jsonl": "[" * 100_000 + "\n"}, r"line 1 is not a JSON object"),
    "twice": ({"swh_Latn.txt": "a\n", "swh_Latn.jsonl": '{"text": "a"}\n'}, r"swh_Latn has two entries"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_corpus_is_one_sentence(case, tmp_path):
    files, message = BAD[case]
    for name, content in files.items():
        write(tmp_path / "corpus" / name, content)
    with pytest.raises(UserError, match=message) as caught:
        Corpus(tmp_path / "corpus", held_out=0).load("train")
    assert "\n" not in str(caught.value)


def test_damaged_gzip_and_unknown_names(tmp_path, capsys):
    write(tmp_path / "swh_Latn.txt.gz", "text\n" * 1000)
    whole = (tmp_path / "swh_Latn.txt.gz").read_bytes()
    (tmp_path / "swh_Latn.txt.gz").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"swh_Latn\.txt\.gz: damaged gzip file"):
        list(read_documents(tmp_path / "swh_Latn.txt.gz"))
    (tmp_path / "swh_Latn.txt.gz").write_bytes(whole[:20] + b"\xff\xff" + whole[22:])
    with pytest.raises(UserError, match=r"swh_Latn\.txt\.gz: damaged gzip file"):
        list(read_documents(tmp_path / "swh_Latn.txt.gz"))
    write(tmp_path / "swahili.txt", "text\n")
    with pytest.raises(UserError, match=r"there is no language 'eng_Latn'; it holds swh_Latn"):
        Corpus(tmp_path, languages=("eng_Latn",))
    assert "skipped swahili.txt" in capsys.readouterr().err
