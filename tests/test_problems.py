"""The shapes of data files that are recognised, and those that are refused."""

import json
from pathlib import Path

import pytest
from conftest import character_tokenizer

from nanopcf.data import Format, read_examples, write_jsonl
from nanopcf.rewards import verify


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
    """The plain prompt is their text, the chat prompt the messages themselves; written and read again it is the
    same."""
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    row = {"messages": [*said, {"role": "assistant", "content": "2"}], "answer": "2"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    (e,) = read_examples(path, need=("prompt", "trajectory", "answer"))
    assert list(e.messages) == said and e.prompt == "Be brief.\n\n1+1=" and e.line == 2
    write_jsonl(tmp_path / "again.jsonl", [e])
    assert read_examples(tmp_path / "again.jsonl") == [e]
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] | length }}-{% endfor %}{{ messages[-1]['content'] }}"
    )
    assert tokenizer.decode(Format(chat=True, template="{prompt}0").prompt(e, tokenizer)) == "9-5-1+1=0"


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
