"""Problem files of other projects."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from nanopcf.rewards import last_boxed

LONGEST_LINE = 64 << 20  # bytes of a JSONL file


def recognised(row: dict) -> tuple[str, dict]:
    """(shape, row in our fields), whichever of the usual shapes it has; of none of them, it comes back as it is.

    prompt, trajectory, answer (ours); prompt + completion, or messages (TRL); prompt as messages with
    reward_model.ground_truth (verl); question + answer ending "#### N" (GSM8K); problem or question with answer,
    final_answer or a solution that boxes it (AIME, AMC, MATH, Minerva, OlympiadBench); Body, Question, Answer (SVAMP).
    Messages stay beside the prompt, which is then their plain text: their contents, a blank line between two.
    """
    rest = dict(row)
    said = rest.get("messages") if "prompt" not in rest else None
    if is_chat(said) and said[-1]["role"] == "assistant" and len(said) > 1:
        del rest["messages"]
        return "messages", as_chat(said[:-1]) | {"trajectory": said[-1]["content"], **rest}
    if "prompt" in rest:
        shape = "prompt as text"
        if is_chat(rest["prompt"]):
            shape, rest = "prompt as messages", rest | as_chat(rest["prompt"])
        if "trajectory" not in rest and "completion" in rest:
            completion = rest.pop("completion")
            rest["trajectory"] = joined(completion) if is_chat(completion) else completion
        graded = rest.get("reward_model")
        if "answer" not in rest and isinstance(graded, dict) and "ground_truth" in graded:
            rest["answer"] = as_text(graded["ground_truth"])
        return shape, rest
    if "Body" in rest and "Question" in rest and "Answer" in rest:
        body, question = str(rest.pop("Body")).strip(), str(rest.pop("Question")).strip()
        end = "" if body.endswith((".", "?", "!")) else "."
        return "SVAMP", {"prompt": f"{body}{end} {question}", "answer": as_text(rest.pop("Answer")), **rest}
    shape = "problem" if "problem" in rest else "question"
    asked = rest.pop("problem", None) or rest.pop("question", None)
    if not isinstance(asked, str):
        return "none we know", row
    rest.pop("question", None)  # AMC repeats its problem there
    found, answer = {"prompt": asked}, rest.pop("answer", None)
    if isinstance(answer, str) and "####" in answer:
        steps, _, final = answer.rpartition("####")
        found["trajectory"] = re.sub(r"<<[^<>]*>>", "", steps).strip() + f"\n#### {final.strip()}"
        return shape, found | {"answer": final.strip(), **rest}
    solution = rest.pop("solution", None)
    if isinstance(solution, list):
        solution = solution[0] if solution else None
    if isinstance(solution, str) and solution:
        found["trajectory"] = solution
    if answer is None and rest.get("final_answer"):
        finals = rest.pop("final_answer")
        answer = ", ".join(map(str, finals)) if isinstance(finals, list) else finals
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    return shape, found | ({} if answer is None else {"answer": as_text(answer)}) | rest


def is_chat(value: object) -> bool:
    """A list of messages, each with a role and text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def as_chat(messages: list[dict]) -> dict:
    return {"prompt": joined(messages), "messages": messages}


def joined(messages: list[dict]) -> str:
    return "\n\n".join(m["content"] for m in messages)


def as_text(answer: object) -> object:
    """27.0 -> "27": benchmark files hold their whole numbers as decimals. What is neither text nor number stays."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return answer
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of the lines that aren't blank."""
    try:
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
            for number, line in enumerate(lines, 1):
                if len(line) > LONGEST_LINE:
                    raise ValueError(
                        f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB; expected an example a line"
                    )
                if line.strip():
                    yield number, json_value(line, f"{path}, line {number}")
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); expected a JSONL file of examples") from error


def json_value(line: bytes, at: str) -> object:
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # \ud800 alone is half a character, which no tokenizer can read and no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # includes bytes that aren't UTF-8
        raise ValueError(f"{at}: not valid JSON in UTF-8 ({error})") from error
    return value


def parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f'{path}: reading parquet needs pyarrow: pip install -e ".[data]", or give JSONL') from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from error
    # a column that a row doesn't have is null there
    return enumerate(({k: v for k, v in row.items() if v is not None} for row in rows), 1)
