"""Test the settings that keep the base's knowledge (--weights, --replay, --sample-by) and their report."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from test_data import LINES, TOKENIZER, all_of, expected_tokens, make, write_corpus
from test_train import SHORT, refuse, succeed

from mala.cli import UserError, parse
from mala.data import Batches, Stream, file_digests, open_streams, tokenise
from mala.running.prepare import open_corpora, open_tokens
from mala.running.settings import Settings
from mala.storage.corpus import Corpus, language_shares
from tools.tables import print_nll

DEMO = ROOT / "assets/demo/sib200"


def replay_of(tmp_path, *languages):
    for language in languages:
        shutil.copytree(DEMO / language, tmp_path / "replay" / language)
    return tmp_path / "replay"


def draws_of_before(streams, seq_len, batch_size, steps, alpha, seed):
    """Draw as `Batches` did before weights and replay existed."""
    weights = np.array([stream.documents for stream in streams], dtype=np.float64) ** alpha
    rng = np.random.default_rng([seed, 0])
    languages = rng.choice(len(streams), (steps, batch_size), p=weights / weights.sum())
    blocks = np.empty((steps, batch_size), dtype=np.uint32)
    for index, stream in enumerate(streams):
        rng = np.random.default_rng([seed, 1, index])
        rows = np.flatnonzero(languages == index)
        count = -(-len(stream) // seq_len)
        for start in range(0, len(rows), count):
            blocks.flat[rows[start : start + count]] = rng.permutation(count)[: len(rows) - start]
    return languages, blocks


@pytest.mark.parametrize("seed", [0, 7])
def test_without_weights_and_replay_every_draw_is_what_it_was(seed):
    sizes = [(35, 900), (35, 1200), (7, 50), (1, 3), (100_000, 9000)]
    streams = {str(i): Stream([np.arange(tokens)], documents) for i, (documents, tokens) in enumerate(sizes)}
    batches = Batches(streams, 32, 8, 300, 0.3, seed)
    languages, blocks = draws_of_before(list(streams.values()), 32, 8, 300, 0.3, seed)
    assert np.array_equal(batches.language_of_row, languages)
    assert np.array_equal(batches.block_of_row, blocks)


def test_shares_are_weight_times_n_to_the_alpha():
    assert np.array_equal(language_shares([35, 70], 0.3), language_shares([35, 70], 0.3, [1, 1]))
    expected = np.array([5 * 10**0.5, 1000**0.5, 2 * 100**0.5])
    shares = language_shares([10, 1000, 100], 0.5, [5, 1, 2])
    assert shares == pytest.approx(expected / expected.sum())


def mixture(tmp_path, **more):
    """Return the streams of a run on the demo's Swahili and Amharic, and those of its replay corpus."""
    settings = Settings(out=str(tmp_path / "out"), langs=("swh_Latn", "amh_Ethi"), **more)
    corpora = open_corpora(settings)
    for name, corpus in corpora.items():
        files = [file for of_language in corpus.files.values() for file in of_language]
        tokenise(corpus, TOKENIZER, file_digests(files, {}), tmp_path / "out/tokens" / name)
    streams, *replay = open_tokens(settings, corpora)
    return streams, {f"{one} (replay)": stream for part in replay for one, stream in part.items()}


@pytest.mark.parametrize("share", [0.1, 0.75])
def test_replay_has_its_share_of_the_rows_and_a_weight_holds_within_its_corpus(tmp_path, share):
    replay = replay_of(tmp_path, "eng_Latn", "cym_Latn")
    write_corpus(replay, fra_Latn=LINES)  # fewer documents than the others
    weights = ("eng_Latn=3", "amh_Ethi=0.5")
    streams, again = mixture(tmp_path, replay=str(replay), replay_share=share, weights=weights)
    assert streams.keys() == {"amh_Ethi", "swh_Latn"} and len(again) == 3
    batches = Batches(streams | again, 16, 8, 5000, alpha=0.3, seed=1)
    french = (len(LINES) - int(len(LINES) * 0.2)) ** 0.3  # without held-out documents
    of_replay = np.array([35**0.3, 3 * 35**0.3, french])
    expected = [*(1 - share) * np.array([1, 2]) / 3, *share * of_replay / of_replay.sum()]
    assert batches.languages == [
        "amh_Ethi", "swh_Latn", "cym_Latn (replay)", "eng_Latn (replay)", "fra_Latn (replay)",
    ]  # fmt: skip
    drawn = np.bincount(batches.language_of_row.flat, minlength=5) / 40_000
    expected = np.array(expected)
    assert np.all(np.abs(drawn - expected) < 4 * np.sqrt(expected * (1 - expected) / 40_000))
    for step in (0, 4999):  # still a pure function of step, process rank and number of processes
        whole, _ = batches[step]
        parts = [batches.share(step, rank, 4)[0].tolist() for rank in range(4)]
        assert whole.tolist() == sum(parts, [])
    row = batches.languages_of(0).index(next(one for one in batches.languages_of(0) if "replay" not in one))
    stream = all_of(streams[batches.languages_of(0)[row]])
    start = 16 * int(batches.block_of_row[0, row])
    assert batches[0][0][row].tolist() == np.resize(np.roll(stream, -start), 16).tolist()


