"""Tests of tools.get_benchmark and tools.bible: Taxi1500 built from labels and Bible editions, and the
other benchmarks downloaded from a local server."""

import functools
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fetch import entry
from test_fetch import server as server  # a fixture
from test_tasks import BIBLES, FILES, ROWS, SENTENCES, write_rows

from mala.benchmarks.tasks import Taxi1500
from mala.cli import UserError, run
from tools import get_benchmark
from tools.bible import SCRIPTS, SPLITS, language_of, read_edition
from tools.get_benchmark import (
    SOURCES,
    build_taxi1500,
    download_flores,
    download_pbc,
    download_published,
    main,
    read_labels,
)
from tools.more_tasks import ALL_TASKS

NAMES = Taxi1500.labels
ENGLISH = {
    "train": ["41001003", "41001001", "41001009"],
    "dev": ["41001002", "41001007"],
    "test": ["41001005", "41001004"],
}
WHOLE = "".join(f"{id}\tverse {id}\n" for ids in ENGLISH.values() for id in sorted(ids))


def label(id):
    return NAMES[int(id) % len(NAMES)]


def write_labels(folder, file="eng_{split}.tsv", english=ENGLISH):
    for split, ids in english.items():
        path = folder / file.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{id}\t{label(id)}\tEnglish {id}\n" for id in ids))
    return folder


@pytest.fixture
def labels(tmp_path):
    return write_labels(tmp_path / "labels")


def edition(folder, name, text):
    path = folder / name
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(out):
    """Return {file: text} of everything in `out`."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(file.relative_to(out)): file.read_bytes().decode() for file in files}


def plain_build(english, editions, min_verses):
    """Build Taxi1500 in the plainest way. Return {file: text}. editions: {language: {id: text}}."""
    files = {}
    for language, verses in editions.items():
        texts = {id: text.replace("\t", " ") for id, text in verses.items() if text.strip()}
        rows = {
            split: [f"{id}\t{label(id)}\t{texts[id]}\n" for id in ids if id in texts]
            for split, ids in english.items()
        }
        if sum(map(len, rows.values())) >= min_verses and all(rows.values()):
            files |= {f"{language}/{language}_{split}.tsv": "".join(rows[split]) for split in SPLITS}
    return files


NUMBERS = [f"4100100{i}" for i in range(10)]
TEXTS = st.one_of(
    st.text(st.sampled_from('ab "\t\u2028\x85#🙂й'), max_size=6),
    st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), min_size=1, max_size=8),
)
VERSES = st.dictionaries(st.sampled_from(NUMBERS), TEXTS)
EDITIONS = st.dictionaries(st.sampled_from(["aaa_Latn", "bbb_Cyrl"]), VERSES, min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.permutations(NUMBERS[:8]), st.sampled_from([(1, 2), (3, 5), (6, 7)]), EDITIONS, st.integers(1, 8))
def test_as_a_plain_implementation(order, ends, editions, min_verses):
    english = {"train": order[: ends[0]], "dev": order[ends[0] : ends[1]], "test": order[ends[1] :]}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lines = {
            name: [f"{id}\t{text}\n" for id, text in verses.items()] for name, verses in editions.items()
        }
        files = [edition(folder, f"{name}.txt", "# a: b\n" + "".join(lines[name])) for name in editions]
        expected = plain_build(english, editions, min_verses)
        labels = write_labels(folder / "labels", english=english)
        written, left_out = build_taxi1500(labels, files, folder / "out", min_verses)
        assert read(folder / "out") == expected
        assert written == sorted({name.split("/")[0] for name in expected})
        assert {name[:8] for name in left_out} | set(written) == set(editions)  # all are reported


@needs_shared
def test_the_published_rows_come_back(tmp_path):
    """Rebuild 26 languages from verse files in Bible order that name only the language: equal to the byte."""
    source, files = SHARED / "taxi1500", []
    for folder in sorted(path for path in source.iterdir() if path.name != "eng_Latn"):
        texts = [(folder / f"{folder.name}_{split}.tsv").read_text() for split in SPLITS]
        lines = [line for text in texts for line in text.splitlines()]
        verses = sorted(line.split("\t")[0] + "\t" + line.split("\t")[2] for line in lines)
        files.append(edition(tmp_path, f"{folder.name[:3]}-x-bible.txt", "\n".join(["# x: y", *verses])))
    few = {"ake_Latn": "760", "dik_Latn": "773", "jiv_Latn": "766", "kbh_Latn": "640"}  # of 1,077 verses
    few = {language: f"it has {count} labelled verses, fewer than 900" for language, count in few.items()}

    written, left_out = build_taxi1500(source, files, tmp_path / "out", min_verses=1)
    assert left_out == {} and len(written) == 25
    expected = {name: text for name, text in read(source).items() if name.endswith(".tsv")}
    expected = {name: text for name, text in expected.items() if not name.startswith("eng_Latn")}
    assert read(tmp_path / "out") == expected

    written, left_out = build_taxi1500(source / "eng_Latn", files, tmp_path / "published")
    assert left_out == few
    enough = {name: text for name, text in expected.items() if name[:8] not in few}
    assert read(tmp_path / "published") == enough


@needs_shared
def test_scripts_of_real_texts():
    """In about 280 languages of the Universal Declaration, the letters tell the script in the file's name."""
    files = sorted((SHARED / "udhr").glob("???_????.txt"))
    assert len(files) > 250
    for file in files:
        if file.name != "blt_Tale.txt":  # its text is in Tai Viet
            found = language_of("xxx.txt", {}, file.read_text(encoding="utf-8").splitlines())
            assert found == f"xxx_{file.name[4:8]}"


