"""Tests of tools.fetch and tools.get_benchmark with a local server that drops, damages and delays files."""

import functools
import hashlib
import http.server
import io
import json
import os
import random
import signal
import sys
import threading
import time
import zipfile

import pytest
from tqdm import tqdm

from mala.benchmarks.tasks import SIB200, Taxi1500
from mala.cli import UserError, run
from tools import fetch, get_benchmark
from tools.fetch import File, download, download_all, list_files
from tools.get_benchmark import download_sib200, download_taxi1500

BODY = random.Random(0).randbytes(300_000)


def git_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


GIT, SHA256 = git_sha(BODY), hashlib.sha256(BODY).hexdigest()
CHECKS = dict(size=len(BODY), checksum=GIT)


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the server's `files[address]`. Each request takes a step of `plans[address]`; the last one stays."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.log.append((self.path, asked))
        plan = server.plans.get(self.path) or [{}]
        step = plan.pop(0) if len(plan) > 1 else plan[0]
        body = step.get("body", server.files.get(self.path, b""))
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and "no_range" not in step else 0
        status = step.get("status", 404 if self.path not in server.files else 206 if first else 200)
        self.send_response(416 if first and first >= len(body) else status)
        rest = body[first:] if status < 300 else b""
        if "no_length" not in step:
            self.send_header("Content-Length", str(len(rest)))
        if self.path in server.links:
            self.send_header("Link", server.links[self.path])
        self.end_headers()
        self.wfile.write(rest[: step.get("drop", len(rest))])
        if "then" in step:
            step["then"](self)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "WAITS", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # when the client breaks a connection off
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.links, server.plans = {"/file": BODY}, {}, {}
    server.log = []  # (address, Range)
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    yield server
    server.shutdown()
    server.server_close()


def ranges(server, address="/file"):
    return [asked for path, asked in server.log if path == address]


def get(url, path, **checks):
    """Download one file. Return the count of the progress bar."""
    with tqdm(file=io.StringIO()) as bar:
        download(File(url, **checks), path, bar, threading.Event())
        return bar.n


def test_whole_files(server, tmp_path):
    for name, body, step in (("a", BODY, {}), ("b", BODY, {"no_length": True}), ("c", b"", {})):
        server.files["/file"], server.plans["/file"] = body, [step]
        path, checks = tmp_path / "new" / name, dict(size=len(body), checksum=git_sha(body))
        assert get(server.url + "/file", path, **checks) == len(body)
        assert path.read_bytes() == body
    assert ranges(server) == [None] * 3 and sorted(os.listdir(tmp_path / "new")) == ["a", "b", "c"]


def test_what_broke_off_goes_on_in_this_run_and_in_the_next(server, tmp_path):
    server.plans["/file"] = [{"drop": 40_000}, {"status": 503}, {"drop": 40_000}, {"status": 403}]
    with pytest.raises(UserError, match=r"403 \(Forbidden\)"):
        get(server.url + "/file", tmp_path / "file", **CHECKS)
    assert (tmp_path / ".file.part").read_bytes() == BODY[:80_000] and os.listdir(tmp_path) == [".file.part"]
    server.plans["/file"] = [{"drop": 100_000}, {}]
    assert get(server.url + "/file", tmp_path / "file", **CHECKS) == len(BODY)
    assert (tmp_path / "file").read_bytes() == BODY and os.listdir(tmp_path) == ["file"]
    assert ranges(server) == [None, *[f"bytes={n}-" for n in (40_000, 40_000, 80_000, 80_000, 180_000)]]


@pytest.mark.parametrize("step, size", [({"no_range": True}, 1000), ({}, 400_000), ({}, len(BODY))], ids=str)
def test_a_part_that_cannot_be_continued(server, tmp_path, step, size):
    """If the server ignores Range or has no byte after the part (416), everything is downloaded again."""
    (tmp_path / ".file.part").write_bytes(b"x" * size)
    server.plans["/file"] = [step]
    get(server.url + "/file", tmp_path / "file", **CHECKS)
    assert (tmp_path / "file").read_bytes() == BODY and ranges(server)[0] == f"bytes={size}-"