def test_a_language_of_both_corpora_is_two_streams(tmp_path):
    replay = replay_of(tmp_path, "swh_Latn")
    streams, again = mixture(tmp_path, replay=str(replay), replay_share=0.5)
    together = Batches(streams | again, 16, 8, 1000, alpha=0.3, seed=0)
    assert together.languages == ["amh_Ethi", "swh_Latn", "swh_Latn (replay)"]
    assert np.mean(together.language_of_row == 2) == pytest.approx(0.5, abs=0.03)


def test_sampling_by_bytes_knows_no_line_breaks(tmp_path):
    text = "\n".join(LINES * 6)
    write_corpus(tmp_path / "lines", swh_Latn=text.split("\n"), amh_Ethi=[LINES[3]])
    write_corpus(tmp_path / "whole", swh_Latn=[text], amh_Ethi=[LINES[3]])
    sizes = {}
    for name in ("lines", "whole"):
        make(tmp_path / name, tmp_path / f"{name}.tokens")
        corpus = Corpus(tmp_path / name, held_out=0.0)
        for by in ("documents", "bytes"):
            opened = open_streams(corpus, tmp_path / f"{name}.tokens", by)
            sizes[name, by] = [opened[language].size for language in ("swh_Latn", "amh_Ethi")]
    assert sizes["lines", "documents"] == [48, 1] and sizes["whole", "documents"] == [1, 1]
    amharic = len(LINES[3].encode())
    assert sizes["whole", "bytes"] == [len(text.encode()), amharic]
    # The 47 line breaks belong to no document.
    assert sizes["lines", "bytes"] == [len(text.encode()) - 47, amharic]


def test_sampling_by_tokens_with_alpha_1_reads_every_text_equally_often(tmp_path):
    write_corpus(tmp_path / "corpus", swh_Latn=LINES * 9, amh_Ethi=[LINES[3]] * 30)
    make(tmp_path / "corpus", tmp_path / "tokens")
    streams = open_streams(Corpus(tmp_path / "corpus", held_out=0.0), tmp_path / "tokens", "tokens")
    assert all(stream.size == len(stream) for stream in streams.values())
    batches = Batches(streams, 16, 8, steps := 4000, alpha=1, seed=0)
    read = np.bincount(batches.language_of_row.flat) * 16 / [len(stream) for stream in streams.values()]
    assert read == pytest.approx(steps * 8 * 16 / sum(map(len, streams.values())), rel=0.05)


def test_the_bytes_of_what_is_held_out_do_not_count(tmp_path):
    """Bytes are counted per file. If part of a file is held out, they are reduced in proportion to its tokens."""
    documents = ["a short one", "another that is a little longer"] * 50
    write_corpus(tmp_path / "corpus", eng_Latn=documents)
    make(tmp_path / "corpus", tmp_path / "tokens", held_out=0.2)
    opened = open_streams(Corpus(tmp_path / "corpus", held_out=0.2), tmp_path / "tokens", by="bytes")
    assert opened["eng_Latn"].documents == 80
    assert opened["eng_Latn"].size == pytest.approx(sum(len(text.encode()) for text in documents[:80]))


def test_token_files_that_do_not_know_their_bytes_are_made_anew(tmp_path):
    write_corpus(tmp_path / "corpus", swh_Latn=LINES)
    make(tmp_path / "corpus", tmp_path / "tokens")
    index = json.loads((tmp_path / "tokens/index.json").read_text())
    [part] = index["languages"]["swh_Latn"]
    assert part.pop("text_bytes") == sum(len(text.encode()) for text in LINES)
    (tmp_path / "tokens/index.json").write_text(json.dumps(index))  # as an earlier version left it
    streams = make(tmp_path / "corpus", tmp_path / "tokens")
    assert all_of(streams["swh_Latn"]) == expected_tokens(LINES)
    [part] = json.loads((tmp_path / "tokens/index.json").read_text())["languages"]["swh_Latn"]
    assert part["text_bytes"] == sum(len(text.encode()) for text in LINES)


