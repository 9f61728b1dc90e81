"""Mistakes that no other test makes. Each is refused by a UserError that names the file or the setting."""

import json
import shutil
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, tiny_config
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as pb2

import train
from mala.cli import UserError, choose_device, run
from mala.data import file_digests, open_streams, tokenise
from mala.lora import LoRAConfig, add_lora, merge_lora
from mala.model import Llama
from mala.running.prepare import clear_checkpoints
from mala.scoring import predict_documents
from mala.storage.config_json import check_config
from mala.storage.corpus import Corpus
from mala.storage.corpus_formats import read_documents
from mala.storage.model_by_name import find_folder
from mala.storage.peft_adapter import load_adapter, save_adapter
from mala.storage.training_checkpoint import OPTIMIZER, STATE, check_intact
from mala.storage.weights import read_tensors
from mala.words.further_merges import continue_merges
from mala.words.tokenizer import Tokenizer
from tools.bible import read_archive
from tools.comparison import compare_runs
from tools.merge_command import Merge
from tools.model_settings import find_model
from tools.more_tasks import ALL_TASKS
from tools.pictures import picture

TINY = ROOT / "assets/tiny-llama"


def refused(*words):
    return pytest.raises(UserError, match="(?s)" + ".*".join(words))


def tokenizer_with(change):
    """The bundled tokenizer after `change` of its ModelProto."""
    proto = pb2.ModelProto.FromString((TINY / "tokenizer.model").read_bytes())
    change(proto)
    return proto.SerializeToString()


def test_a_gpu_that_is_not_there():
    with refused("device is cuda"):
        choose_device("cuda", "auto")


@pytest.mark.parametrize("changes", [{"lora_dropout": 1.0}, {"use_rslora": "yes"}])
def test_settings_of_lora(changes):
    with refused(*changes):
        LoRAConfig(**changes)


def test_all_linear_from_a_command_line():
    assert LoRAConfig(target_modules=("all-linear",)).target_modules == "all-linear"