@pytest.mark.parametrize("right", [{"size": len(BODY)}, {"checksum": GIT}, {"checksum": SHA256}], ids=str)
def test_wrong_size_or_checksum(server, tmp_path, right):
    server.plans["/file"] = [{"body": BODY[:-1] if "size" in right else b"x" + BODY[1:]}, {}]
    message = r"/file: has .*expected (300,000|[0-9a-f]{40,64}).*; it has been deleted: run the command"
    with pytest.raises(UserError, match=message):
        get(server.url + "/file", tmp_path / "file", **right)
    assert os.listdir(tmp_path) == []
    for _ in range(2):  # the file is not requested again once it is there
        get(server.url + "/file", tmp_path / "file", **right)
        assert (tmp_path / "file").read_bytes() == BODY and len(server.log) == 2
    (tmp_path / "file").write_bytes(BODY[1:])
    get(server.url + "/file", tmp_path / "file", **right)
    assert (tmp_path / "file").read_bytes() == BODY and len(server.log) == 3


def test_errors_in_one_sentence(server, tmp_path):
    with pytest.raises(UserError, match=r"/none: the server answered 404 \(Not Found\); check in a browser"):
        get(server.url + "/none", tmp_path / "none")
    assert len(server.log) == 1  # there is no retry, which would fail too
    server.plans["/file"] = [{"drop": 1000, "no_range": True}]
    message = r"/file: .*broke off after 1,000 of 300,000 bytes.*check the network and run"
    with pytest.raises(UserError, match=message):
        get(server.url + "/file", tmp_path / "b")
    assert ranges(server) == [None, *["bytes=1000-"] * 3]
    message = r"^http://127.0.0.1:9/x: the connection failed \(.*refused\).*check the network"
    with pytest.raises(UserError, match=message):
        get("http://127.0.0.1:9/x", tmp_path / "x")
    assert os.listdir(tmp_path) == [".b.part"]
    with pytest.raises(UserError, match="b.part/a: Not a directory; free space or use another folder"):
        get(server.url + "/file", tmp_path / ".b.part" / "a" / "file")
    if os.path.exists("/dev/full"):
        (tmp_path / ".file.part").symlink_to("/dev/full")
        with pytest.raises(UserError, match="/file: No space left on device; free space"):
            get(server.url + "/file", tmp_path / "file")


def dribble(handler):
    for i in range(100_000, 102_000):  # one byte at a time, until the client hangs up
        handler.wfile.write(BODY[i : i + 1])
        time.sleep(0.01)


def test_ctrl_c_leaves_the_parts(server, tmp_path):
    three_at_a_time, interrupt = 3, lambda: os.kill(os.getpid(), signal.SIGINT)
    together = threading.Barrier(three_at_a_time, action=interrupt, timeout=5)

    def then(handler):
        part = tmp_path / f".{handler.path[1:]}.part"
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        together.wait()
        dribble(handler)

    for name in "abc":
        server.files[f"/{name}"], server.plans[f"/{name}"] = BODY, [{"drop": 100_000, "then": then}, {}]
    wanted = {tmp_path / name: File(f"{server.url}/{name}", **CHECKS) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        download_all(wanted)
    assert sorted(os.listdir(tmp_path)) == [".a.part", ".b.part", ".c.part"]
    came = {name: (tmp_path / f".{name}.part").stat().st_size for name in "abc"}
    download_all(wanted)
    assert all((tmp_path / name).read_bytes() == BODY for name in "abc")
    assert all(ranges(server, f"/{name}") == [None, f"bytes={came[name]}-"] for name in "abc")


def test_many_files_and_a_bar(server, tmp_path, monkeypatch):
    terminal, wanted = io.StringIO(), {}
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for i in range(12):
        server.files[f"/{i}"] = BODY[: 1000 * i]
        wanted[tmp_path / str(i)] = File(f"{server.url}/{i}", 1000 * i, git_sha(BODY[: 1000 * i]))
    for _ in range(2):
        download_all(wanted)
        assert all((tmp_path / str(i)).read_bytes() == BODY[: 1000 * i] for i in range(12))
        assert len(server.log) == 12
    assert "/66.0k [" in terminal.getvalue()


def test_the_first_error_stops_the_others(server, tmp_path):
    names = [str(i) for i in range(20)]
    for name in names:
        server.files[f"/{name}"], server.plans[f"/{name}"] = BODY, [{"drop": 100_000, "then": dribble}]
    wanted = {tmp_path / name: File(f"{server.url}/{name}", len(BODY)) for name in ["0", "none", *names]}
    with pytest.raises(UserError, match="/none: the server answered 404"):
        download_all(wanted, workers=3)
    assert len(server.log) < 10 and all(name.endswith(".part") for name in os.listdir(tmp_path))


def entry(path, data, **more):
    return {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)} | more


