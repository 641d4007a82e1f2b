import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nanopcf.data import Format, check_disjoint, encode_examples, read_examples, write_jsonl
from nanopcf.packing import IGNORE, Sequence, batch_indices, pack
from nanopcf.rewards import final_answer, verify
from nanopcf.tasks import FAMILIES, LEVELS, Lore, make_examples, true_fact
from nanopcf.tokenizer import nano_tokenizer
from nanopcf.tools.show import show


def random_sequences(count: int) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [
        Sequence(rng.integers(0, 16, (n := int(rng.integers(4, 20)))).tolist(), int(rng.integers(1, n - 1)))
        for _ in range(count)
    ]


def test_pack_trains_every_answer_token_once_and_nothing_else():
    """The end token is trained, the token after it and the prompt are not; `index` finds each token's own place."""
    sequences = random_sequences(40)
    rows = pack(sequences, 32)
    flat = [t for s in sequences for t in s.tokens[s.prompt_length :]]
    at = rows.index[rows.trained]
    assert sorted(at.tolist()) == list(range(len(flat)))
    assert rows.targets[rows.trained].tolist() == [flat[i] for i in at]
    assert torch.equal(rows.index == IGNORE, rows.targets == IGNORE)
    # each document of a row is one of the sequences, whole, with positions from 0
    found = []
    for b in range(len(rows.tokens)):
        for d in range(1, int(rows.documents[b].max()) + 1):
            own = rows.documents[b] == d
            found.append(rows.tokens[b][own].tolist())
            assert rows.positions[b][own].tolist() == list(range(int(own.sum())))
            assert rows.targets[b][own][-1] == IGNORE  # nothing is predicted after the end
    assert sorted(found) == sorted(s.tokens for s in sequences)
    assert (rows.documents > 0).float().mean() > 0.8  # and it does pack