WRONG = [
    (["--weights", "fao_Latn=2"], "weights names fao_Latn; expected some of amh_Ethi, swh_Latn"),
    (["--weights", "swh_Latn"], "weights has 'swh_Latn', expected one positive number per language"),
    (["--weights", "swh_Latn=0"], "weights has 'swh_Latn=0'"),
    (["--weights", "swh_Latn=-1"], "weights has 'swh_Latn=-1'"),
    (["--weights", "swh_Latn=inf"], "weights has 'swh_Latn=inf'"),
    (["--weights", "swh_Latn=2,amh_Ethi=1,swh_Latn=2"], "weights has 'swh_Latn=2'"),
    (["--base-langs", "deu_Latn"], "base_langs names deu_Latn; expected some of amh_Ethi, swh_Latn"),
    (["--replay-share", "0.1"], "replay_share is 0.1, expected e.g. 0.1 with --replay, else 0"),
    (["--replay", DEMO, "--replay-share", "1.2"], "replay_share is 1.2, expected e.g. 0.1 with --replay"),
    (["--replay", DEMO, "--replay-share", "1"], "replay_share is 1.0, expected e.g. 0.1 with --replay"),
    (["--replay", DEMO, "--replay-share", "nan"], "replay_share is nan, expected e.g. 0.1 with --replay"),
    (["--replay", DEMO], "replay_share is 0.0, expected e.g. 0.1 with --replay"),
    (["--replay", "nowhere", "--replay-share", "0.1"], "nowhere: there is no such folder"),
    (["--sample-by", "words"], "invalid choice: 'words'"),
]


@pytest.mark.parametrize("args, message", WRONG, ids=[" ".join(map(str, args)) for args, _ in WRONG])
def test_a_wrong_setting_is_one_sentence_also_of_a_dry_run(args, message, tmp_path, monkeypatch):
    for more in ([], ["--dry-run"]):
        assert message in refuse("train.py", [*SHORT, "--out", tmp_path / "out", *args, *more], monkeypatch)
        assert not (tmp_path / "out").exists()


def test_a_recipe_takes_them_too(tmp_path):
    recipe = (
        'weights = ["eng_Latn=5", "swh_Latn=0.5"]\nreplay = "text"\nreplay_share = 0.1\nsample_by = "bytes"\n'
    )
    (tmp_path / "recipe.toml").write_text(recipe)
    settings = parse(Settings, "", ["--config", str(tmp_path / "recipe.toml")])
    assert settings.language_weights() == {"eng_Latn": 5.0, "swh_Latn": 0.5} and settings.sample_by == "bytes"
    with pytest.raises(UserError, match="replay_share is 0.1"):
        Settings(replay_share=0.1)


