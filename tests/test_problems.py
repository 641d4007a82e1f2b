"""The shapes of data files that are recognised, and those that are refused."""

import json
from pathlib import Path

import pytest
from conftest import character_tokenizer

from nanopcf.data import Format, read_examples, write_jsonl
from nanopcf.rewards import verify

USER, SAYS = {"role": "user", "content": "6+7?"}, {"role": "assistant", "content": "It is 13."}


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
        # numbers as answers, beside whatever
        ({"prompt": "6*7?", "answer": 42}, "6*7?", "", "42"),
        ({"prompt": "6*7?", "ground_truth": "42"}, "6*7?", "", "42"),
        ({"messages": [USER, SAYS], "answer": 13}, "6+7?", "It is 13.", "13"),
        ({"messages": [USER], "ground_truth": ["13"]}, "6+7?", "", "13"),
        ({"prompt": "p", "reward_model": {"ground_truth": 34}}, "p", "", "34"),
        ({"question": "q", "answer": None, "answer_number": 5}, "q", "", "5"),
        # fields in capitals
        (
            {"ID": 1, "Problem": "Far?", "Solution": "It takes 204 minutes.", "Answer": 204},
            "Far?",
            "It takes 204 minutes.",
            "204",
        ),
        # the answer alone under the name of a solution, and where the trajectory is instead
        ({"problem": "p", "solution": "128"}, "p", "", "128"),
        ({"prompt": "p", "solution": "$x = 3$"}, "p", "", "x = 3"),
        (
            {
                "problem": "p",
                "deepseek_reasoning": "Two.",
                "deepseek_solution": "So 128.",
                "ground_truth_solution": "128",
            },
            "p",
            "<think>\nTwo.\n</think>\n\nSo 128.",
            "",
        ),
        ({"problem": "p", "solution": "$7$", "answer": "7"}, "p", "", "7"),
        ({"problem": "p", "solution": "2^5 = 32", "answer": "32"}, "p", "2^5 = 32", "32"),
        (
            {"question": "q", "solution": "128", "deepseek_thinking_trajectory": "Two.", "deepseek_attempt": "So 128."},
            "q",
            "<think>\nTwo.\n</think>\n\nSo 128.",
            "128",
        ),
        (
            {"question": "q", "solution": "5", "thinking_trajectories": ["hm"], "attempt": "$\\boxed{5}$"},
            "q",
            "<think>\nhm\n</think>\n\n$\\boxed{5}$",
            "5",
        ),
        # a whole solution under the name of an answer
        ({"question": "q", "answer": "3 + 2 is 5. So $\\boxed{5}$."}, "q", "3 + 2 is 5. So $\\boxed{5}$.", "5"),
        ({"question": "q", "answer": "Step 1. It is 5. Done.", "answer_number": 5}, "q", "Step 1. It is 5. Done.", "5"),
        ({"query": "q", "response": "2+2=4\n#### 4\nThe answer is: 4"}, "q", "2+2=4\n#### 4\nThe answer is: 4", "4"),
        (
            {"question": "q", "answer": "All positive integers n such that 4 divides n."},
            "q",
            "",
            "All positive integers n such that 4 divides n.",
        ),
        # chats of other spellings, and what is beside them
        ({"problem": "6+7?", "solution": "It is $\\boxed{13}$.", "messages": [USER, SAYS]}, "6+7?", "It is 13.", "13"),
        (
            {
                "system": "Think.",
                "conversations": [{"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "\\boxed{3}"}],
            },
            "Think.\n\n1+2?",
            "\\boxed{3}",
            "3",
        ),
        ({"messages": [USER, {**SAYS, "content": [{"type": "text", "text": "13"}]}]}, "6+7?", "13", ""),
        ({"messages": [USER, {**SAYS, "reasoning_content": "7+6"}]}, "6+7?", "<think>\n7+6\n</think>\n\nIt is 13.", ""),
        ({"prompt": "6+7?", "messages": [USER, SAYS, USER, SAYS]}, "6+7?\n\nIt is 13.\n\n6+7?", "It is 13.", ""),
        # what belongs to the question
        (
            {"body": "She has 9 apples", "question": "How many?", "answer": "9 (apples)"},
            "She has 9 apples. How many?",
            "",
            "9",
        ),
        ({"context": "A pentagon.", "question": "Sides?", "answer": "5"}, "A pentagon.\n\nSides?", "", "5"),
        ({"context": "x > 0", "question": "If x > 0?", "answer": "5"}, "If x > 0?", "", "5"),
        ({"problem": "p", "answer": "", "final_answer": [], "solution": "\\boxed{3}"}, "p", "\\boxed{3}", "3"),
        ({"prompt": "p", "trajectory": "\\boxed{3}", "answer": ""}, "p", "\\boxed{3}", ""),
        ({"instruction": "Add.", "input": "2 3", "output": "5"}, "Add.\n\n2 3", "5", ""),
        ({"system_prompt": "Be good.", "question": "q", "response": "r"}, "Be good.\n\nq", "r", ""),
        ({"problem": "p", "generated_solution": "\\boxed{7}", "expected_answer": "7"}, "p", "\\boxed{7}", "7"),
        ({"question": "q", "final_answer": "36", "r1_solution_1": "\\boxed{36}"}, "q", "\\boxed{36}", "36"),
    ],
)
def test_the_usual_shapes_are_recognised(tmp_path, row, prompt, trajectory, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (e,) = read_examples(path)
    assert (e.prompt, e.trajectory, e.answer) == (prompt, trajectory, answer)
    assert ("url" in row) == ("url" in e.meta) and ("completion" in e.meta) == (
        {"completion", "trajectory"} <= row.keys()
    )


@pytest.mark.parametrize(
    "row", [{"messages": [1]}, {"messages": [{"role": "user", "content": "Hi"}]}, {"question": 3}, {"x": 1}]
)
def test_other_shapes_are_refused_with_what_they_have(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"line 1: no field 'prompt'; it has"):
        read_examples(path)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "Prime?", "choices": ["4", "9", "11"], "answer": 2}, "Prime?\n\nA. 4\nB. 9\nC. 11", "C"),
        ({"question": "q", "choices": ["0", "1", "2", "3"], "answer": 1}, "q\n\nA. 0\nB. 1\nC. 2\nD. 3", "B"),
        ({"question": "q", "options": ["7", "9"], "answer": "B", "answer_index": 1}, "q\n\nA. 7\nB. 9", "B"),
        ({"question": "q", "options": ["A)21", "B)22"], "correct": "b"}, "q\n\nA. 21\nB. 22", "B"),
        ({"Problem": "q", "options": "a ) 38 , b ) 27.5", "correct": "a"}, "q\n\nA. 38\nB. 27.5", "A"),
        ({"question": "q", "options": {"A": "w", "B": "z"}, "answer": "z"}, "q\n\nA. w\nB. z", "B"),
        (
            {"question": "q", "choices": {"text": ["w", "z"], "label": ["1", "2"]}, "answerKey": "2"},
            "q\n\nA. w\nB. z",
            "B",
        ),
        ({"Question": "q", "A": "1", "B": "2", "C": "3", "Answer": "C"}, "q\n\nA. 1\nB. 2\nC. 3", "C"),
        ({"ctx": "A man", "endings": ["a", "b"], "label": "1"}, "A man\n\nA. a\nB. b", "B"),
        ({"sentence": "The _", "option1": "a", "option2": "b", "answer": "2"}, "The _\n\nA. a\nB. b", "B"),
        ({"prompt": "q (A) w (B) z", "choices": ["w", "z"], "answer": "A"}, "q (A) w (B) z", "A"),
        ({"prompt": [USER], "choices": ["12", "13"], "answer": "13"}, "6+7?\n\nA. 12\nB. 13", "B"),
        (
            {"article": "Long.", "question": "Who?", "options": ["a", "b"], "answer": "A"},
            "Long.\n\nWho?\n\nA. a\nB. b",
            "A",
        ),
        ({"question": "q", "choices": None, "answer": 3}, "q", "3"),
    ],
)
def test_choices_stand_in_the_prompt_and_the_answer_is_a_letter(tmp_path, row, prompt, answer):
    """Once the choices were dropped and the answer to "which of these" was the number 2."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (e,) = read_examples(path, need=("prompt", "answer"))
    assert (e.prompt, e.answer) == (prompt, answer)
    assert not e.messages or e.messages[-1]["content"] == prompt
    write_jsonl(tmp_path / "again.jsonl", [e])
    assert read_examples(tmp_path / "again.jsonl") == [e]


def test_the_right_choice_is_not_always_the_first(tmp_path):
    """GPQA gives the right answer first, in a field of its own: in the prompt its place follows from the texts."""
    rows = [
        {"Question": "q", "Correct Answer": f"r{i}", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y"}
        for i in range(30)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    examples = read_examples(path)
    assert {e.answer for e in examples} == {"A", "B", "C"} and examples == read_examples(path)
    assert all(f"{e.answer}. r{i}" in e.prompt.splitlines() for i, e in enumerate(examples))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["w", "z"], "answer": 7}, "'answer' is 7, which is none of the 2 choices"),
        ({"question": "q", "choices": ["w", "z"], "answer": "y"}, "'answer' is 'y', which is none of the 2 choices"),
        ({"question": "q", "options": "yes or no", "answer": "yes"}, "'options' must be a list of 2 to 26 choices"),
        ({"question": "q", "Image": "a.png", "answer": "1"}, "'Image' holds an image"),
        ({"problem": "p", "solution": "128", "answer": "nan"}, "'answer' is nan, which is no answer"),
        ({"problem": "p", "solution": "Trivial.", "answer": "proof"}, "'answer' is proof, which is no answer"),
        ({"question": "q", "answer": "None"}, "'answer' is None, which is no answer"),
        ({"messages": [USER, {**SAYS, "tool_calls": [{"id": 1}]}]}, "its messages call tools"),
        ({"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}, SAYS]}, "hold more than text"),
        ({"problem": "p", "solution": "128"}, "no field 'trajectory' ('solution' is the answer alone"),
        (
            {"question": "q", "answer": "3 + 2 = 5. So she has 5 pets."},
            "no field 'answer' ('answer' holds a whole solution",
        ),
    ],
)
def test_a_row_that_cannot_be_read_wholly_is_refused_with_the_field(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError) as error:
        read_examples(path, need=("prompt", "trajectory" if "trajectory" in message else "answer"))
    assert str(error.value).startswith(f"{path}, line 1: ") and message in str(error.value)


def test_text_that_is_not_used_and_turns_that_are_not_trained_are_said_once(tmp_path, capsys):
    rows = [
        {"messages": [USER, SAYS, USER, SAYS], "source": "mine", "id": 3},
        {"messages": [USER, SAYS], "source": "yours", "note": "x", "hints": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):
        read_examples(path)
    said = capsys.readouterr().err
    assert said.splitlines() == [
        f"{path}: text that is not used: source, note",
        f"{path}: 1 of 2 chats have several answers: the last one is trained alone",
    ]


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
    # Dates were a traceback once they were written: they are text in ISO's spelling.
    noon = pyarrow.array([1_704_110_400_123_456_789], pyarrow.timestamp("ns", "UTC"))
    table = pyarrow.table({"prompt": ["a"], "answer": pyarrow.array([3.0]), "when": noon, "score": [float("nan")]})
    parquet.write_table(table, tmp_path / "dates.parquet")
    (e,) = read_examples(tmp_path / "dates.parquet")
    assert (e.answer, e.meta) == ("3", {"when": "2024-01-01T12:00:00.123456+00:00"})
    write_jsonl(tmp_path / "dates.jsonl", [e])
    assert read_examples(tmp_path / "dates.jsonl") == [e]
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