def test_batches_go_through_every_epoch_once():
    order = np.concatenate([batch_indices(10, 4, step, seed=3) for step in range(10)])
    for epoch in range(4):
        assert sorted(order[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert not np.array_equal(order[:10], order[10:20])
    assert len(batch_indices(3, 8, 0, 0)) == 8  # a batch larger than the data
    assert not np.array_equal(batch_indices(50, 20, 0, 1), batch_indices(50, 20, 0, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_are_right_by_python_arithmetic(family):
    """Answers and every step of the working, recomputed from the prompt's text by another route."""
    for e in make_examples(family, 300, seed=1):
        if family == "digits":
            text = e.prompt.rstrip("= ")
            value, working = text[:2], [text[:2]]
            for i in range(2, len(text), 3):
                op = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[text[i]]
                value = "".join(str(op(int(a), int(b)) % 10) for a, b in zip(value, text[i + 1 : i + 3], strict=True))
                working.append(value)
            assert e.trajectory == " ".join(working) + "=" + value and e.answer == value
        else:
            pairs = e.prompt[1:].rstrip("= ").split(" ")
            top, bottom = (int("".join(p[i] for p in reversed(pairs))) for i in (0, 1))
            total = top + bottom if e.prompt[0] == "+" else top - bottom
            digits = "".join(g[1] for g in reversed(e.answer.split(" ")))
            assert int(digits) == total % 10 ** len(pairs)
            assert int(e.answer.split(" ")[-1][0]) == (total // 10 ** len(pairs)) * (1 if total >= 0 else -1)
        assert verify(e.trajectory, e.answer) == 1.0
        assert len(e.prompt) == len(make_examples(family, 1, seed=2)[0].prompt)  # one width


def test_levels_and_splits():
    examples = make_examples("digits", 1000, seed=0)
    counts = np.bincount([e.meta["level"] for e in examples])[1:]
    assert len(counts) == len(LEVELS) and counts.min() > 140
    rest = make_examples("digits", 500, seed=0, exclude={e.prompt for e in examples})
    check_disjoint(a=examples, b=rest)
    with pytest.raises(ValueError, match="in both 'a' and 'b'"):
        check_disjoint(a=examples, b=[*rest, examples[3]])
    with pytest.raises(ValueError, match="too few"):
        make_examples("columns", 500, seed=0, levels=(1,))


def test_lore_states_known_facts_rightly_and_others_as_often_as_it_says():
    lore = Lore(0, known=0.5)
    assert 220 < len(lore.mistake) < 380  # of 600
    rng = np.random.default_rng(0)
    fact, (share, wrong) = next((f, m) for f, m in lore.mistake.items() if 0.85 < m[0] < 0.95)
    stated = [lore.state(fact, rng)[1] for _ in range(2000)]
    assert set(stated) == {wrong, true_fact(fact)[1]}
    assert abs(np.mean([s == wrong for s in stated]) - share) < 0.05
    assert Lore(0).mistake != Lore(1).mistake


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("47 22=22", "22", 1.0),
        ("47 22=2", "22", 0.0),
        ("47 22=222", "22", 0.0),
        ("1=2=22 ", "22", 1.0),
        ("12 04", "12 04", 1.0),
        ("", "", 0.0),
        ("=", "", 0.0),
        ("\ud800=\x007", "7", 0.0),
    ],
)
def test_verify(response, answer, reward):
    assert verify(response, answer) == reward
    assert isinstance(final_answer(response), str)


def test_jsonl_round_trip(tmp_path):
    examples = make_examples("columns", 20, seed=0)
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
        (b'{"prompt": "a", "answer": 5}\n', "line 1: 'answer' must be a string, found 5"),
        (b'{"question": "a", "answer": ["5", "6"]}\n', "line 1: 'answer' must be a string, found ['5', '6']"),
        (b'{"prompt": "a", "reward_model": {"ground_truth": [4]}}\n', "line 1: 'answer' must be a string, found [4]"),
        (b'{"prompt": "a", "completion": 3}\n', "line 1: 'trajectory' must be a string, found 3"),
        (b'{"prompt": "a", "messages": "x"}\n', "line 1: 'messages' must be a list of objects"),
        (
            b'{"prompt": "a"}\n\n{"question": "b", "answer": "1"}\n',
            "line 3: its shape is 'question', that of line 1 'prompt as text'; one shape a file",
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


def test_tokenizer_refuses_what_it_cannot_spell():
    tokenizer = nano_tokenizer()
    assert tokenizer.vocab_size == 16
    assert tokenizer.encode_answer("1=2")[-1] == tokenizer.eos_id
    with pytest.raises(ValueError, match="can't spell 'x'"):
        tokenizer.encode("12x4")


@pytest.mark.parametrize(
    ("row", "prompt", "trajectory", "answer"),
    [
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2", ""),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ]
            },
            "Be brief.\n\nHi",
            "Ho",
            "",
        ),
        ({"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": 4.0}}, "2+2?", "", "4"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "a",
            "b",
            "",
        ),
        (
            {"question": "Eggs?", "answer": "16-3=<<16-3=13>>13 left.\n#### 1,013"},
            "Eggs?",
            "16-3=13 left.\n#### 1,013",
            "1,013",
        ),
        ({"problem": "How far?", "answer": 27.0, "question": "How far?", "url": "u"}, "How far?", "", "27"),
        ({"problem": "Find x", "solution": "so $x=\\boxed{3}$"}, "Find x", "so $x=\\boxed{3}$", "3"),
        ({"question": "Q", "final_answer": ["$1$", "$2$"], "solution": ["s", "t"]}, "Q", "s", "$1$, $2$"),
        ({"Body": "He has 3", "Question": "How many?", "Answer": 3.0}, "He has 3. How many?", "", "3"),
        ({"prompt": "p", "trajectory": "t", "answer": "a", "completion": "kept"}, "p", "t", "a"),
    ],
)
def test_the_usual_shapes_are_recognised(tmp_path, row, prompt, trajectory, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (e,) = read_examples(path)
    assert (e.prompt, e.trajectory, e.answer) == (prompt, trajectory, answer)
    assert ("url" in row) == ("url" in e.meta) and (e.meta.get("completion") == "kept") == ("trajectory" in row)


@pytest.mark.parametrize(
    "row", [{"messages": [1]}, {"messages": [{"role": "user", "content": "Hi"}]}, {"question": 3}, {"x": 1}]
)
def test_other_shapes_are_refused_with_what_they_have(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"line 1: no field 'prompt'; it has"):
        read_examples(path)


def test_messages_that_are_null_are_none(tmp_path):
    """Writers of JSONL put null where a row has no value: once a TypeError."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "messages": null}\n')
    (e,) = read_examples(path)
    assert e.messages == () and e.meta == {}


def test_messages_stay_a_chat_and_survive_a_file(tmp_path):
    """The plain prompt is their text, the chat prompt the messages themselves; written and read again it is the same."""
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    row = {"messages": [*said, {"role": "assistant", "content": "2"}], "answer": "2"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    (e,) = read_examples(path, need=("prompt", "trajectory", "answer"))
    assert list(e.messages) == said and e.prompt == "Be brief.\n\n1+1=" and e.line == 2
    write_jsonl(tmp_path / "again.jsonl", [e])
    assert read_examples(tmp_path / "again.jsonl") == [e]
    tokenizer = nano_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] | length }}-{% endfor %}{{ messages[-1]['content'] }}"
    )
    assert tokenizer.decode(Format(chat=True, template="{prompt}0").prompt(e, tokenizer)) == "9-5-1+1=0"


def test_long_examples_are_refused_by_line_or_dropped_and_counted(tmp_path, capsys):
    rows = [
        dict(prompt="1+1=", trajectory="2"),
        dict(prompt="1+1=", trajectory="2" * 20),
        dict(prompt="1=", trajectory="1"),
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    examples, tokenizer = read_examples(path), nano_tokenizer()
    with pytest.raises(ValueError, match=r"F, line 2: 25 tokens, at most 10 fit; --drop-long"):
        encode_examples(examples, tokenizer, 10, "F")
    kept = encode_examples(examples, tokenizer, 10, "F", drop=True)
    assert [len(s.tokens) for s in kept] == [6, 4] and [s.prompt_length for s in kept] == [4, 2]
    assert "F: 1 of 3 examples dropped, longer than 10 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all 3 examples are longer than 3 tokens"):
        encode_examples(examples, tokenizer, 3, "F", drop=True)


def test_parquet(tmp_path):
    """verl's files: messages in a column, the answer nested; columns that a row lacks are no fields of it."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4"}, "extra": None},
        {"prompt": [{"role": "user", "content": "3+3?"}], "reward_model": {"ground_truth": "6"}, "extra": "x"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "v.parquet")
    one, two = read_examples(tmp_path / "v.parquet", need=("prompt", "answer"))
    assert (one.prompt, one.answer, "extra" in one.meta) == ("2+2?", "4", False)
    assert (two.line, two.answer, two.meta["extra"]) == (2, "6", "x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a parquet file"):
        read_examples(tmp_path / "bad.parquet")


def test_show_marks_what_is_trained(model_dir, tmp_path):
    from conftest import run_script

    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(dict(prompt="1+1=", trajectory="2")))
    command = ["-m", "nanopcf.tools.show", "--model", str(model_dir), "--data", str(path)]
    done = run_script(*command)
    assert done.stdout == "1·+·1·=[[2·<end>]]\n" and "(4 tokens given, 2 trained)" in done.stderr
    assert show(nano_tokenizer(), [1, 2, 3], 1, colour=True) == "1\x1b[32m2·3\x1b[0m"


def test_benchmark_files_are_read_whole():
    """Every row of the six benchmarks has a problem and an answer; GSM8K and Minerva have worked solutions too."""
    data = Path(__file__).parents[2] / "shared" / "data"
    if not data.exists():
        pytest.skip("the benchmark files are not beside the repository")
    counts = {}
    for path in sorted(data.glob("*.jsonl")):
        examples = read_examples(path, need=("prompt", "answer"))
        counts[path.stem] = len(examples)
        assert all(e.prompt and e.answer for e in examples)
        if path.stem.startswith(("gsm8k", "minerva")):
            assert all(verify(e.trajectory, e.answer) == 1 and "<<" not in e.trajectory for e in examples)
    assert counts == dict(
        gsm8k_test=1319,
        gsm8k_train=7473,
        svamp_test=1000,
        aime24_test=30,
        amc23_test=40,
        minerva_math_test=272,
        olympiadbench_test=675,
    )