def test_listings(server):
    lfs = {"oid": "ab" * 32, "size": 5 * 10**9, "pointerSize": 135}
    pages = [
        [entry("a/1", b"1"), {"type": "directory", "path": "a", "oid": "0"}],
        [entry("b/2", b"22", lfs=lfs)],
        [],
    ]
    for number, page in enumerate(pages):
        server.files[f"/list?page={number}"] = json.dumps(page).encode()
        link = f'<{server.url}/>; rel="prev", <{server.url}/list?page={number}>; rel="next"'
        server.links[f"/list?page={number - 1}"] = link
    server.plans["/list?page=1"] = [{"status": 503}, {"drop": 20}, {}]
    assert list_files(server.url + "/list?page=0") == {
        "a/1": File("", 1, git_sha(b"1")),
        "b/2": File("", 5 * 10**9, "ab" * 32),
    }
    for answer in (b"<html>", b'{"error": "x"}', b"[1]", b'[{"type": "file"}]', b"null", b"\xff"):
        server.files["/list"] = answer
        with pytest.raises(UserError, match="/list: found .*expected a JSON list of files; open it"):
            list_files(server.url + "/list")


def command(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["get_benchmark", *line.split()])
    run(get_benchmark.main)


def test_sib200(server, tmp_path, monkeypatch, capsys):
    listing = [entry("data/labels.txt", b""), entry("data/ddd_Latn/test.tsv", b"x")]
    for language in ("aaa_Latn", "bbb_Cyrl", "ccc_Arab"):
        for split in ("train", "dev", "test"):
            text = f'index_id\tcategory\ttext\n1\ttravel\t{language} {split} "жёлтый\n'.encode()
            server.files[f"/datasets/Davlan/sib200/resolve/main/data/{language}/{split}.tsv"] = text
            listing.append(entry(f"data/{language}/{split}.tsv", text))
    address = "/api/datasets/Davlan/sib200/tree/main/data?recursive=true"
    server.files[address] = json.dumps(listing).encode()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(get_benchmark, "download_sib200", functools.partial(download_sib200, hub=server.url))

    command(monkeypatch, "sib200")
    assert SIB200(tmp_path / "data/sib200").rows("bbb_Cyrl", "dev")[0].text == 'bbb_Cyrl dev "жёлтый'
    assert capsys.readouterr().out.splitlines() == [
        "left out ddd_Latn: not all of its splits are published",
        "data/sib200: wrote 3 languages: aaa_Latn, bbb_Cyrl, ccc_Arab",
        "evaluate: python evaluate.py --bench sib200",
    ]
    command(monkeypatch, "sib200 --langs ccc_Arab,aaa_Latn --out else")
    assert SIB200(tmp_path / "else").languages() == ["aaa_Latn", "ccc_Arab"]
    for language, message in {
        "xyz_Latn": "no language 'xyz_Latn'",
        "ddd_Latn": "none: no language could be written",
    }.items():
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, f"sib200 --langs {language} --out none")


IDS = [f"40{i:06}" for i in range(1, 1001)]
SPLITS = {"train": IDS[:800], "dev": IDS[800:900], "test": IDS[900:]}
LISTING = "/repos/cisnlp/Taxi1500/contents/eng_data"


def verses(word, ids=IDS):
    return "".join(f"{id}\t{word} {id}\n" for id in ids)


