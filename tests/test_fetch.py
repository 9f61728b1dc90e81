"""mala.fetch and the downloads of mala.tasks, against a server on this machine that can drop, damage and hold back."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import zipfile
from types import SimpleNamespace
from urllib.error import URLError

import pytest
from tqdm import tqdm

from mala import fetch, tasks
from mala.bible import read_archive
from mala.cli import UserError, run
from mala.fetch import File, download, download_all, list_files
from mala.tasks import SIB200, Taxi1500, download_sib200, download_taxi1500

BODY = random.Random(0).randbytes(300_000)


def git_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (address -> bytes). `plans` has, per address, what to do with its next requests; `log` what was asked
    (address, Range header) and how many bytes of a body were sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.links, self.plans, self.log = {}, {}, {}, []

    def handle_error(self, *_):
        pass  # a connection that the client broke off

    def plan(self, address, *steps):
        self.plans[address] = list(steps)

    def asked(self, address):
        return [(entry.range, entry.sent) for entry in self.log if entry.address == address]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, entry = self.server, SimpleNamespace(address=self.path, range=self.headers["Range"], sent=0)
        server.log.append(entry)
        plan = server.plans.get(self.path) or [{}]
        step = plan.pop(0) if len(plan) > 1 else plan[0]  # the last one stays
        self.close_connection = True
        if self.path not in server.files or "status" in step:
            status = step.get("status", 404)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if "content_range" in step:
                self.send_header("Content-Range", step["content_range"])
            self.end_headers()
            return
        body = step.get("body", server.files[self.path])
        found = re.fullmatch(r"bytes=(\d+)-", entry.range or "")
        first = int(found[1]) if found and not step.get("no_range") else None
        if first is not None and first >= len(body):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            if not step.get("mute"):
                self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(200 if first is None else 206)
        first = max(0, (first or 0) + step.get("shift", 0)) if first is not None else 0
        if entry.range and not step.get("no_range"):
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if self.path in server.links:
            self.send_header("Link", server.links[self.path])
        rest = body[first:]
        if step.get("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
        elif not step.get("no_length"):
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if "before" in step:
            step["before"]()
        sent = rest[: step.get("drop", len(rest))]
        if step.get("chunked"):
            sent, end = b"%x\r\n" % len(sent) + sent + b"\r\n", b"" if "drop" in step else b"0\r\n\r\n"
            self.wfile.write(sent + end)
        else:
            self.wfile.write(sent)
        self.wfile.flush()
        entry.sent = len(sent)
        if "after" in step:
            step["after"](self)
        if step.get("reset"):  # RST and not FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "WAITS", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    server.files["/file"] = BODY
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CHECKS = dict(size=len(BODY), git_sha=git_sha(BODY))


def parts(folder):
    return sorted(path.name for path in folder.rglob("*.part"))


@pytest.mark.parametrize("step", [{}, {"chunked": True}, {"no_length": True}], ids=str)
def test_whole_file(server, tmp_path, step):
    server.plan("/file", step)
    download(server.url + "/file", tmp_path / "new" / "file", **CHECKS)
    assert (tmp_path / "new" / "file").read_bytes() == BODY and not parts(tmp_path)
    assert server.log[0].range is None and len(server.log) == 1


def test_empty_file(server, tmp_path):
    server.files["/file"] = b""
    download(server.url + "/file", tmp_path / "file", size=0, git_sha="e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_part_is_continued(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(BODY[:100_000])
    with tqdm(total=len(BODY), file=io.StringIO()) as bar:
        download(server.url + "/file", tmp_path / "file", **CHECKS, bar=bar)
        assert bar.n == len(BODY)
    assert server.asked("/file") == [("bytes=100000-", 200_000)]
    assert (tmp_path / "file").read_bytes() == BODY and not parts(tmp_path)


@pytest.mark.parametrize("step", [
    {"no_range": True}, {"shift": -10}, {"status": 416}, {"status": 416, "content_range": "bytes */999"}
], ids=str)  # fmt: skip
def test_a_server_that_does_not_continue(server, tmp_path, step):
    """It ignores Range, sends another range, or answers 416 though the part is none of the whole: nothing of it is kept."""
    (tmp_path / ".file.part").write_bytes(b"x" * 1000)
    server.plan("/file", step, {})
    with tqdm(total=len(BODY), file=io.StringIO()) as bar:
        download(server.url + "/file", tmp_path / "file", bar=bar)
        assert bar.n == len(BODY)
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.log[0].range == "bytes=1000-" and all(entry.range is None for entry in server.log[1:])


def test_a_complete_part(server, tmp_path):
    """Of known size it is not asked for; otherwise 416 says so, if with the size of the whole."""
    for checks, asked in ((CHECKS, []), ({"sha256": hashlib.sha256(BODY).hexdigest()}, [(f"bytes={len(BODY)}-", 0)])):
        server.log.clear()
        (tmp_path / ".file.part").write_bytes(BODY)
        download(server.url + "/file", tmp_path / "file", **checks)
        assert server.asked("/file") == asked and (tmp_path / "file").read_bytes() == BODY
        (tmp_path / "file").unlink()
    server.plan("/file", {"mute": True})
    (tmp_path / ".file.part").write_bytes(BODY)
    download(server.url + "/file", tmp_path / "file")  # nothing vouches for the part
    assert [entry.range for entry in server.log[1:]] == [f"bytes={len(BODY)}-", None]


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("how", [{}, {"reset": True}, {"chunked": True}], ids=str)
def test_dropped_several_times(server, tmp_path, size, how):
    """More often than there are tries, but each time something came."""
    server.plan("/file", *[how | {"drop": 70_000 if not how else 40_000}] * (4 if not how else 7), {})
    with tqdm(total=size, file=io.StringIO()) as bar:
        download(server.url + "/file", tmp_path / "file", size=size, bar=bar)
        assert bar.n == len(BODY)
    assert (tmp_path / "file").read_bytes() == BODY
    if not how:
        ranges = [None, "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"]
        assert server.asked("/file") == list(zip(ranges, [70_000] * 4 + [20_000]))


@pytest.mark.parametrize("how", [{"drop": 0}, {"drop": 1000, "no_range": True}, {"status": 503}], ids=str)
def test_a_server_that_always_drops(server, tmp_path, how):
    server.plan("/file", how)
    with pytest.raises(UserError, match=r"/file: .*(0 of 300,000|1,000 of 300,000|503).*check the network"):
        download(server.url + "/file", tmp_path / "file")
    assert len(server.log) in (4, 5) and not (tmp_path / "file").exists()  # WAITS, and WAITS since the first 1,000 bytes


def test_what_came_before_an_error_stays(server, tmp_path):
    server.plan("/file", {"drop": 123_456}, {"status": 403})
    with pytest.raises(UserError, match=r"403 \(Forbidden\)"):
        download(server.url + "/file", tmp_path / "file", **CHECKS)
    assert (tmp_path / ".file.part").read_bytes() == BODY[:123_456] and not (tmp_path / "file").exists()
    server.plan("/file", {})
    download(server.url + "/file", tmp_path / "file", **CHECKS)
    assert server.log[-1].range == "bytes=123456-" and (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("check", ["size", "git_sha", "sha256"])
def test_wrong_checksum(server, tmp_path, check):
    right = {"size": len(BODY), "git_sha": git_sha(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}[check]
    wrong = BODY[:-1] if check == "size" else bytes([BODY[0] ^ 1]) + BODY[1:]
    server.plan("/file", {"body": wrong}, {})
    with tqdm(total=len(BODY), file=io.StringIO()) as bar:
        download(server.url + "/file", tmp_path / "file", **{check: right}, bar=bar)
        assert bar.n == len(BODY)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [entry.range for entry in server.log] == [None, None]  # from scratch

    server.plan("/file", {"body": wrong})
    server.log.clear()
    with pytest.raises(UserError, match=rf"/file: has .*expected {right if check != 'size' else '300,000'}, twice"):
        download(server.url + "/file", tmp_path / "other", **{check: right})
    assert len(server.log) == 2 and not (tmp_path / "other").exists() and not parts(tmp_path)


def test_a_wrong_part_is_not_built_upon(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(b"x" * 1000)
    download(server.url + "/file", tmp_path / "file", **CHECKS)
    assert [entry.range for entry in server.log] == ["bytes=1000-", None] and (tmp_path / "file").read_bytes() == BODY


def test_already_there(server, tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    download(server.url + "/file", tmp_path / "file", **CHECKS)
    download(server.url + "/file", tmp_path / "file")
    assert server.log == []
    (tmp_path / "file").write_bytes(BODY[:-1] + b"?")
    download(server.url + "/file", tmp_path / "file", **CHECKS)
    assert len(server.log) == 1 and (tmp_path / "file").read_bytes() == BODY


def test_errors_in_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", pytest.fail)  # none of these is tried again
    monkeypatch.setattr(fetch, "WAITS", (1000,))
    with pytest.raises(UserError, match=r"/none: the server answers 404 \(Not Found\), expected the file; see in a browser"):
        download(server.url + "/none", tmp_path / "none")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"^http://127.0.0.1:{port}/x: cannot be reached \(.*refused\); check the network"):
        download(f"http://127.0.0.1:{port}/x", tmp_path / "x")
    with pytest.raises(UserError, match=r"nowhere.invalid/x: cannot be reached \(.*\); check the network"):
        download("http://nowhere.invalid/x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_goes_away_may_come_back(server, tmp_path, monkeypatch):
    answers = [fetch.urlopen, ConnectionRefusedError(111, "refused"), socket.gaierror(-3, "no name"), fetch.urlopen]

    def urlopen(*args, **named):
        if isinstance(answer := answers.pop(0), OSError):
            raise URLError(answer)
        return answer(*args, **named)

    monkeypatch.setattr(fetch, "urlopen", urlopen)
    server.plan("/file", {"drop": 1000}, {})
    download(server.url + "/file", tmp_path / "file", **CHECKS)
    assert (tmp_path / "file").read_bytes() == BODY and not answers


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_full_disk(server, tmp_path):
    (tmp_path / ".file.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"\.file\.part: could not be written \(No space left on device\); make room"):
        download(server.url + "/file", tmp_path / "file", **CHECKS)
    assert not (tmp_path / "file").exists() and len(server.log) == 1


def dribble(handler, rest=b"x" * 1000):
    """Byte after byte, until the client hangs up."""
    with contextlib.suppress(OSError):
        for i in range(len(rest)):
            handler.wfile.write(rest[i : i + 1])
            time.sleep(0.01)


def test_ctrl_c_leaves_the_parts(server, tmp_path):
    files = {f"/{i}": BODY[i:] for i in range(3)}
    server.files |= files
    together = threading.Barrier(3, timeout=5)

    def after(handler):
        while not (tmp_path / f".{handler.path[1:]}.part").exists():
            time.sleep(0.01)
        if together.wait() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        dribble(handler, files[handler.path][100_000:])

    for address in files:
        server.plan(address, {"drop": 100_000, "after": after}, {})
    wanted = [File(server.url + address, tmp_path / address[1:], len(body), git_sha(body)) for address, body in files.items()]
    with pytest.raises(KeyboardInterrupt):
        download_all(wanted)
    assert parts(tmp_path) == [".0.part", ".1.part", ".2.part"] == sorted(path.name for path in tmp_path.iterdir())
    came = {address: (tmp_path / f".{address[1:]}.part").read_bytes() for address in files}
    assert all(came[address] and body.startswith(came[address]) for address, body in files.items())
    download_all(wanted)
    assert all((tmp_path / address[1:]).read_bytes() == body for address, body in files.items())
    assert all(server.asked(address)[1][0] == f"bytes={len(came[address])}-" for address in files)


def test_several_at_a_time(server, tmp_path):
    """Four requests wait for one another: with fewer workers than that nothing would come."""
    together = threading.Barrier(4, timeout=5)
    wanted = []
    for i in range(12):
        server.files[f"/{i}"] = BODY[: 1000 * i]
        server.plan(f"/{i}", {"before": together.wait})
        wanted.append(File(f"{server.url}/{i}", tmp_path / str(i), 1000 * i, git_sha(BODY[: 1000 * i])))
    download_all(wanted, workers=4)
    assert all((tmp_path / str(i)).read_bytes() == BODY[: 1000 * i] for i in range(12))
    download_all(wanted, workers=4)
    assert len(server.log) == 12


def test_the_first_error_stops_the_others(server, tmp_path):
    server.files |= {f"/{i}": BODY for i in range(20)}
    for i in range(20):
        server.plan(f"/{i}", {"drop": 10, "after": dribble})
    wanted = [File(f"{server.url}/{i}", tmp_path / str(i), len(BODY)) for i in range(20)]
    with pytest.raises(UserError, match="/none: the server answers 404"):
        download_all([wanted[0], File(server.url + "/none", tmp_path / "none"), *wanted[1:]], workers=3)
    assert len(server.log) < 10 and not [path for path in tmp_path.iterdir() if path.suffix != ".part"]


def entry(path, data, **more):
    return {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)} | more


def test_listing_of_several_pages(server):
    lfs = {"oid": "ab" * 32, "size": 5_000_000_000, "pointerSize": 135}
    pages = [
        [entry("a/1", b"1"), {"type": "directory", "path": "a", "size": 0, "oid": "00"}],
        [entry("b/2", b"22", lfs=lfs)],
        [],
    ]
    for number, page in enumerate(pages):
        server.files[f"/list?page={number}"] = json.dumps(page).encode()
    server.links["/list?page=0"] = f'<{server.url}/list?page=1>; rel="next"'
    server.links["/list?page=1"] = '</list?page=0>; rel="prev", </list?page=2>; rel="next"'
    server.plan("/list?page=1", {"status": 503}, {"drop": 20}, {})
    assert list_files(server.url + "/list?page=0") == [
        File("", "a/1", 1, git_sha=git_sha(b"1")),
        File("", "b/2", 5_000_000_000, sha256="ab" * 32),
    ]


def test_listing_of_github(server):
    found = {"name": "x", "path": "f/x", "sha": "12", "size": 3, "type": "file", "download_url": "https://raw/x"}
    server.files["/contents"] = json.dumps([found, {"type": "dir", "path": "f/y"}]).encode()
    assert list_files(server.url + "/contents") == [File("https://raw/x", "f/x", 3, git_sha="12")]


@pytest.mark.parametrize(
    "answer", [b"<html>", b"{}", b'{"error": "x"}', b"[1]", b'[{"type": "file"}]', b"null", b"\xff", b"[" * 9**6]
)
def test_no_listing(server, answer):
    server.files["/list"] = answer
    if answer == b"{}":  # an object without a file in it
        assert list_files(server.url + "/list") == []
        return
    with pytest.raises(UserError, match="/list: found .*expected a JSON list of files"):
        list_files(server.url + "/list")


def sib200_hub(server):
    """Three languages and what else the hub holds, over two pages."""
    listing = [entry("data/labels.txt", b""), {"type": "directory", "path": "data/aaa_Latn", "oid": "0", "size": 0}]
    for language in ("aaa_Latn", "bbb_Cyrl", "ccc_Arab", "part_of"):
        for split in ("train", "dev", "test"):
            text = f'index_id\tcategory\ttext\n1\ttravel\t{language} {split} "quoted\n2\tsports\tжёлтый\n'.encode()
            server.files[f"/datasets/Davlan/sib200/resolve/main/data/{language}/{split}.tsv"] = text
            listing.append(entry(f"data/{language}/{split}.tsv", text))
    listing.append(entry("data/ddd_Latn/test.tsv", b"x"))
    address = "/api/datasets/Davlan/sib200/tree/main/data?recursive=true"
    server.files[address], server.files["/more"] = json.dumps(listing[:7]).encode(), json.dumps(listing[7:]).encode()
    server.links[address] = f'<{server.url}/more>; rel="next"'


def test_sib200(server, tmp_path, monkeypatch, capsys):
    sib200_hub(server)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.DOWNLOADS, "sib200", functools.partial(download_sib200, hub=server.url))
    monkeypatch.setattr(sys, "argv", ["tasks", "download", "sib200"])
    run(tasks.main)
    task = SIB200(tmp_path / "data" / "sib200")
    assert task.languages() == ["aaa_Latn", "bbb_Cyrl", "ccc_Arab"]
    assert [row.text for row in task.rows("bbb_Cyrl", "dev")] == ['bbb_Cyrl dev "quoted', "жёлтый"]
    assert capsys.readouterr().out.splitlines() == [
        "left out ddd_Latn: not all of its splits are published",
        "data/sib200: wrote 3 languages: aaa_Latn, bbb_Cyrl, ccc_Arab",
        "evaluate: python evaluate.py --bench sib200",
    ]
    asked = len(server.log)
    monkeypatch.setattr(sys, "argv", ["tasks", "download", "sib200", "--langs", "ccc_Arab,aaa_Latn", "--out", "else"])
    server.files[(dev := "/datasets/Davlan/sib200/resolve/main/data/aaa_Latn/dev.tsv")] += b"3\ttravel\tafter the listing\n"
    with pytest.raises(SystemExit, match=f"{dev}: has .* bytes, expected .*, twice"):
        run(tasks.main)
    sib200_hub(server)
    run(tasks.main)
    assert capsys.readouterr().out.splitlines()[1] == "evaluate: python evaluate.py --bench sib200 --data else"
    assert SIB200(tmp_path / "else").languages() == ["aaa_Latn", "ccc_Arab"] and len(server.log) > asked


def test_sib200_lacks_a_language(server, tmp_path):
    sib200_hub(server)
    with pytest.raises(UserError, match="there is no language 'xyz_Latn'; it holds aaa_Latn, bbb_Cyrl, ccc_Arab, ddd_Latn"):
        download_sib200(tmp_path, ["aaa_Latn", "xyz_Latn"], hub=server.url)
    with pytest.raises(UserError, match=r"no language could be written \(ddd_Latn: not all of its splits"):
        download_sib200(tmp_path, ["ddd_Latn"], hub=server.url)
    server.files["/api/datasets/Davlan/sib200/tree/main/data?recursive=true"] = b"[]"
    server.links.clear()
    with pytest.raises(UserError, match="the source holds none"):
        download_sib200(tmp_path, hub=server.url)
    assert list(tmp_path.iterdir()) == []


IDS = [f"40{i:06}" for i in range(1, 1001)]
LABELS = {"train": IDS[:800], "dev": IDS[800:900], "test": IDS[900:]}
LISTING = "/repos/cisnlp/Taxi1500/contents/eng_data"


def taxi1500_source(server, damage=None):
    """GitHub's labels, and an archive of editions: two of swh and one of heb that are enough, xxx too small, yyy with a wrong
    line, one of English, one of no language, and files that are none."""
    listing = []
    for split, ids in LABELS.items():
        text = "\n".join(f"{id}\t{Taxi1500.labels[int(id) % 6]}\tverse {id}" for id in ids).encode()  # no newline at the end
        server.files[f"/raw/eng_{split}.tsv"] = text
        listing.append({"type": "file", "path": f"eng_data/eng_{split}.tsv", "sha": git_sha(text), "size": len(text),
                        "download_url": f"{server.url}/raw/eng_{split}.tsv"})  # fmt: skip
    server.files[LISTING] = json.dumps(listing).encode()
    header = "# language_name: x\n# closest ISO 639-3: {}\n# ISO 15924: {}\n"
    editions = {
        "Taxi1500-c/swh-x-bible.txt": header.format("swh", "Latn") + "".join(f"{id}\tmstari {id}\n" for id in IDS[:950]),
        "Taxi1500-c/swh_swhulb.ebible.txt": "".join(f"{id}\taya {id}\r\n" for id in reversed(IDS)) + "41001001\tzaidi\r\n",
        "Taxi1500-c/heb-x-bible.txt": "\ufeff" + "".join(f"{id}\tפסוק {id}\n" for id in IDS[:-100] + IDS[-50:]),
        "Taxi1500-c/xxx-x-bible.txt": "".join(f"{id}\tabc {id}\n" for id in IDS[200:]),
        "Taxi1500-c/yyy-x-bible.txt": "".join(f"{id}\tabc {id}\n" for id in IDS) + "no verse\n",
        "Taxi1500-c/eng_engbsb.ebible.txt": "".join(f"{id}\tanother English {id}\n" for id in IDS),
        "Taxi1500-c/Bible.txt": "".join(f"{id}\tabc {id}\n" for id in IDS),
        "Taxi1500-c/README.md": "no edition",
        "__MACOSX/Taxi1500-c/._swh-x-bible.txt": "no edition",
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("Taxi1500-c") if sys.version_info >= (3, 11) else None
        for name, text in editions.items():
            archive.writestr(name, text)
    data = bytearray(packed.getvalue())
    if damage:
        data[data.index(b"swh-x-bible.txt") + 500] ^= 0xFF
    server.files["/Bibles.zip"] = bytes(data)
    return dict(github=server.url, corpus=server.url + "/Bibles.zip")


def test_taxi1500(server, tmp_path, capsys):
    source = taxi1500_source(server)
    server.plan("/Bibles.zip", {"drop": 1000}, {})
    written, left_out = download_taxi1500(tmp_path, **source)
    assert written == ["eng_Latn", "heb_Hebr", "swh_Latn"] == Taxi1500(tmp_path).languages()
    assert left_out == {
        "xxx_Latn": "it has 800 labelled verses, fewer than 900",
        "yyy-x-bible.txt": left_out["yyy-x-bible.txt"],
        "Bible.txt": left_out["Bible.txt"],
    }
    assert left_out["yyy-x-bible.txt"].startswith("Taxi1500-c/yyy-x-bible.txt: line 1001 begins with 'no verse', expected")
    assert left_out["Bible.txt"].startswith("Taxi1500-c/Bible.txt: its language is not to be found; let the file's name begin")
    task = Taxi1500(tmp_path)
    assert [(row.id, row.text) for row in task.rows("swh_Latn", "test")] == [(id, f"aya {id}") for id in LABELS["test"]]
    assert [row.text for row in task.rows("heb_Hebr", "test")] == [f"פסוק {id}" for id in LABELS["test"][-50:]]
    assert [row.label for row in task.rows("heb_Hebr", "dev")] == [row.label for row in task.rows("eng_Latn", "dev")]
    assert not [path for path in tmp_path.rglob("swh*.tsv") if b"\r" in path.read_bytes()]
    for split in LABELS:  # as published, to the byte
        assert (tmp_path / f"eng_Latn/eng_Latn_{split}.tsv").read_bytes() == server.files[f"/raw/eng_{split}.tsv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written  # neither the archive nor the labels
    assert ".Bibles.zip: deleted" in capsys.readouterr().out
    assert server.asked("/Bibles.zip")[1][0] == "bytes=1000-"


def test_taxi1500_of_some_languages(server, tmp_path):
    source = taxi1500_source(server)
    assert download_taxi1500(tmp_path / "a", ["eng_Latn"], **source) == (["eng_Latn"], {})
    assert not server.asked("/Bibles.zip") and Taxi1500(tmp_path / "a").languages() == ["eng_Latn"]
    assert download_taxi1500(tmp_path / "b", ["swh_Latn"], **source) == (["swh_Latn"], {})
    assert Taxi1500(tmp_path / "b").languages() == ["swh_Latn"]
    written, left_out = download_taxi1500(tmp_path / "c", ["heb_Hebr", "xxx_Latn"], **source)
    assert written == ["heb_Hebr"] and list(left_out) == ["xxx_Latn"]

    with pytest.raises(UserError, match="there is no language 'swh_Arab'; it holds eng_Latn, heb_Hebr, swh_Latn, xxx_Latn"):
        download_taxi1500(tmp_path / "d", ["swh_Arab"], **source)
    with pytest.raises(UserError, match=r"no language could be written \(xxx_Latn: it has 800 labelled verses"):
        download_taxi1500(tmp_path / "d", ["xxx_Latn"], **source)
    asked = server.asked("/Bibles.zip")
    assert (tmp_path / "d/.Bibles.zip").is_file()  # a build that failed does not cost the download
    assert download_taxi1500(tmp_path / "d", ["heb_Hebr"], **source)[0] == ["heb_Hebr"]
    assert server.asked("/Bibles.zip") == asked and not (tmp_path / "d/.Bibles.zip").exists()


def test_taxi1500_with_a_damaged_archive(server, tmp_path):
    for data in (None, b"<html>no archive</html>", "cut short"):
        source = taxi1500_source(server, damage=data is None)
        if data:
            server.files["/Bibles.zip"] = data if isinstance(data, bytes) else server.files["/Bibles.zip"][:-2000]
        with pytest.raises(UserError, match=r"\.Bibles\.zip: damaged \(.*\) and deleted; give the command again"):
            download_taxi1500(tmp_path, **source)
        assert not (tmp_path / ".Bibles.zip").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".labels"]
    written, _ = download_taxi1500(tmp_path, **taxi1500_source(server))
    assert written == ["eng_Latn", "heb_Hebr", "swh_Latn"]


def test_no_damaged_byte_of_an_archive_gets_through(tmp_path):
    texts = {f"d/{name}.txt": "".join(f"{id}\t{name} {id}\n" for id in IDS[:20]) for name in ("aaa", "bbb", "ccc")}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
        data = sum(info.compress_size for info in archive.infolist())
    whole, file, damaged = packed.getvalue(), tmp_path / "x.zip", 0
    for position in range(0, len(whole), 2):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position // 2 % 8)]) + whole[position + 1 :])
        try:
            for name, lines in read_archive(file):
                assert "".join(f"{line}\n" for _, line in lines) == texts[name] + "\n", position
        except zipfile.BadZipFile:
            damaged += 1
    assert data < damaged * 2 < len(whole)  # dates, attributes and the like may differ


def test_taxi1500_where_the_labels_have_moved(server, tmp_path):
    source = taxi1500_source(server)
    server.files[LISTING] = json.dumps(json.loads(server.files[LISTING])[:2]).encode()
    with pytest.raises(UserError, match=r"contents/eng_data: there is no eng_test.tsv, expected eng_train.tsv, eng_dev.tsv"):
        download_taxi1500(tmp_path, **source)
    del server.files[LISTING]
    with pytest.raises(UserError, match=r"contents/eng_data: the server answers 404"):
        download_taxi1500(tmp_path, **source)
    assert list(tmp_path.iterdir()) == []