def test_a_run_with_replay_measures_it_says_so_and_goes_on(tmp_path, monkeypatch):
    replay, out = replay_of(tmp_path, "eng_Latn", "swh_Latn"), tmp_path / "out"
    (replay / "swh_Latn/test.tsv").write_text("index_id\tcategory\ttext\n1\tx\tmoja\n")
    mixed = [*SHORT, "--replay", replay, "--replay-share", "0.3", "--weights", "amh_Ethi=2", "--sample-by", "bytes",
             "--save-every", "2", "--out", out]  # fmt: skip
    plan = succeed("train.py", *mixed, "--dry-run")
    assert f"{replay}: replay, 0.3 of the tokens of a step: 2 languages, 70 documents to train on" in plan
    printed = succeed("train.py", *mixed)
    assert "2 languages, " in printed and "mean of 1 language new to the base" in printed
    assert "mean of 2 languages of the base" in printed and "mean of 3 languages: " in printed
    held_out = {file.name: len(file.read_text().splitlines()) for file in (out / "held_out").iterdir()}
    # Swahili is in both corpora: the main corpus's held-out documents are measured.
    assert held_out == {"amh_Ethi.jsonl": 14, "eng_Latn.jsonl": 14, "swh_Latn.jsonl": 14}
    nll = json.loads((out / "nll.json").read_text())
    assert nll["after"]["languages"].keys() == {"amh_Ethi", "eng_Latn", "swh_Latn"}
    assert (out / "tokens/replay/eng_Latn.0.bin").exists() and not (out / "tokens/eng_Latn.0.bin").exists()

    whole = (out / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints/step-6")
    shutil.rmtree(out / "adapter")
    assert "continuing after step 4" in succeed("train.py", *mixed)
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == whole
    for args, message in [
        (["--replay-share", "0.2"], "the earlier run had replay_share 0.3, this one has 0.2"),
        (["--weights", "amh_Ethi=3"], "had weights ['amh_Ethi=2'], this one has ['amh_Ethi=3']"),
        (["--sample-by", "documents"], "had sample_by bytes, this one has documents"),
    ]:
        assert message in refuse("train.py", [*mixed, *args], monkeypatch)
    rows = (replay / "eng_Latn/train.tsv").read_text()
    (replay / "eng_Latn/train.tsv").write_text(rows.replace("a", "e", 1))
    assert f"the earlier run had other --replay data than {replay}" in refuse("train.py", mixed, monkeypatch)


def as_of_before(file):
    """Remove the newer settings from a file's identity."""
    content = json.loads(file.read_text())
    for key in ("weights", "sample_by", "replay_share", "replay"):
        del content["identity"][key]
    file.write_text(json.dumps(content))


def test_a_run_from_before_these_settings_goes_on_and_a_finished_one_stays(tmp_path):
    """A resumed run gives the same bits. A finished run is not repeated, even without checkpoints."""
    run = [*SHORT, "--save-every", "2", "--out", tmp_path / "out"]
    succeed("train.py", *run)
    adapter = tmp_path / "out/adapter/adapter_model.safetensors"
    whole = adapter.read_bytes()
    as_of_before(tmp_path / "out/run.json")
    as_of_before(tmp_path / "out/checkpoints/step-4/training_state.json")
    shutil.rmtree(tmp_path / "out/checkpoints/step-6")
    shutil.rmtree(tmp_path / "out/adapter")
    assert "continuing after step 4" in succeed("train.py", *run)
    assert adapter.read_bytes() == whole

    as_of_before(tmp_path / "out/run.json")
    shutil.rmtree(tmp_path / "out/checkpoints")
    written = adapter.stat().st_mtime_ns
    assert "this run is finished" in succeed("train.py", *run) and adapter.stat().st_mtime_ns == written


def figures(**nll):
    languages = {language: {"documents": 2, "nll_per_document": value, "nll_per_token": 1.0, "bits_per_byte": value / 10}
                 for language, value in nll.items()}  # fmt: skip
    return {"languages": languages, "macro": {}}


def test_the_table_shows_languages_of_the_base_apart(capsys):
    before, after = figures(eng_Latn=10.0, swh_Latn=100.0, amh_Ethi=300.0), figures(eng_Latn=15.0, swh_Latn=50.0, amh_Ethi=30.0)  # fmt: skip
    print_nll(before, after, known={"eng_Latn", "deu_Latn"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["amh_Ethi", "swh_Latn", "eng_Latn"]
    assert (
        "mean of 2 languages new to the base: 200.0 -> 40.0 (-80.0%), bits per byte 20.00 -> 4.00; improved: 2 of 2"
        in lines[4]
    )
    assert (
        "mean of 1 language of the base: 10.0 -> 15.0 (+50.0%), bits per byte 1.00 -> 1.50; improved: 0 of 1"
        in lines[5]
    )
    assert "mean of 3 languages: 136.7 -> 31.7" in lines[6] and len(lines) == 7
    print_nll(before, after, known={"deu_Latn"})  # no language of the base: as before
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[3].startswith("eng_Latn")
        and "mean of 3 languages: 136.7 -> 31.7" in lines[4]
        and len(lines) == 5
    )


def test_a_replay_corpus_may_be_too_small_to_hold_text_out(tmp_path):
    """A text without spaces can also be halved for a sample."""
    for name, language, lines in (("data", "lao_Laoo", 20), ("replay", "eng_Latn", 4)):
        (tmp_path / name).mkdir()
        text = "".join(f"ພາສາລາວ{line}ບໍ່ມີຍະຫວ່າງ\n" for line in range(lines))
        (tmp_path / name / f"{language}.txt").write_text(text, encoding="utf-8")
    run = [*SHORT, "--langs", "lao_Laoo", "--extend-vocab", 0, "--data", tmp_path / "data", "--replay"]
    run += [tmp_path / "replay", "--replay-share", 0.5, "--eval-every", 3, "--samples", "lao_Laoo"]
    succeed("train.py", *run, "--out", tmp_path / "out")
    assert [file.stem for file in (tmp_path / "out/held_out").iterdir()] == ["lao_Laoo"]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(line["samples"]["lao_Laoo"].startswith("ພາ") for line in lines if "samples" in line)
