"""Test evaluate.py against the published procedure, and from the command line.

The command-line tests cover killed runs, two processes, comparisons and mistakes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import published
import pytest
import sentencepiece
import torch
import transformers
from conftest import ROOT, SHARED, one_thread, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from test_train import succeed
from torch._dynamo.testing import CompileCounterWithBackend

import evaluate
from mala.benchmarks.tasks import TASKS
from mala.model import Llama
from tools import measurement
from tools.known_models import init_weights

TINY = ROOT / "assets/tiny-llama"
SAMPLE = ROOT / "assets/demo"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def untimed(folder):
    """Return results.json without its timings."""
    return {
        key: value for key, value in results(folder).items() if key not in ("seconds", "examples_per_second")
    }


def save_byte_level(folder, texts, size=600):
    """Save a byte-level BPE as in LLaMA 3, with traps for a careless reader.

    The traps are truncation, padding and a post-processor.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|begin|>"}}')


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return name -> (folder, encode) of three models: the bundled one; one with grouped queries and llama3
    positions; and one with byte-level BPE whose context is so short that prompts are cut."""
    folder = tmp_path_factory.mktemp("models")
    found = {"tiny-llama": TINY}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    spm = SHARED / "llama2" if SHARED.exists() else TINY
    size = 32000 if SHARED.exists() else 2048
    for name, config in {
        "grouped": tiny_config(
            vocab_size=size, max_position_embeddings=4096, rope_scaling=scaling, initializer_range=0.3
        ),
        "byte-level": tiny_config(
            vocab_size=600, max_position_embeddings=120, tie_word_embeddings=True, initializer_range=0.3
        ),
    }.items():
        model = Llama(config)
        init_weights(model, len(name))
        model.save_pretrained(folder / name)
        found[name] = folder / name
    shutil.copy(spm / "tokenizer.model", folder / "grouped")
    texts = [
        line for file in sorted(SAMPLE.glob("*/*_Latn/*train.tsv")) for line in file.read_text().splitlines()
    ]
    save_byte_level(folder / "byte-level", texts)
    # Do not use transformers 5's LlamaTokenizer: it adds no second word start to " travel". SentencePiece and
    # the official LLaMA 2's tokenizer.json do, and the published figures were made with them.
    encoders = {
        name: sentencepiece.SentencePieceProcessor(str(found[name] / "tokenizer.model")).encode
        for name in ("tiny-llama", "grouped")
    }
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "byte-level/tokenizer.json"))
    encoders["byte-level"] = lambda text: fast.encode(
        text, add_special_tokens=False, truncation=False, padding=False
    )
    return {name: (found[name], encoders[name]) for name in found}


REAL = SHARED.exists()
LANGUAGES = {
    "sib200": "eng_Latn,tat_Cyrl,hin_Deva,jpn_Jpan,uig_Arab"
    if REAL
    else "eng_Latn,swh_Latn,tat_Cyrl,npi_Deva,mya_Mymr",
    "taxi1500": "eng_Latn,swh_Latn,syr_Syrc,guj_Gujr,est_Latn"
    if REAL
    else "eng_Latn,swh_Latn,amh_Ethi,hau_Latn,npi_Deva",
}


@pytest.mark.parametrize("bench", ["sib200", "taxi1500"])
@pytest.mark.parametrize("name", ["tiny-llama", "grouped", "byte-level"])
def test_equals_the_published_procedure(models, name, bench, tmp_path):
    folder, encode = models[name]
    data = (SHARED if REAL else SAMPLE) / bench
    languages = LANGUAGES[bench]
    succeed(
        "evaluate.py",
        "--bench",
        bench,
        "--model",
        folder,
        "--data",
        data,
        "--langs",
        languages,
        "--limit",
        3,
        "--out",
        tmp_path,
    )
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    max_length = min(2048, reference.config.max_position_embeddings)
    ours = predictions(tmp_path)
    theirs = [line for language in sorted(languages.split(",")) for line in
              published.evaluate(reference, encode, data, bench, language, limit=3, max_length=max_length)]  # fmt: skip
    assert len(ours) == len(theirs) == 15
    for line, expected in zip(ours, theirs):
        assert [line[key] for key in ("lang", "id", "shots", "label")] == [
            expected[key] for key in ("lang", "id", "shots", "label")
        ]
        assert list(line["loglikelihoods"]) == list(expected["loglikelihoods"])
        assert line["loglikelihoods"] == pytest.approx(expected["loglikelihoods"], abs=1e-4)
        assert line["prediction"] == expected["prediction"]
    correct = [line["prediction"] == line["label"] for line in theirs]
    correct_norm = [line["prediction_norm"] == line["label"] for line in theirs]
    result = results(tmp_path)
    for i, language in enumerate(sorted(languages.split(","))):
        figures = result["languages"][language]
        assert figures["n"] == 3 and figures["accuracy"] == sum(correct[3 * i : 3 * i + 3]) / 3
        assert figures["accuracy_norm"] == sum(correct_norm[3 * i : 3 * i + 3]) / 3
    assert result["macro"]["accuracy"] == pytest.approx(sum(correct) / 15)
    if name == "byte-level":  # some contexts were cut
        examples = [
            context
            for language in languages.split(",")
            for *_, context in published.documents(data, bench, language, limit=3)
        ]
        assert max(len(encode(context)) for context in examples) > 120


def test_every_shot_list_is_the_published_one(tmp_path):
    for data in [SAMPLE] + [SHARED] * SHARED.exists():
        for bench, task in TASKS.items():
            for shots, seed in ((3, 1234), (1, 7), (5, 0), (0, 1)):
                examples = task(data / bench).examples(
                    "swh_Latn" if data == SAMPLE else "eng_Latn", shots=shots, seed=seed
                )
                expected = published.documents(
                    data / bench, bench, "swh_Latn" if data == SAMPLE else "eng_Latn", shots, seed
                )
                assert [(e.id, e.label, e.shots, e.context) for e in examples] == \
                    [(row["id"], row["label"], chosen, context) for row, chosen, context in expected]  # fmt: skip


@pytest.mark.parametrize("bench", ["nll", "sib200", "taxi1500"])
def test_without_arguments_the_sample_is_measured_and_called_one(bench, tmp_path):
    latin = (
        "eng_Latn,swh_Latn,cym_Latn" if bench == "sib200" else ""
    )  # the other languages take this model many byte tokens
    lines = succeed("evaluate.py", "--bench", bench, "--langs", latin, cwd=tmp_path).splitlines()
    assert lines[0] == lines[-1] and "sample" in lines[0] and "not benchmark scores" in lines[0]
    assert ("python -m tools.get_benchmark " + bench in lines[0]) == (bench != "nll")
    result = results(tmp_path / "out" / bench)
    assert result["sample"] is True and result["bench"] == bench and result["model"] == str(TINY)
    found = {folder.name for folder in (SAMPLE / ("sib200" if bench == "nll" else bench)).iterdir()}
    assert result["languages"].keys() == (set(latin.split(",")) if latin else found)
    if bench != "nll":
        assert result["shots"] == 3 and result["seed"] == 1234 and result["split"] == "test"
        assert set(result["languages"]["swh_Latn"]) == {
            "n",
            "accuracy",
            "accuracy_norm",
            "ci95",
            "majority",
            "uniform",
        }
        assert (tmp_path / "out" / bench / "results.png").read_bytes()[1:4] == b"PNG"
        assert "above the majority class: " in lines[-3]
    assert result["seconds"] > 0 and result["examples_per_second"] > 0


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path):
    args = [
        "evaluate.py",
        "--bench",
        "sib200",
        "--limit",
        3,
        "--langs",
        "swh_Latn,amh_Ethi,eng_Latn,cym_Latn",
    ]
    succeed(*args, "--out", tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *map(str, args[1:]), "--out", str(tmp_path / "cut")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = sorted((tmp_path / "cut/done").glob("*.json"))
    assert (
        len(done) == 2
        and not (tmp_path / "cut/results.json").exists()
        and not (tmp_path / "cut/predictions.jsonl").exists()
    )
    written = [file.stat().st_mtime_ns for file in done]
    succeed(*args, "--out", tmp_path / "cut")
    assert [file.stat().st_mtime_ns for file in done] == written  # nothing was measured again
    assert (tmp_path / "cut/predictions.jsonl").read_bytes() == (
        tmp_path / "whole/predictions.jsonl"
    ).read_bytes()
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    # More languages are added to the kept ones. A model with another dtype is measured separately.
    succeed(
        *args[:5],
        "--langs",
        "swh_Latn",
        "amh_Ethi",
        "hau_Latn",
        "--group-by",
        "script",
        "--out",
        tmp_path / "cut",
    )
    assert (
        results(tmp_path / "cut")["groups"].keys() == {"Ethi", "Latn"}
        and len(list((tmp_path / "cut/done").glob("*.json"))) == 5
    )
    before = results(tmp_path / "cut")["macro"]
    succeed(
        *args[:5], "--langs", "swh_Latn,amh_Ethi,hau_Latn", "--dtype", "bfloat16", "--out", tmp_path / "cut"
    )
    assert (
        len(list((tmp_path / "cut/done").glob("*.json"))) == 8
        and results(tmp_path / "cut")["macro"].keys() == before.keys()
    )


# The run is killed, without a chance to clean up, when it begins to write its third language.
STOPPED = """
import os, signal, sys
sys.argv[0] = "evaluate.py"
import evaluate
from mala.cli import run
write_done, written = evaluate.Measurement.write, []
def write(self, *rest):
    if len(written) == 2:
        self.file.with_name(f".{self.file.name}.tmp").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(self.file)
    write_done(self, *rest)
