"""Examples, their files, and the order in which they are trained."""

import json

import numpy as np
import pytest
from conftest import character_tokenizer

from nanopcf.data import batch_indices, encode_examples, read_examples, write_jsonl
from nanopcf.tasks import make_examples


def test_jsonl_round_trip(tmp_path):
    examples = make_examples("modular", 20, seed=0)
    write_jsonl(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl", need=("prompt", "trajectory", "answer")) == examples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        (b'{"prompt": "a"}\n[1]\n', "line 2: expected a JSON object, found list"),
        (b'\n{"text": "a"}\n', "line 2: no field 'prompt'; it has text"),
        (b'{"prompt": 3}\n', "line 1: 'prompt' must be a string"),
        (b'{"prompt": ""}\n', "line 1: 'prompt' is empty"),
        (b'{"prompt": " \\n "}\n', "line 1: 'prompt' is empty"),
        (b'{"prompt": "a", "answer": true}\n', "line 1: 'answer' must be a string, found True"),
        (b'{"prompt": "a", "answer": NaN}\n', "line 1: 'answer' is NaN, which is no answer"),
        (b'{"prompt": "a", "answer": "nan"}\n', "line 1: 'answer' is nan, which is no answer"),
        (b'{"prompt": "a", "answer": -Infinity}\n', "line 1: 'answer' is -inf, which is no answer"),
        (b'{"question": "a", "answer": "5", "image": "a.png"}\n', "line 1: 'image' holds an image"),
        (b'{"question": "a", "answer": "5", "context": 3}\n', "line 1: 'context' must be text, found 3"),
        (b'{"question": "a", "answer": ["5", "6"]}\n', "line 1: 'answer' must be a string, found ['5', '6']"),
        (b'{"prompt": "a", "reward_model": {"ground_truth": [4]}}\n', "line 1: 'answer' must be a string, found [4]"),
        (b'{"prompt": "a", "completion": 3}\n', "line 1: 'trajectory' must be a string, found 3"),
        (b'{"prompt": "a", "messages": "x"}\n', "line 1: 'messages' must be a list of objects"),
        (
            b'{"prompt": "a"}\n\n{"question": "b", "answer": "1"}\n',
            "line 3: its shape is 'question', that of line 1 'prompt as text'; a file has one shape",
        ),
        (b"\xff\xfe\n", "line 1: not valid JSON"),
        (b"\n\n", "no examples"),
    ],
)
def test_bad_jsonl_is_one_clear_sentence(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl") as error:
        read_examples(path)
    assert message in str(error.value)


def test_missing_file():
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: can't be read \(No such file"):
        read_examples("nowhere.jsonl")


def test_long_examples_are_refused_by_line_or_dropped_and_counted(tmp_path, capsys):
    rows = [
        dict(prompt="1+1=", trajectory="2"),
        dict(prompt="1+1=", trajectory="2" * 20),
        dict(prompt="1=", trajectory="1"),
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    examples, tokenizer = read_examples(path), character_tokenizer()
    with pytest.raises(ValueError, match=r"F, line 2: 25 tokens, at most 10 fit; --drop-long"):
        encode_examples(examples, tokenizer, 10, "F")
    kept = encode_examples(examples, tokenizer, 10, "F", drop=True)
    assert [len(s.tokens) for s in kept] == [6, 4] and [s.prompt_length for s in kept] == [4, 2]
    assert "F: 1 of 3 examples dropped, longer than 10 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all 3 examples are longer than 3 tokens"):
        encode_examples(examples, tokenizer, 3, "F", drop=True)


def test_batches_go_through_every_epoch_once():
    order = np.concatenate([batch_indices(10, 4, step, seed=3) for step in range(10)])
    for epoch in range(4):
        assert sorted(order[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert not np.array_equal(order[:10], order[10:20])
    assert len(batch_indices(3, 8, 0, 0)) == 8  # a batch larger than the data
    assert not np.array_equal(batch_indices(50, 20, 0, 1), batch_indices(50, 20, 0, 2))
