"""Test mala.storage.files and mala.storage.weights: safe writing, shards, and a full disk."""

import json
import os
import random
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mala.cli import UserError
from mala.model import Llama
from mala.storage.files import atomic_directory, atomic_file, write_json
from mala.storage.weights import DTYPES, INDEX, WEIGHTS, write_tensors, write_weights


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as file:
        file.write("half")
        raise RuntimeError
    for replace in (False, True):
        with pytest.raises(RuntimeError), atomic_directory(tmp_path / "folder", replace) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "old"


def test_a_folder_is_replaced_only_on_demand(tmp_path):
    for content in ("old", "new"):
        with atomic_directory(tmp_path / "folder", replace=True) as folder:
            (folder / content).write_text(content)
        assert [entry.name for entry in (tmp_path / "folder").iterdir()] == [content]
    with (
        pytest.raises(UserError, match="folder: the output folder exists"),
        atomic_directory(tmp_path / "folder"),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_replaced_is_whole_or_absent_at_any_moment(tmp_path, monkeypatch):
    folder, seen = tmp_path / "folder", []

    def then_look(function):
        def call(*arguments, **options):
            function(*arguments, **options)
            seen.append(sorted(entry.name for entry in folder.iterdir()) if folder.exists() else None)

        return call

    for contents in (("a", "b"), ("c", "d")):
        with atomic_directory(folder, replace=True) as temporary:
            for content in contents:
                (temporary / content).touch()
            monkeypatch.setattr(os, "replace", then_look(os.replace))
            monkeypatch.setattr(os, "rmdir", then_look(os.rmdir))
            monkeypatch.setattr(os, "unlink", then_look(os.unlink))
    assert all(names in (["a", "b"], ["c", "d"], None) for names in seen) and ["a", "b"] in seen
    assert seen[-1] == ["c", "d"] and [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_files_are_as_readable_as_any(tmp_path):
    write_json(tmp_path / "config.json", {"é": 1})
    write_weights(tmp_path, {"x": torch.ones(2)})
    (tmp_path / "plain").touch()
    assert {entry.stat().st_mode for entry in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'


def test_saving_again_leaves_no_stale_shard(tmp_path):
    model = Llama(tiny_config())
    tokens = torch.arange(20)[None]
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert index["weight_map"].keys() == dict(model.named_parameters()).keys()
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), model(tokens))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits file sizes as Linux does")
@given(seed=st.integers(0, 10**9), count=st.integers(0, 30))
@settings(deadline=None, max_examples=30)
def test_a_file_has_the_bytes_that_safetensors_writes(seed, count, tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(seed)
    tensors = {}
    for number in range(count):
        shape = [draw.randint(0, 5) for _ in range(draw.randint(0, 3))]
        tensors[f'{draw.randint(0, 99)}.é"{number}'] = torch.randn(shape).mul(9).to(draw.choice([*DTYPES]))
    save_file(tensors, folder / "theirs", {"format": "pt"})
    write_tensors(folder / "ours", tensors)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    found = load_file(folder / "ours")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_tensors_that_share_memory_or_lie_across_it_are_written_each(tmp_path):
    matrix = torch.randn(3, 4)
    write_tensors(tmp_path / "file", {"a": matrix, "b": matrix, "c": matrix.T, "d": matrix[:, 1]})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["a"], matrix) and torch.equal(found["b"], matrix)
    assert torch.equal(found["c"], matrix.T) and torch.equal(found["d"], matrix[:, 1])


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(tmp_path):
    """A limit on file sizes stands in for a full disk: the write fails in the same place."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    code = f"""if True:
        import signal, torch
        from pathlib import Path
        from mala.cli import run
        from mala.storage.weights import write_weights
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run(lambda: write_weights(Path({str(tmp_path)!r}), {{"x": torch.ones(100_000)}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert "model.safetensors" in done.stderr and not list(tmp_path.iterdir())