evaluate.Measurement.write = write
run(evaluate.main)
"""


def test_two_processes_give_the_same_bytes(tmp_path):
    args = ["--bench", "taxi1500", "--langs", "swh_Latn,amh_Ethi,eng_Latn", "--limit", "4", "--seeds", "1,2"]
    with one_thread():
        succeed("evaluate.py", *args, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "evaluate.py", *args, "--out", str(tmp_path / "two")]
    started = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    assert (tmp_path / "one/predictions.jsonl").read_bytes() == (
        tmp_path / "two/predictions.jsonl"
    ).read_bytes()
    assert untimed(tmp_path / "one") == untimed(tmp_path / "two")
    assert started.stdout.count("macro-average  ") == 1 and started.stdout.count("is a bundled sample") == 2


def test_compiled_blocks_predict_the_same_and_are_compiled_a_few_times(tmp_path, monkeypatch):
    counter, compile_module = CompileCounterWithBackend("eager"), torch.nn.Module.compile

    def measure(compile):
        args = ["--bench", "sib200", "--langs", "swh_Latn,eng_Latn", "--limit", "6", "--device", "cpu"]
        args += ["--compile", compile, "--out", str(tmp_path / compile)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *args])
        evaluate.main()
        return predictions(tmp_path / compile)

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_module(self, **how, backend=counter)
    )
    torch._dynamo.reset()
    expected = measure("auto")
    assert counter.frame_count == 0  # not on a CPU
    for line, same in zip(measure("on"), expected, strict=True):
        assert line["loglikelihoods"] == pytest.approx(same["loglikelihoods"], abs=1e-4)
    assert 2 <= counter.frame_count <= 5
    torch._dynamo.reset()


NUMBERS = st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=50)


@given(NUMBERS, st.data(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_checksum_knows_every_number_and_its_place(numbers, data, dtype):
    def checksum(numbers):
        integers = torch.tensor(numbers, dtype=torch.int32)
        tensor = integers.view(dtype) if dtype == torch.float32 else integers.to(torch.int16).view(dtype)
        return measurement.checksum(torch.nn.Parameter(tensor.view(-1, 1)))

    i, j = (data.draw(st.integers(0, len(numbers) - 1)) for _ in "ij")
    signed = numbers if dtype == torch.float32 else [(n + 2**15) % 2**16 - 2**15 for n in numbers]
    total = sum((2 * place + 1) * number for place, number in enumerate(signed))
    assert (checksum(numbers) - total) % 2**64 == 0
    other = [*numbers]
    other[i] = data.draw(st.integers(0, 2**16 - 1))
    assert (checksum(other) == checksum(numbers)) == (other == numbers)
    other = [*numbers]
    other[i], other[j] = numbers[j], numbers[i]
    assert (checksum(other) == checksum(numbers)) == (other == numbers)


def test_a_checksum_of_a_large_tensor_is_added_up_in_parts():
    tensor = torch.randn(2**16 + 3)
    changed = tensor.clone()
    changed[-1], changed[7] = tensor[7], tensor[-1]
    expected = sum((2 * i + 1) * number for i, number in enumerate(tensor.view(torch.int32).tolist()))
    assert (measurement.checksum(tensor) - expected) % 2**64 == 0
    assert (
        measurement.checksum(changed) != measurement.checksum(tensor) == measurement.checksum(tensor.clone())
    )


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_every_job_is_dealt_out_once_and_evenly(sizes, processes):
    hands = evaluate.deal(sizes, processes)
    assert sorted(number for hand in hands for number in hand) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in hand) for hand in hands]
    assert len(hands) == processes and max(loads) <= min(loads) + max(sizes, default=0)


def test_seeds_protocols_and_comparison(tmp_path):
    args = ["evaluate.py", "--bench", "sib200", "--langs", "swh_Latn,amh_Ethi,eng_Latn", "--limit", 6]
    succeed(*args, "--seed", 1, "--out", tmp_path / "1")
    succeed(*args, "--seed", 2, "--out", tmp_path / "2")
    succeed(*args, "--seeds", "1,2", "--protocol", "natural", "--out", tmp_path / "natural")
    printed = succeed(*args, "--seeds", "1,2", "--out", tmp_path / "both")
    both, single = results(tmp_path / "both"), [results(tmp_path / name) for name in "12"]
    assert both["seed"] is None and both["seeds"] == [1, 2] and single[1]["seed"] == 2
    for language, figures in both["languages"].items():
        by_seed = figures["accuracy_by_seed"]
        assert by_seed["1"] == single[0]["languages"][language]["accuracy"] and set(by_seed) == {"1", "2"}
        assert figures["accuracy"] == pytest.approx((by_seed["1"] + by_seed["2"]) / 2) and figures["n"] == 6
    assert "macro-average by seed: 1: " in printed
    lines = predictions(tmp_path / "both")
    assert [line for line in lines if line["seed"] == 1] == predictions(tmp_path / "1")
    # With --limit every seed asks the same questions, but in its own order and with its own shots.
    ids = [
        {line["id"] for line in lines if (line["lang"], line["seed"]) == ("swh_Latn", seed)}
        for seed in (1, 2)
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 6
    whole = TASKS["sib200"](SAMPLE / "sib200").examples("swh_Latn", seed=2)
    assert [line["id"] for line in lines if (line["lang"], line["seed"]) == ("swh_Latn", 2)] == [
        example.id for example in whole if example.id in ids[0]
    ]
    assert results(tmp_path / "natural")["protocol"] == "natural"
    assert (
        predictions(tmp_path / "natural")[0]["loglikelihoods"]
        != predictions(tmp_path / "both")[0]["loglikelihoods"]
    )

    printed = succeed("evaluate.py", "--compare", tmp_path / "1/results.json", tmp_path / "both", "--group-by", "script",
                      "--langs", "swh_Latn,amh_Ethi", "--out", tmp_path / "c")  # fmt: skip
    compared = json.loads((tmp_path / "c/compare.json").read_text())
    assert compared["languages"].keys() == {"swh_Latn", "amh_Ethi"} and compared["groups"].keys() == {
        "Latn",
        "Ethi",
    }
    assert compared["differing_settings"] == {"seeds": [[1], [1, 2]]} and "seeds: A [1], B [1, 2]" in printed
    swahili = compared["languages"]["swh_Latn"]
    assert swahili["difference"] == pytest.approx(swahili["b"] - swahili["a"]) and 0 <= swahili["p"] <= 1
    with pytest.raises(SystemExit, match="expected two runs of one benchmark"):
        succeed(
            "evaluate.py", "--bench", "nll", "--langs", "swh_Latn", "--limit", 2, "--out", tmp_path / "nll"
        )
        succeed("evaluate.py", "--compare", f"{tmp_path}/1,{tmp_path}/nll")


def write_task(folder, bench, **files):
    for split in ("train", "test"):
        default = "index_id\tcategory\ttext\n" * (bench == "sib200")
        default += "".join(f"{i}\t{published.LABELS[bench][i % 6]}\ttext {i} {split}\n" for i in range(5))
        name = f"{split}.tsv" if bench == "sib200" else f"swh_Latn_{split}.tsv"
        (folder / "swh_Latn").mkdir(exist_ok=True)
        content = files.get(split, default)
        (folder / "swh_Latn" / name).write_bytes(content if isinstance(content, bytes) else content.encode())


HEADER = "index_id\tcategory\ttext\n"
WRONG = {
    "a missing column": (
        "sib200",
        {"test": HEADER + "1\ttravel\tx\n2\ttravel\n"},
        r"test\.tsv: line 3 has 2 columns, expected 3",
    ),
    "a missing column in the header": (
        "sib200",
        {"train": "index_id\ttext\n1\tx\n"},
        r"train\.tsv: line 1 has 2 columns",
    ),
    "another header": (
        "sib200",
        {"train": "id\tcategory\ttext\n"},
        r"train\.tsv: line 1 is 'id category text', expected the header",
    ),
    "no header": (
        "sib200",
        {"test": "1\ttravel\tx\n"},
        r"test\.tsv: line 1 is '1 travel x', expected the header",
    ),
    "an unknown label": (
        "taxi1500",
        {"test": "1\tFaith\tx\n2\tfaith\ty\n"},
        r"swh_Latn_test\.tsv: line 2 has the label 'faith', expected",
    ),
    "an empty test split": ("sib200", {"test": HEADER}, r"test\.tsv: the test split of swh_Latn has no rows"),
    "an empty file": ("sib200", {"test": ""}, r"test\.tsv: line 1 is 'an empty file', expected the header"),
    "an empty file without header": (
        "taxi1500",
        {"test": "\n\n"},
        r"swh_Latn_test\.tsv: the test split of swh_Latn has no rows",
    ),
    "fewer train rows than shots": (
        "taxi1500",
        {"train": "1\tFaith\tx\n2\tSin\ty\n"},
        r"swh_Latn_train\.tsv: 2 rows, too few for 3 shots",
    ),
    "no UTF-8": ("taxi1500", {"test": b"1\tFaith\t\xff\n"}, r"swh_Latn_test\.tsv: line 1 is not UTF-8"),
    "an id twice": (
        "taxi1500",
        {"test": "1\tSin\tx\n2\tSin\ty\n1\tSin\tz\n"},
        r"line 3 has the same id as line 1, '1'; every row",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_one_sentence_with_file_and_line(case, tmp_path):
    bench, files, sentence = WRONG[case]
    write_task(tmp_path, bench, **files)
    with pytest.raises(SystemExit, match=sentence):
        succeed("evaluate.py", "--bench", bench, "--data", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_is_never_shown_before_itself(tmp_path):
    write_task(tmp_path, "taxi1500", train="1\tSin\tx\n", test="1\tSin\tx\n")
    with pytest.raises(SystemExit, match="row 1: all train rows are equal to it"):
        succeed(
            "evaluate.py", "--bench", "taxi1500", "--data", tmp_path, "--shots", 1, "--out", tmp_path / "out"
        )


def test_quotes_tabs_marks_and_line_ends_are_text_or_nothing(tmp_path):
    rows = ['1\ttravel\tHe said: "go', "2\tsports\ta\tb", "3\thealth\t'x' {y} {text}", "4\ttravel\t"]
    content = HEADER + "".join(row + "\n" for row in rows)
    for name, written in {
        "plain": content,
        "marked": "\ufeff" + content.replace("\n", "\r\n"),
        "blank": content.replace("\n", "\n\n"),
    }.items():
        (tmp_path / name).mkdir()
        write_task(tmp_path / name, "sib200", train=written, test=written)
        task = TASKS["sib200"](tmp_path / name)
        assert [row.text for row in task.rows("swh_Latn", "test")] == [
            'He said: "go',
            "a\tb",
            "'x' {y} {text}",
            "",
        ]
        examples = task.examples("swh_Latn")
        assert [e.context for e in examples] == [c for *_, c in published_of(rows)]
        assert all(
            example.id not in [str(shot + 1) for shot in example.shots] for example in examples
        )  # never the row itself
        succeed(
            "evaluate.py", "--bench", "sib200", "--data", tmp_path / name, "--out", tmp_path / name / "out"
        )
    assert (tmp_path / "plain/out/predictions.jsonl").read_bytes() == (
        tmp_path / "marked/out/predictions.jsonl"
    ).read_bytes()


def published_of(rows):
    """Yield what the published procedure makes of these rows, used as both train and test split."""
    docs = [dict(zip(("id", "label", "text"), row.split("\t", 2))) for row in rows]
    rng = published.np.random.default_rng(1234)
    for number in rng.permutation(len(docs)):
        chosen = published.few_shot(rng, docs, docs[number], 3)
        ask = 'The topic of the news "{}" is'.format
        yield (
            docs[number],
            chosen,
            "\n".join(
                [*(f"{ask(docs[i]['text'])} {docs[i]['label']}" for i in chosen), ask(docs[number]["text"])]
            ),
        )


MISTAKES = {
    "--limit 0": "limit is 0, expected a number of at least 1",
    "--shots -1": "shots is -1, expected a number of at least 0",
    "--seeds 1,x": r"--seeds: invalid list of whole numbers value: '1,x'",
    "--seeds 1,-2": "seeds are 1, -2, expected no negative number",
    "--bench mmlu": r"--bench: invalid choice: 'mmlu'",
    "--data nowhere": "nowhere: there is no such folder; expected files such as nowhere/swh_Latn/test.tsv",
    "--data empty": "empty: no language here; expected files such as empty/swh_Latn/test.tsv",
    "--langs abc_Latn": "there is no language 'abc_Latn'; it holds amh_Ethi",
    "--langs-file list.txt": "--langs-file: no such language is here; expected some of amh_Ethi",
    "--langs eng_Latn --langs-file list.txt": "--langs and --langs-file: no such language is here",
    "--max-held-out -1": "max_held_out is -1, expected a number of at least 0",
    "--shard on": "--shard on needs several processes: torchrun --nproc-per-node N evaluate.py",
    "--adapter moved": "moved/adapter_config.json: names the base /gone/llama, which does not exist; give it with --model",
    "--adapter orphan": "orphan/adapter_config.json: names no base_model_name_or_path; give the base with --model",
    "--bench nll --data corpus --langs swh_Latn,zul_Latn": "corpus: zul_Latn has no document in its test split",
    "--langs-file empty.txt": "empty.txt: no languages; expected one per line",
    "--split dev": "/dev.tsv: there is no such file; expected the dev split of amh_Ethi",
    "--model nowhere": "nowhere/config.json: there is no such file",
    "--model no-such/model": "no-such/model: there is no such folder, and the Hugging Face hub does not provide it",
    "--compare a.json": "--compare is given 1 files, expected two",
    "--compare a.json b.json": "a.json: there is no such file; expected a results.json of evaluate.py",
    "--compare other.json other.json": "other.json: no 'languages' or no 'bench'; expected a results.json",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_users_mistake_is_one_sentence(arguments, tmp_path):
    (tmp_path / "list.txt").write_text("abc_Latn\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, base in (("moved", "/gone/llama"), ("orphan", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/swh_Latn.txt").write_text("habari\n")
    (tmp_path / "corpus/zul_Latn.txt").write_text("\n")
    with pytest.raises(SystemExit, match=MISTAKES[arguments]):
        succeed("evaluate.py", "--bench", "sib200", *arguments.split(), cwd=tmp_path)
    assert not (tmp_path / "out/sib200/results.json").exists()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    held = evaluate.lock(tmp_path)
    with pytest.raises(SystemExit, match="another run is writing here"):
        succeed("evaluate.py", "--bench", "taxi1500", "--langs", "swh_Latn", "--out", tmp_path)
    held.close()
    succeed("evaluate.py", "--bench", "taxi1500", "--langs", "swh_Latn", "--out", tmp_path)


def test_a_list_of_languages_narrows_what_is_measured(tmp_path):
    (tmp_path / "list.tsv").write_text("language\tis_seen\nswh_Latn\t1\nxyz_Latn\t0\namh_Ethi\t0\n")
    succeed("evaluate.py", "--bench", "taxi1500", "--langs-file", tmp_path / "list.tsv", "--out", tmp_path)
    assert results(tmp_path)["languages"].keys() == {"swh_Latn", "amh_Ethi"}


@pytest.fixture
def cached(models, tmp_path, monkeypatch):
    """Fill the hub's cache as huggingface_hub leaves it, with org/model and its adapter org/adapter."""
    import huggingface_hub

    from mala.lora import LoRAConfig, add_lora
    from mala.storage.peft_adapter import save_adapter

    def store(name):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return folder / "snapshots" / ("0" * 40)

    shutil.copytree(models["byte-level"][0], store("org/model"), dirs_exist_ok=True)
    model = Llama.from_pretrained(models["byte-level"][0])
    add_lora(model, LoRAConfig(modules_to_save=()))
    save_adapter(model, store("org/adapter"), "org/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_what_is_done_is_taken_only_for_what_it_is(tmp_path):
    """Models that differ in the last rows, a setting or an adapter's scaling share one --out.

    Each of them is measured anew.
    """
    from mala.lora import LoRAConfig, add_lora
    from mala.storage.peft_adapter import save_adapter

    args = ["evaluate.py", "--bench", "nll", "--langs", "swh_Latn", "--limit", 2]

    def measure(*more, out="shared"):
        succeed(*args, *more, "--out", tmp_path / out)
        return results(tmp_path / out)["macro"]["nll_per_document"]

    model = Llama(tiny_config(vocab_size=2048, max_position_embeddings=64, initializer_range=0.2))
    init_weights(model, 0)
    variants = {}
    for name in ("plain", "last row", "rotary"):
        if name == "last row":
            model.lm_head.weight.data[-100:] += 0.5
        if name == "rotary":
            model.config.rope_theta = 300.0
        model.save_pretrained(tmp_path / name)
        shutil.copy(TINY / "tokenizer.model", tmp_path / name)
        variants[name] = ["--model", tmp_path / name]
    add_lora(model, LoRAConfig(modules_to_save=()))
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
    for alpha in (8, 64):
        folder = tmp_path / f"adapter {alpha}"
        save_adapter(model, folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": alpha}))
        variants[folder.name] = ["--model", tmp_path / "rotary", "--adapter", folder]
    shared = {name: measure(*more) for name, more in variants.items()}
    alone = {name: measure(*more, out=f"{name} alone") for name, more in variants.items()}
    assert shared == alone and len(set(shared.values())) == 5
    done = sorted((tmp_path / "shared/done").glob("*.json"))
    assert len(done) == 5 and measure(*variants["plain"]) == alone["plain"]

    # A damaged file is measured again.
    for content in ("{", "{}", "[]", '{"seconds": 1.0, "predictions": []}'):
        for file in done:
            file.write_text(content)
        assert measure(*variants["rotary"]) == alone["rotary"]


def test_figures_that_are_no_numbers_are_refused(tmp_path):
    model = Llama.from_pretrained(TINY)
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "model")
    for bench in ("nll", "taxi1500"):
        with pytest.raises(
            SystemExit, match="swh_Latn: the log-likelihood of text 0 is nan; .* try --dtype float32"
        ):
            succeed(
                "evaluate.py",
                "--bench",
                bench,
                "--model",
                tmp_path / "model",
                "--langs",
                "swh_Latn",
                "--out",
                tmp_path / "out",
            )
    assert not (tmp_path / "out/results.json").exists() and not list((tmp_path / "out").glob("done/*.json"))


def test_a_picture_that_fails_costs_no_result(tmp_path, capsys):
    (tmp_path / "results.png").mkdir()
    succeed("evaluate.py", "--bench", "taxi1500", "--langs", "swh_Latn", "--out", tmp_path)
    assert results(tmp_path)["languages"].keys() == {"swh_Latn"}


def test_names_of_the_hub_and_byte_level_tokenizers(cached, models, tmp_path):
    args = ["evaluate.py", "--bench", "taxi1500", "--langs", "swh_Latn", "--limit", 2]
    succeed(*args, "--model", models["byte-level"][0], "--out", tmp_path / "folder")
    succeed(*args, "--model", "org/model", "--out", tmp_path / "name")
    assert (tmp_path / "folder/predictions.jsonl").read_bytes() == (
        tmp_path / "name/predictions.jsonl"
    ).read_bytes()
    succeed(
        *args, "--adapter", "org/adapter", "--out", tmp_path / "adapter"
    )  # the adapter's config names its base
    assert results(tmp_path / "adapter")["model"].endswith("models--org--model/snapshots/" + "0" * 40)
    assert (tmp_path / "folder/predictions.jsonl").read_bytes() == (
        tmp_path / "adapter/predictions.jsonl"
    ).read_bytes()  # B is 0
    succeed(
        "evaluate.py",
        "--bench",
        "nll",
        "--model",
        "org/model",
        "--langs",
        "swh_Latn",
        "--limit",
        2,
        "--out",
        tmp_path / "nll",
    )
    assert results(tmp_path / "nll")["languages"]["swh_Latn"]["tokens"] > 20