@pytest.mark.parametrize("file", ["eng_{split}.tsv", "eng_Latn_{split}.tsv", "eng_Latn/eng_Latn_{split}.tsv"])
def test_where_the_labels_lie(tmp_path, file):
    rows, verses = read_labels(write_labels(tmp_path, file))
    assert {split: [id for id, _ in rows[split]] for split in rows} == ENGLISH
    assert rows["dev"][0] == ("41001002", label("41001002")) and verses["41001002"] == "English 41001002"


def test_forms_of_an_edition(tmp_path, labels):
    """Read BOM, CRLF, gzip, header, blank lines, verses commented out or absent, tabs, no last newline."""
    plain = WHOLE.replace("verse 41001007", "a  b ").replace("41001009\tverse 41001009\n", "")
    header = "\ufeff# closest ISO 639-3:    ccc\n#41001009\tcommented\n\n"
    odd = header + plain.replace("a  b ", "a\t\tb\t") + "41001008\n"
    files = [
        edition(tmp_path, "aaa_Latn.txt", plain),
        edition(tmp_path, "bbb_Latn.txt.gz", odd.replace("\n", "\r\n") + "41001009\t \r\n\t\n"),
        edition(tmp_path, "xxx-x-bible.txt", odd.removesuffix("\n")),
    ]
    written, _ = build_taxi1500(labels, files, tmp_path / "out", 6)
    found = read(tmp_path / "out")
    assert written == ["aaa_Latn", "bbb_Latn", "ccc_Latn"] and len(found) == 9
    in_the_order_of_the_labels = [f"{id}\t{label(id)}\tverse {id}\n" for id in ("41001003", "41001001")]
    assert found["aaa_Latn/aaa_Latn_train.tsv"] == "".join(in_the_order_of_the_labels)
    assert "\ta  b \n" in found["aaa_Latn/aaa_Latn_dev.tsv"]
    for split in SPLITS:
        assert found[f"bbb_Latn/bbb_Latn_{split}.tsv"] == found[f"ccc_Latn/ccc_Latn_{split}.tsv"]
        assert found[f"aaa_Latn/aaa_Latn_{split}.tsv"] == found[f"bbb_Latn/bbb_Latn_{split}.tsv"]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "41001001 without a tab",
            r"line 2 begins with '41001001 without a tab', expected a verse id of 8 digits and a tab",
        ),
        ("٤١٠٠١٠٠١\tother digits", r"line 2 begins with '٤١٠٠١٠٠١', expected"),
        ("\tno id", r"line 2 begins with '', expected"),
        ("410010011\tnine digits", r"line 2 begins with '410010011', expected"),
        (
            "41001001\tone\n43001001\ttwo\n43001001\tthree",
            r"line 4 has the verse id 43001001 for the second time",
        ),
        ("41001001\t\n41001001\ttwo", r"line 3 has the verse id 41001001 for the second time"),
        (b"41001001\t\xff", r"line 2 is not UTF-8"),
    ],
)
def test_wrong_lines(tmp_path, labels, text, message):
    right = edition(tmp_path, "aaa_Latn.txt", WHOLE)
    data = text if isinstance(text, bytes) else text.encode()
    wrong = edition(tmp_path, "bbb_Latn.txt", b"# a header\n" + data)
    with pytest.raises(UserError, match=rf"bbb_Latn\.txt: {message}"):
        build_taxi1500(labels, [right, wrong], tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_an_id_alone_is_an_absent_verse():
    lines = enumerate(["# Notes: a: b", "41001001", "41001002\t", "41001003\tyes", "41001004\tnot wanted"], 1)
    header, verses = read_edition("x", lines, {"41001001", "41001002", "41001003"})
    assert header == {"notes": "a: b"} and verses == {"41001003": "yes"}


def test_which_language():
    latin, header = ["Łódź, naïve ʻokina"], {"closest iso 639-3": "azj", "iso 15924": "Cyrl"}
    assert language_of("d/swh_Latn.txt", header, ["один"]) == "swh_Latn"
    assert language_of("d/swh_Latn-2020.txt.gz", header, ["один"]) == "swh_Latn"
    assert language_of("d/aze-x-bible.txt", header, latin) == "azj_Cyrl"
    assert language_of("d/aze-x-bible.txt", {"iso 15924": "Cyrl"}, latin) == "aze_Cyrl"
    assert language_of("d/Bible.txt", {"closest iso 639-3": "azj"}, latin) == "azj_Latn"
    empty = {"iso 15924": "", "closest iso 639-3": "?"}
    assert language_of("d/eng_engbsb.ebible.txt", empty, latin) == "eng_Latn"
    assert language_of("d/eng_Engbsb.txt", {}, latin) == "eng_Latn"  # Engb is no script
    words = """
        ܟܬܒܐ Syrc  ひらがなと漢字 Jpan  起初神創造天地 Hani  태초에 Hang  ⲁⲣⲭⲏ Copt  በመጀመሪያ Ethi  ߊߞߏ Nkoo
        ᱚᱞ Olck  ᎠᎴ Cher  ᐃᓄᒃ Cans  အစ Mymr  आरम्भ Deva  ⵣⵓⵍ Tfng  abв Latn
    """.split()
    for text, script in zip(words[::2], words[1::2]):
        assert language_of("xyz.txt", {}, [text, "123 , “”"]) == f"xyz_{script}", text
    assert all(re.fullmatch("[A-Z][a-z]{3}", script) for script in SCRIPTS.values()) and len(SCRIPTS) >= 35


@pytest.mark.parametrize(
    "name, texts, message",
    [
        ("swahili.txt", ["abc"], "found no language; begin the file's name with it, as in swh_Latn.txt"),
        ("swh.txt", ["1 2 3"], "found no script; add it to the file's name, as in swh_Latn.txt"),
        ("akk.txt", ["𒀀𒀁𒀂 a"], "found no script"),
    ],
)
def test_language_not_to_be_found(name, texts, message):
    with pytest.raises(UserError, match=rf"d/{name}: {message}"):
        language_of(f"d/{name}", {}, texts)


def test_of_several_editions_the_fullest(tmp_path, labels):
    lines = WHOLE.splitlines(keepends=True)
    more = "".join(f"43{i:06}\tnot labelled\n" for i in range(1, 50))
    files = [
        edition(tmp_path, "aaa_Latn-d.txt", "".join(lines).replace("verse", "d")),
        edition(tmp_path, "aaa_Latn-c.txt", "".join(lines).replace("verse", "c")),
        edition(tmp_path, "aaa-b.txt", "".join(lines[1:]).replace("verse", "b") + more),
    ]
    for order in (files, files[::-1]):
        assert build_taxi1500(labels, order, tmp_path / "out", 1) == (["aaa_Latn"], {})
        assert "\tc 41001005\n" in read(tmp_path / "out")["aaa_Latn/aaa_Latn_test.tsv"]


def test_left_out(tmp_path, labels):
    keep = WHOLE.splitlines(keepends=True)
    files = [
        edition(tmp_path, "aaa_Latn.txt", WHOLE),
        edition(tmp_path, "bbb_Latn.txt", "".join(keep[:-2]) + "41001099\tno dev and test\n"),
        edition(tmp_path, "ccc_Latn.txt", "".join(keep[1:])),
        edition(tmp_path, "ddd_Latn.txt", "41001099\tno label\n"),
        edition(tmp_path, "eee_Latn.txt", ""),
    ]
    none = "it has none of the labelled verses"
    written, left_out = build_taxi1500(labels, files, tmp_path / "out", 5)
    assert written == ["aaa_Latn", "ccc_Latn"]
    assert left_out == {
        "bbb_Latn": "it has no verse of the test split",
        "ddd_Latn.txt": none,
        "eee_Latn.txt": none,
    }
    written, left_out = build_taxi1500(labels, files, tmp_path / "out2", 7)
    assert written == ["aaa_Latn"] and left_out["ccc_Latn"] == "it has 6 labelled verses, fewer than 7"
    written, left_out = build_taxi1500(labels, files, tmp_path / "out3")
    assert not written and left_out["aaa_Latn"] == "it has 7 labelled verses, fewer than 900"
    assert not (tmp_path / "out3").exists()


def test_a_folder_is_replaced_as_a_whole(tmp_path, labels):
    for old in (tmp_path / "out/aaa_Latn/old", tmp_path / "out/zzz_Latn/kept"):
        old.parent.mkdir(parents=True)
        old.touch()
    build_taxi1500(labels, [edition(tmp_path, "aaa_Latn.txt", WHOLE)], tmp_path / "out", 1)
    assert sorted(read(tmp_path / "out")) == [
        *(f"aaa_Latn/aaa_Latn_{split}.tsv" for split in sorted(SPLITS)),
        "zzz_Latn/kept",
    ]


def test_wrong_labels(tmp_path, labels):
    with pytest.raises(UserError, match=r"none: there is no such folder"):
        read_labels(tmp_path / "none")
    message = r"no English labels, expected eng_\{train,dev,test\}\.tsv or .*get_benchmark taxi1500"
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path)
    (labels / "eng_dev.tsv").unlink()
    with pytest.raises(UserError, match=r"eng_dev\.tsv: there is no such file"):
        read_labels(labels)


