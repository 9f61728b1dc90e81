"""Test mala.generate.

Compare greedy decoding with transformers and sampling with its distribution, and run the command.
"""

import runpy
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import transformers
from conftest import ROOT, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mala.cli import UserError
from mala.generate import draw, generate, stream
from mala.model import Llama
from mala.storage.config_json import to_config_json
from mala.words.tokenizer import Tokenizer
from tools.generate_command import main
from tools.known_models import init_weights

TINY = ROOT / "assets/tiny-llama"
TOKENIZER = Tokenizer.from_pretrained(TINY)


def test_the_likeliest_tokens_are_transformers():
    model = Llama.from_pretrained(TINY, dtype=torch.float32)
    reference = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for prompt in ("The river", "Health", "a"):
        ids = TOKENIZER.encode(prompt, bos=True)
        expected = reference.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[
            0, len(ids) :
        ].tolist()
        ours = list(generate(model, ids, 40, temperature=0))
        assert ours == [token for token in expected if token != model.config.eos_token_id] and len(ours) > 5


@pytest.mark.parametrize("eos", [None, 7, [7, 9]])
def test_it_ends_at_the_next_document_too(eos):
    """A model trained on packed documents ends each with the next `<s>`. transformers stops at the same tokens."""
    config = tiny_config(vocab_size=30, initializer_range=0.3, bos_token_id=1, eos_token_id=eos)
    model = Llama(config)
    init_weights(model, 2)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_config_json(config))).eval()
    reference.load_state_dict(model.state_dict())
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    lengths = set()
    for bos in range(30):  # let every token act as `<s>`
        for prompt in ([1, 5], [1, 11, 3], [1, 20]):
            ours = list(generate(model, prompt, 20, temperature=0, ends=[bos]))
            ends = [bos, *eos]
            options = dict(max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=0)
            theirs = reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
            assert ours == (theirs[:-1] if theirs[-1] in ends else theirs)
            lengths.add(len(ours))
    assert len(lengths) > 3


def test_a_user_sees_the_first_document_alone(monkeypatch, capsys):
    """The command stops at the tokenizer's own `<s>`."""
    drawn = iter([*TOKENIZER.encode(" and so"), TOKENIZER.bos_id, *TOKENIZER.encode(" another")])
    monkeypatch.setattr("mala.generate.draw", lambda *_: next(drawn))
    monkeypatch.setattr(sys, "argv", ["mala.generate", "--prompt", "One", "--model", str(TINY)])
    main()
    assert capsys.readouterr().out.split() == ["One", "and", "so"]


def test_it_ends_where_the_text_ends_and_refuses_what_does_not_fit():
    model = Llama(tiny_config(vocab_size=30, initializer_range=0.5))
    init_weights(model, 1)
    whole = list(generate(model, [1, 5], 30, seed=3))
    assert whole == list(generate(model, [1, 5], 30, seed=3)) != list(generate(model, [1, 5], 30, seed=4))
    model.config.eos_token_id = [29, whole[3]]
    assert list(generate(model, [1, 5], 30, seed=3)) == whole[: whole.index(whole[3])]
    with pytest.raises(
        UserError, match="a prompt of 40 tokens and 25 new tokens exceed the model's context of 64"
    ):
        next(generate(model, [1] * 40, 25))


def test_tokens_are_drawn_with_their_probabilities_from_the_nucleus():
    p = torch.tensor([0.02, 0.5, 0.3, 0.18])
    generator = torch.Generator().manual_seed(0)
    for temperature, top_p, kept in (
        (1.0, 1.0, [0, 1, 2, 3]),
        (1.0, 0.75, [1, 2]),
        (0.5, 0.99, [1, 2, 3]),
        (1.0, 0.4, [1]),
    ):
        drawn = torch.tensor([draw(p.log() + 7, temperature, top_p, generator) for _ in range(3000)])
        expected = torch.zeros(4)
        expected[kept] = p[kept] ** (1 / temperature)
        assert torch.bincount(drawn, minlength=4) / 3000 == pytest.approx(
            (expected / expected.sum()).numpy(), abs=0.03
        )
        assert set(drawn.tolist()) <= set(kept)


@given(st.text(max_size=30))
@settings(max_examples=50)
def test_the_stream_is_the_text_in_whole_characters(text):
    ids = TOKENIZER.encode(text)
    parts = list(stream(TOKENIZER, [TOKENIZER.bos_id], iter(ids)))
    assert "".join(parts) == TOKENIZER.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_as_a_user_types_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        sys.modules.pop("mala.generate", None)  # otherwise runpy warns
        with patch.object(sys, "argv", ["mala.generate", *args]):
            runpy.run_module("mala.generate", run_name="__main__")
        return capsys.readouterr().out

    printed = run("--prompt", "The river", "--max-tokens", "12")
    assert printed.startswith("The river") and printed.endswith("\n") and len(printed) > 20
    assert (
        printed
        == run("--prompt", "The river", "--max-tokens", "12")
        != run("--prompt", "The river", "--seed", "5")
    )
    for option, value, sentence in [
        ("--top-p", "0", "top_p 0.0; expected"),
        ("--model", "nowhere", "nowhere/config.json: there is no"),
        ("--max-tokens", "600", "exceed the model's context of 512"),
    ]:
        with pytest.raises(SystemExit, match=sentence):
            run(option, value)
    done = subprocess.run(
        [sys.executable, "-m", "mala.generate", "--top-p", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
