"""Test tools.fertility against plain counting, and its unreachable pieces against texts of all kinds."""

import json

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from mala.cli import UserError
from mala.storage.corpus import Corpus
from mala.storage.files import write_json
from mala.vocab import count_words, sample, train_pieces
from mala.words.merges_and_scores import merge
from mala.words.tokenizer import Tokenizer, append_pieces
from tools.fertility import fertility_report, measure, print_report, unreachable
from tools.pictures import draw_fertility

BASE = Tokenizer.from_pretrained(ROOT / "assets/tiny-llama")
DEMO = Corpus(ROOT / "assets/demo/sib200").load("train")
MERGED = Tokenizer(merge(BASE, Tokenizer(train_pieces(count_words(sample(DEMO, 0.3, 0)), 3000))))
LOST = set(unreachable(MERGED))


@pytest.mark.parametrize(
    "tokenizer", [BASE, MERGED, Tokenizer(train_pieces(count_words([("abc ab bc", 2)]), 8))]
)
def test_figures_are_those_of_plain_counting(tokenizer):
    for language, texts in DEMO.items():
        pieces = [piece for text in texts for piece in tokenizer.processor.encode(text, out_type=str)]
        ids = [i for text in texts for i in tokenizer.encode(text)]
        joined = " ".join(texts)
        if language == "khm_Khmr" or language == "mya_Mymr":
            units = sum(not character.isspace() for character in joined)
        else:
            units = len(joined.replace("፡", " ").split())
        assert measure(tokenizer, language, texts) == {
            "fertility": len(pieces) / units,
            "bytes_per_token": sum(len(text.encode()) for text in texts) / len(pieces),
            "byte_share": sum(piece.startswith("<0x") for piece in pieces) / len(pieces),
            "unk_share": sum(i == tokenizer.processor.unk_id() for i in ids) / len(pieces),
        }


def test_fertility_of_words_and_of_characters():
    assert measure(BASE, "amh_Ethi", ["ጤና፡ጤና ጤና"])["fertility"] == len(BASE.encode("ጤና፡ጤና ጤና")) / 3
    assert measure(BASE, "tha_Thai", ["กข กค"])["fertility"] == len(BASE.encode("กข กค")) / 4


def test_no_text_brings_out_what_is_called_unreachable_and_some_text_the_rest():
    found = {
        MERGED.processor.id_to_piece(i)
        for texts in DEMO.values()
        for ids in MERGED.encode_batch(texts)
        for i in ids
    }
    assert LOST and not LOST & found
    for piece in MERGED.scores():
        text = "\n" + piece.replace("▁", " ")  # after a byte, because a byte merges with nothing
        assert (piece in LOST) == (MERGED.processor.piece_to_id(piece) not in MERGED.encode(text)), piece


around = st.text("abeis \n\té.", max_size=6)


@given(piece=st.sampled_from(sorted(LOST)), before=around, after=around, copies=st.integers(1, 3))
@settings(deadline=None, max_examples=300)
def test_nothing_around_an_unreachable_piece_brings_it_out(piece, before, after, copies):
    text = before + copies * piece.replace("▁", " ") + after
    assert MERGED.processor.piece_to_id(piece) not in MERGED.encode(text)


def test_a_piece_whose_parts_are_missing_is_unreachable():
    added = {"▁qxz": -1.0, "qx": -5000.0, "qxj": -5001.0}
    assert set(unreachable(Tokenizer(append_pieces(BASE, added)))) == {"▁qxz"}


def test_the_report(tmp_path, capsys):
    report = fertility_report(BASE, MERGED, DEMO)
    assert report["pieces"] == {"base": 2048, "new": len(MERGED), "added": len(MERGED) - 2048, "unreachable_base": 0,
                                "unreachable_new": len(LOST), "unreachable_added": len(LOST - set(BASE.pieces))}  # fmt: skip
    languages = report["languages"]
    assert languages.keys() == DEMO.keys()
    spaced = [language for language in languages if language not in ("khm_Khmr", "mya_Mymr")]
    for side in ("base", "new"):
        mean = sum(languages[language][side]["fertility"] for language in spaced) / len(spaced)
        assert report["macro"][side]["fertility"] == pytest.approx(mean)
        mean = sum(figures[side]["byte_share"] for figures in languages.values()) / len(languages)
        assert report["macro"][side]["byte_share"] == pytest.approx(mean)
    write_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    print_report(report)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(DEMO) + 2 + 2
    changes = [float(line.split()[3].rstrip("%")) for line in printed[1 : 1 + len(DEMO)]]
    assert changes == sorted(changes)
    assert printed[-2].endswith("(*) in mya_Mymr, khm_Khmr") or printed[-2].endswith(
        "(*) in khm_Khmr, mya_Mymr"
    )
    assert (
        f"no text encodes to {len(LOST - set(BASE.pieces)):,} of the {len(MERGED) - 2048:,} added"
        in printed[-1]
    )
    many = {f"{a}{b}a_Latn": languages["swh_Latn"] for a in "abcdefg" for b in "abcdefg"}
    print_report({**report, "languages": many})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 40 + 1 + 2 + 2 and printed[21].startswith("… 9 more …")
    for name, figures in (("all", languages), ("many", many), ("one", {"khm_Khmr": languages["khm_Khmr"]})):
        draw_fertility({**report, "languages": figures}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
    draw_fertility(report, tmp_path / "picture.svg")
    assert "swh_Latn" in (tmp_path / "picture.svg").read_text()
    with pytest.raises(UserError, match=r"picture\.xyz: .*'xyz'"):
        draw_fertility(report, tmp_path / "picture.xyz")
    assert len(list(tmp_path.iterdir())) == 5


def test_a_language_without_words_is_named():
    with pytest.raises(UserError, match="amh_Ethi: the text holds no words"):
        measure(BASE, "amh_Ethi", ["፡ ፡"])


def test_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="does not begin with the pieces of"):
        fertility_report(MERGED, BASE, DEMO)