def test_the_labels_are_not_overwritten(tmp_path):
    out = write_labels(tmp_path / "out", "eng_Latn/eng_Latn_{split}.tsv")
    file, before = edition(tmp_path, "eng_Latn.txt", WHOLE), read(out)
    for place in (out, out / "eng_Latn"):
        message = r"out/eng_Latn: holds the labels, and an English edition would replace it"
        with pytest.raises(UserError, match=message):
            build_taxi1500(place, [file], out, 1)
    assert read(out) == before
    assert build_taxi1500(out, [file], tmp_path / "else", 1) == (["eng_Latn"], {})
    assert "\tverse 41001005\n" in read(tmp_path / "else")["eng_Latn/eng_Latn_test.tsv"]


def test_command_line(tmp_path, labels, monkeypatch, capsys):
    edition(tmp_path, "aaa_Latn.txt", WHOLE)
    edition(tmp_path, "bbb_Latn.txt", WHOLE.splitlines()[0])
    monkeypatch.chdir(tmp_path)
    command = "get_benchmark build-taxi1500 --labels labels --verses aaa_Latn.txt bbb_Latn.txt --min-verses 7"
    for more, out in (("", "data/taxi1500"), (" --out here", "here")):
        monkeypatch.setattr(sys, "argv", (command + more).split())
        run(main)
        assert capsys.readouterr().out.splitlines() == [
            "left out bbb_Latn: it has 1 labelled verses, fewer than 7",
            f"{out}: wrote 1 languages: aaa_Latn",
            "evaluate: python evaluate.py --bench taxi1500" + more.replace("--out", "--data"),
        ]
        assert len(Taxi1500(tmp_path / out).rows("aaa_Latn", "train")) == 3
    for wrong, message in {
        "get_benchmark": "required: command",
        "get_benchmark nll": "argument command: invalid choice: 'nll'",
        "get_benchmark build-taxi1500 --labels x": "required: --verses",
        command + " --min-verses few": "--min-verses: invalid int value",
        command.replace("bbb", "ccc"): "ccc_Latn.txt: No such file or directory",
    }.items():
        monkeypatch.setattr(sys, "argv", wrong.split())
        with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
            run(main)