@pytest.fixture
def taxi1500(server):
    """Return download_taxi1500 for labels and an archive on `server`."""
    listing = [{"type": "dir", "path": "eng_data/x"}]
    for split, ids in SPLITS.items():
        lines = [f"{id}\t{Taxi1500.labels[int(id) % 6]}\tverse {id}" for id in ids]
        text = "\n".join(lines).encode()  # without a final newline
        server.files[f"/raw/{split}"] = text
        file = {"type": "file", "path": f"eng_data/eng_{split}.tsv", "size": len(text), "sha": git_sha(text)}
        listing.append(file | {"download_url": f"{server.url}/raw/{split}"})
    server.files[LISTING] = json.dumps(listing).encode()
    header = "# language_name: x\n# closest ISO 639-3: swh\n# ISO 15924: Latn\n"
    editions = {
        "swh-x-bible.txt": header + verses("mstari", IDS[:950]),
        "swh_swhulb.ebible.txt": verses("aya", IDS[::-1]).replace("\n", "\r\n") + "41001001\tzaidi\r\n",
        "heb-x-bible.txt": "\ufeff" + verses("פסוק", IDS[:-100] + IDS[-50:]),
        "xxx-x-bible.txt": verses("too few", IDS[200:]),
        "yyy-x-bible.txt": verses("abc") + "no verse\n",
        "eng_engbsb.ebible.txt": verses("another English"),
        "Bible.txt": verses("of no language"),
        "README.md": "no edition",
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in editions.items():
            archive.writestr(f"Taxi1500-c/{name}", text)
    server.files["/Bibles.zip"] = packed.getvalue()
    return functools.partial(download_taxi1500, github=server.url, corpus=server.url + "/Bibles.zip")


def test_taxi1500(server, taxi1500, tmp_path, capsys):
    server.plans["/Bibles.zip"] = [{"drop": 1000}, {}]
    written, left_out = taxi1500(tmp_path)
    assert written == ["eng_Latn", "heb_Hebr", "swh_Latn"]
    assert written == Taxi1500(tmp_path).languages() == sorted(os.listdir(tmp_path))
    why = left_out.pop("yyy-x-bible.txt")
    assert why.startswith("Taxi1500-c/yyy-x-bible.txt: line 1001 begins with 'no verse', expected")
    why = left_out.pop("Bible.txt")
    assert why.startswith("Taxi1500-c/Bible.txt: found no language; begin the file's name")
    assert left_out == {"xxx_Latn": "it has 800 labelled verses, fewer than 900"}
    task = Taxi1500(tmp_path)
    swahili, hebrew = task.rows("swh_Latn", "test"), task.rows("heb_Hebr", "test")
    assert [(row.id, row.text) for row in swahili] == [(id, f"aya {id}") for id in SPLITS["test"]]
    assert [row.text for row in hebrew] == [f"פסוק {id}" for id in SPLITS["test"][-50:]]
    assert (tmp_path / "eng_Latn/eng_Latn_dev.tsv").read_bytes() == server.files["/raw/dev"] + b"\n"
    assert ".Bibles.zip: deleted" in capsys.readouterr().out
    assert ranges(server, "/Bibles.zip") == [None, "bytes=1000-"]


def test_taxi1500_of_some_languages(server, taxi1500, tmp_path):
    assert taxi1500(tmp_path / "a", ["eng_Latn"]) == (["eng_Latn"], {}) and not ranges(server, "/Bibles.zip")
    assert taxi1500(tmp_path / "b", ["swh_Latn"]) == (["swh_Latn"], {})
    assert os.listdir(tmp_path / "b") == ["swh_Latn"]
    message = "there is no language 'swh_Arab'; it holds eng_Latn, heb_Hebr, swh_Latn, xxx_Latn"
    with pytest.raises(UserError, match=message):
        taxi1500(tmp_path / "d", ["swh_Arab"])
    few = {"xxx_Latn": "it has 800 labelled verses, fewer than 900"}
    assert taxi1500(tmp_path / "d", ["xxx_Latn"]) == ([], few)
    assert os.listdir(tmp_path / "d") == [".Bibles.zip"]  # a failed build keeps the download
    assert taxi1500(tmp_path / "d", ["heb_Hebr"])[0] == ["heb_Hebr"] == os.listdir(tmp_path / "d")
    assert ranges(server, "/Bibles.zip") == [None] * 2


def test_taxi1500_from_a_damaged_source(server, taxi1500, tmp_path):
    whole = server.files["/Bibles.zip"]
    at = whole.index(b"swh-x-bible.txt") + 500
    flipped = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
    for damaged in (flipped, b"<html>no archive</html>", whole[:-2000]):
        server.files["/Bibles.zip"] = damaged
        message = r"\.Bibles\.zip: was damaged \(.*\) and has been deleted; run the command again"
        with pytest.raises(UserError, match=message):
            taxi1500(tmp_path)
        assert os.listdir(tmp_path) == []
    server.files[LISTING] = json.dumps(json.loads(server.files[LISTING])[:3]).encode()
    with pytest.raises(UserError, match=r"contents/eng_data: found no eng_test.tsv; look in a browser"):
        taxi1500(tmp_path)