@pytest.mark.parametrize(
    "changes, named",
    [({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size"), ({"head_dim": 7}, "head_dim")],
)
def test_sizes_of_a_model(changes, named):
    with refused(named):
        check_config(tiny_config(**changes))


def test_a_second_adapter(tmp_path):
    model = Llama(tiny_config())
    add_lora(model, LoRAConfig())
    save_adapter(model, tmp_path)
    with refused("adapter"):
        add_lora(model, LoRAConfig())
    with refused(tmp_path.name, "adapter"):
        load_adapter(model, tmp_path)


def test_a_share_that_is_none(tmp_path):
    with refused("held.out", "1.5"):
        Corpus(tmp_path, held_out=1.5)


@pytest.mark.parametrize(
    "package, call",
    [
        ("pyarrow", lambda folder: list(read_documents(folder / "swh_Latn.parquet"))),
        ("huggingface_hub", lambda folder: find_folder("nobody/no-such-model")),
    ],
)
def test_an_optional_package_that_is_missing(package, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "swh_Latn.parquet").write_bytes(b"PAR1")
    with refused(f"pip install {package}"):
        call(tmp_path)


def test_a_checkpoint_without_its_step(tmp_path):
    for name in ("adapter_model.safetensors", OPTIMIZER):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    (tmp_path / STATE).write_text(json.dumps({"identity": {}}))
    with refused(STATE, "'step'"):
        check_intact(tmp_path)


def test_weights_that_are_a_folder(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with refused("model.safetensors", "cannot be read"):
        list(read_tensors(tmp_path / "model.safetensors"))


def test_a_tokenizer_without_a_beginning():
    def change(proto):
        proto.trainer_spec.bos_id = -1
        for piece in proto.pieces:
            if piece.piece == "<s>":
                piece.type, piece.piece = 1, "sss"

    with refused("<s>"):
        Tokenizer(tokenizer_with(change))


def test_a_tokenizer_that_changes_what_it_reads():
    class Forgetful(Tokenizer):
        def segment(self, words):
            return [ids[:-1] for ids in super().segment(words)]

    with refused("tiny-llama", "▁moja"):
        continue_merges(Forgetful.from_pretrained(TINY), {"moja": 5}, 10)


def test_all_text_held_out(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/swh_Latn.txt").write_text("moja\nmbili\n")
    corpus = Corpus(tmp_path / "corpus", held_out=1.0)
    files = [file for of_language in corpus.files.values() for file in of_language]
    tokenise(corpus, Tokenizer.from_pretrained(TINY), file_digests(files, {}), tmp_path / "tokens")
    with refused("corpus", "held_out"):
        open_streams(corpus, tmp_path / "tokens")


def test_text_without_tokens():
    class Silent(Tokenizer):
        def encode_batch(self, texts, bos=False):
            return [[] for _ in texts]

    with refused("swh_Latn", "no tokens"):
        predict_documents(Llama(tiny_config()).eval(), Silent.from_pretrained(TINY), "swh_Latn", ["moja"])


def test_the_halves_of_checkpoints_go(tmp_path):
    for name in (".step-9.tmp", ".step-8.old"):
        (tmp_path / name).mkdir()
    clear_checkpoints(tmp_path, None)
    assert not list(tmp_path.iterdir())


def type_train(monkeypatch, tmp_path, *flags):
    argv = ["train.py", "--out", str(tmp_path / "out"), "--device", "cpu", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()


def test_a_gpus_full_memory(monkeypatch, tmp_path):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")

    monkeypatch.setattr(train, "train", fill)
    with refused("memory is full", "Tried|CUDA out of memory", "--micro-batch-size"):
        type_train(monkeypatch, tmp_path)


def test_samples_of_a_language_without_held_out_text(monkeypatch, tmp_path):
    (tmp_path / "corpus").mkdir()
    for language, lines in (("swh_Latn", 20), ("yor_Latn", 2)):
        (tmp_path / f"corpus/{language}.txt").write_text("moja mbili tatu\n" * lines)
    flags = ["--data", tmp_path / "corpus", "--samples", "yor_Latn", "--eval-every", "1", "--extend-vocab", 0]
    with refused("samples", "yor_Latn"):
        type_train(monkeypatch, tmp_path, *flags)


def test_documents_that_nothing_begins(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "load_tokenizer", without_bos)
    with refused("--attend block"):
        type_train(monkeypatch, tmp_path, "--attend", "document")


def without_bos(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.bos_id = None
    return tokenizer


def test_pieces_that_are_all_known(monkeypatch, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/eng_Latn.txt").write_text("the and of\n" * 10)
    flags = ["--data", tmp_path / "corpus", "--extend-vocab", 12, "--vocab-method", "union"]
    with refused("tiny-llama", "--extend-vocab 0"):
        type_train(monkeypatch, tmp_path, *flags)


def test_a_bible_in_another_encoding(tmp_path):
    with zipfile.ZipFile(tmp_path / "bibles.zip", "w") as archive:
        archive.writestr("swh-x-bible.txt", "41001001\tHabari ya mkate \xe9\n".encode("latin-1"))
    with refused("swh-x-bible.txt", "not UTF-8", "iconv"):
        [list(lines) for _, lines in read_archive(tmp_path / "bibles.zip")]


def test_a_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused("nll.png", "pip install matplotlib"), picture(tmp_path / "nll.png"):
        pass


@pytest.mark.parametrize(
    "rows, named",
    [
        (None, "no language"),
        ([], "has no rows"),
        ([{"premise": "a", "question": "cause", "choice1": "b", "choice2": "", "label": 0}], "line 1"),
    ],
)
def test_a_benchmark_whose_file_is_not_as_published(rows, named, tmp_path):
    task = ALL_TASKS["xcopa"](tmp_path)
    if rows is not None:
        file = task.path("swh_Latn", "test")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused(tmp_path.name, named):
        task.languages() and task.rows("swh_Latn", "test")


def test_only_the_first_process_prints_a_plan(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "1")
    type_train(monkeypatch, tmp_path, "--dry-run")
    assert capsys.readouterr().out == ""


def test_a_gpus_full_memory_in_any_command():
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SystemExit, match="^error: the GPU's memory is full; lower --batch-size"):
        run(fill)


def test_a_plan_refuses_what_a_run_refuses(monkeypatch, tmp_path):
    with refused("seq_len is 4096", "at most 512"):
        type_train(monkeypatch, tmp_path, "--dry-run", "--seq-len", 4096)


def test_a_warm_up_that_outlasts_the_run_is_announced(monkeypatch, tmp_path, capsys):
    for steps, is_announced in ((19, True), (20, False)):
        type_train(monkeypatch, tmp_path, "--dry-run", "--steps", steps, "--warmup-steps", 20)
        assert ("warning: the warm-up takes 20 steps" in capsys.readouterr().err) == is_announced


def test_a_run_or_an_adapter_stands_for_its_model(tmp_path):
    shutil.copytree(TINY, tmp_path / "run/base")
    model = Llama.from_pretrained(TINY)
    add_lora(model, LoRAConfig())
    torch.nn.init.normal_(model.model["layers"][0].self_attn.q_proj.lora_B)
    save_adapter(model, tmp_path / "run/adapter", base=str(tmp_path / "run/base"))
    for given in ("run", "run/adapter"):
        assert find_model(str(tmp_path / given), None) == (tmp_path / "run/base", tmp_path / "run/adapter")
    Merge(model=str(tmp_path / "run"), adapter=None, out=str(tmp_path / "merged")).run()
    merge_lora(model)
    merged = Llama.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(*pair) for pair in zip(merged.parameters(), model.parameters()))
    with refused("tiny-llama", "no adapter"):
        Merge(model=str(TINY), adapter=None, out=str(tmp_path / "other")).run()


def test_a_single_language_has_no_p(tmp_path):
    for name, nll in (("a", 10.0), ("b", 5.0)):
        lines = [{"lang": "swh_Latn", "id": i, "nll": nll + i, "tokens": 5, "bytes": 9} for i in range(20)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_text(text)
        languages = {"swh_Latn": {"documents": 20}}
        result = {"bench": "nll", "languages": languages, "macro": {}}
        (tmp_path / name / "results.json").write_text(json.dumps(result))
    found = compare_runs(tmp_path / "a", tmp_path / "b", chosen=lambda names: names)
    assert found["macro"]["p"] is None and found["languages"]["swh_Latn"]["p"] < 0.01