def serve(server, bench, tmp_path):
    """Put the Swahili rows of tests/test_tasks.py on the server, at the address of the published file."""
    owner, folder = SOURCES[bench]
    path = folder + FILES[bench].removeprefix("data/")
    write_rows(tmp_path / "published", bench, file=path)
    data = (tmp_path / "published" / path).read_bytes()
    if bench == "xcopa":
        server.files["/raw/file"] = data
        listing = [{"type": "file", "path": path, "size": len(data), "sha": entry(path, data)["oid"],
                    "download_url": f"{server.url}/raw/file"}]  # fmt: skip
        for theirs in ALL_TASKS[bench].names.values():
            here = listing if theirs == "sw" else []
            server.files[f"/repos/{owner}/contents/{folder}{theirs}"] = json.dumps(here).encode()
    else:
        beside = [entry("README.md", b""), entry(f"{folder}xyz.tsv", b"x")]
        server.files[f"/datasets/{owner}/resolve/main/{path}"] = data
        address = f"/api/datasets/{owner}/tree/main/{folder.strip('/')}?recursive=true"
        server.files[address] = json.dumps([*beside, entry(path, data)]).encode()
    return data


@pytest.mark.parametrize("bench", SOURCES)
def test_further_benchmarks(bench, server, tmp_path, monkeypatch, capsys):
    data = serve(server, bench, tmp_path)
    here = functools.partial(download_published, hub=server.url, github=server.url)
    monkeypatch.setattr(get_benchmark, "download_published", here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["get_benchmark", bench])
    run(main)
    *left_out, wrote, evaluate = capsys.readouterr().out.splitlines()
    assert wrote == f"data/{bench}: wrote 1 languages: swh_Latn"
    assert evaluate == f"evaluate: python evaluate.py --bench {bench}"
    # All languages that are missing on this server are reported:
    assert len(left_out) == max(0, len(ALL_TASKS[bench].names) - 1)
    task = ALL_TASKS[bench](tmp_path / "data" / bench)
    assert task.languages() == ["swh_Latn"] and len(task.rows("swh_Latn", "test")) == len(ROWS[bench])
    assert task.path("swh_Latn", "test").read_bytes() == data
    with pytest.raises(UserError, match="there is no language 'xyz_Latn'"):
        here(bench, tmp_path / "else", ["xyz_Latn"])
    assert not (tmp_path / "else").exists()


def test_flores(server, tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for language, texts in SENTENCES.items():
            for split in ("dev", "devtest"):
                for name in (f"./flores200_dataset/{split}/{language}.{split}", f"./../{language}.{split}"):
                    data = "".join(f"{text}\n" for text in texts).encode()
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    body = packed.getvalue()
    server.files["/nllb/flores200_dataset.tar.gz"] = body
    monkeypatch.setattr(get_benchmark, "FLORES_FILE", (len(body), hashlib.sha256(body).hexdigest()))
    download = functools.partial(download_flores, url=server.url + "/nllb/flores200_dataset.tar.gz")
    assert download(tmp_path / "all") == (sorted(SENTENCES), {})
    text = (tmp_path / "all/flores200_dataset/devtest/swh_Latn.devtest").read_text()
    assert text.splitlines() == SENTENCES["swh_Latn"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 6  # nothing else
    assert download(tmp_path / "one", ["amh_Ethi"]) == (["amh_Ethi"], {})
    names = sorted(path.name for path in (tmp_path / "one").rglob("*Ethi.dev*"))
    assert names == ["amh_Ethi.dev", "amh_Ethi.devtest"]
    with pytest.raises(UserError, match="there is no language 'xyz_Latn'; it holds amh_Ethi"):
        download(tmp_path / "none", ["xyz_Latn"])
    monkeypatch.setattr(get_benchmark, "FLORES_FILE", (len(body), "0" * 64))
    with pytest.raises(UserError, match="has the checksum .*; it has been deleted"):
        download(tmp_path / "other")


def test_bibles_that_are_free(server, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, verses in BIBLES.items():
            lines = "".join(f"{id}\t{text}\n" for id, text in verses.items())
            archive.writestr(f"corpus/{name}.txt", "# year: 1900\n" + lines)
        archive.writestr("corpus/bad.txt", "no verse\n")
    server.files["/Bibles.zip"] = packed.getvalue()
    download = functools.partial(download_pbc, corpus=server.url + "/Bibles.zip")
    written, left_out = download(tmp_path / "all")
    assert written == ["amh_Ethi", "eng_Latn", "swh_Latn"] and list(left_out) == ["bad.txt"]
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == sorted(f"{name}.txt" for name in BIBLES)
    text = (tmp_path / "all/swh-x-bible-old.txt").read_text()
    assert text.rstrip("\n") == "# year: 1900\n40001001\tKitabu\n40001002\tIbrahimu"
    assert download(tmp_path / "one", ["amh_Ethi"]) == (["amh_Ethi"], {})
    server.files["/Bibles.zip"] = b"<html>"
    with pytest.raises(UserError, match=r"\.Bibles\.zip: was damaged \(.*\) and has been deleted; run the"):
        download(tmp_path / "none")
