"""Problem files of other projects: readers of the files, and the translation of their rows into our fields.

Our fields are prompt, trajectory (a worked solution), answer and messages (the prompt as a chat); whatever else a row
holds is kept under its own name. `recognised` names the shape, and one function per shape does the translation.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from nanopcf.answers.finding import last_boxed

LONGEST_LINE = 64 << 20  # bytes of a JSONL file

# ---- the shapes of rows ----


def recognised(row: dict) -> tuple[str, dict]:
    """(name of the shape, the row in our fields). A row of no known shape comes back as it is.

    What decides, first match first              whose files              read by
    prompt is text                               ours, TRL                from_prompt
    prompt is a list of messages                 verl                     from_chat_prompt
    messages that end with the assistant's       TRL                      from_messages
    Body, Question and Answer                    SVAMP                    from_svamp
    problem or question; answer holds "####"     GSM8K                    from_gsm8k
    problem or question                          MATH, AIME, AMC,         from_problem
                                                 Minerva, OlympiadBench
    """
    if "prompt" in row:
        if is_chat(row["prompt"]):
            return "prompt as messages", from_chat_prompt(row)
        return "prompt as text", from_prompt(row)
    messages = row.get("messages")
    if is_chat(messages) and len(messages) > 1 and messages[-1]["role"] == "assistant":
        return "messages", from_messages(row)
    if "Body" in row and "Question" in row and "Answer" in row:
        return "SVAMP", from_svamp(row)
    # AMC's rows have both fields, with the same text.
    problem = row.get("problem") or row.get("question")
    if not isinstance(problem, str):
        return "none we know", row
    shape = "problem" if "problem" in row else "question"
    if isinstance(row.get("answer"), str) and "####" in row["answer"]:
        return shape, from_gsm8k(problem, row)
    return shape, from_problem(problem, row)


def from_prompt(row: dict) -> dict:
    """Ours, and TRL's, which calls the trajectory a completion; the answer may stand where verl has it.

    {"prompt": "1+1=", "trajectory": "2", "answer": "2"}
    {"prompt": "1+1=", "completion": "2"}
    """
    fields = dict(row)
    if "completion" in row and "trajectory" not in row:
        completion = fields.pop("completion")
        fields["trajectory"] = joined(completion) if is_chat(completion) else completion
    reward_model = row.get("reward_model")
    if isinstance(reward_model, dict) and "ground_truth" in reward_model and "answer" not in row:
        fields["answer"] = as_text(reward_model["ground_truth"])
    return fields


def from_chat_prompt(row: dict) -> dict:
    """verl's: like `from_prompt`, with messages for a prompt. They are kept beside their plain text.

    {"prompt": [{"role": "user", "content": "1+1="}], "reward_model": {"ground_truth": "2"}}
    """
    return from_prompt({**row, "prompt": joined(row["prompt"]), "messages": row["prompt"]})


def from_messages(row: dict) -> dict:
    """TRL's chats: the assistant's last message is the trajectory, and the messages before it are the prompt.

    {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
    """
    *prompt, trajectory = row["messages"]
    fields = {"prompt": joined(prompt), "messages": prompt, "trajectory": trajectory["content"]}
    return fields | without(row, "messages")


def from_svamp(row: dict) -> dict:
    """SVAMP's: a story and a question about it.

    {"Body": "He has 3 eggs", "Question": "How many eggs has he?", "Answer": 3.0}
    """
    body, question = str(row["Body"]).strip(), str(row["Question"]).strip()
    # Some stories lack the full stop at their end.
    stop = "" if body.endswith((".", "?", "!")) else "."
    fields = {"prompt": f"{body}{stop} {question}", "answer": as_text(row["Answer"])}
    return fields | without(row, "Body", "Question", "Answer")


def from_gsm8k(problem: str, row: dict) -> dict:
    """GSM8K's: one field holds the worked solution and, after "####", the answer.

    {"question": "How many eggs?", "answer": "16-3=<<16-3=13>>13 eggs are left.\\n#### 13"}
    """
    steps, _, last = row["answer"].rpartition("####")
    answer = last.strip()
    # Notes for a calculator, such as <<16-3=13>>, are no text that a model should learn.
    steps = re.sub(r"<<[^<>]*>>", "", steps).strip()
    fields = {"prompt": problem, "trajectory": f"{steps}\n#### {answer}", "answer": answer}
    return fields | without(row, "problem", "question", "answer")


def from_problem(problem: str, row: dict) -> dict:
    """Those of MATH, AIME, AMC, Minerva and OlympiadBench: the answer is given, or boxed in the solution.

    {"problem": "How far?", "answer": 27.0}
    {"problem": "Find x.", "solution": "So $x=\\\\boxed{3}$."}
    {"question": "Find both roots.", "solution": ["They are ..."], "final_answer": ["1", "2"]}
    """
    fields, kept = {"prompt": problem}, without(row, "problem", "question", "answer", "solution")
    solution, answer = row.get("solution"), row.get("answer")
    # Several solutions are several ways to the same answer: the first is as good as any.
    if isinstance(solution, list):
        solution = solution[0] if solution else None
    if isinstance(solution, str) and solution:
        fields["trajectory"] = solution
    if answer is None and row.get("final_answer"):
        answer = kept.pop("final_answer")
        # Several final answers are all needed: the right answer is the list of them.
        if isinstance(answer, list):
            answer = ", ".join(map(str, answer))
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if answer is not None:
        fields["answer"] = as_text(answer)
    return fields | kept


def without(row: dict, *names: str) -> dict:
    """The other fields of a row."""
    return {name: value for name, value in row.items() if name not in names}


def is_chat(value: object) -> bool:
    """Is it a list of messages, each an object with the texts role and content?"""
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def joined(messages: list[dict]) -> str:
    """The plain text of messages: their contents, with a blank line between two."""
    return "\n\n".join(m["content"] for m in messages)


def as_text(answer: object) -> object:
    """A number as text: 27 and 27.0 are "27", since some files hold whole numbers as decimals.

    Anything else stays as it is; what is no text then is refused by `data.read_examples`.
    """
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return answer
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


# ---- readers of files ----


def jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of each line that is not blank.

    Raises ValueError naming file and line when the file cannot be read, or when a line is too long or no JSON.
    """
    try:
        with path.open("rb") as file:
            # One byte more than the limit shows that a line is too long, without reading all of it.
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


def json_value(line: bytes, where: str) -> object:
    """The value of one line; `where` names the line in messages. Raises ValueError when it is no JSON in UTF-8."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
        # "\ud800" alone is half a character, which no tokenizer can read and no file can hold: encode() refuses it.
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError; RecursionError: nested too deep
        raise ValueError(f"{where}: not valid JSON in UTF-8 ({error})") from error
    return value


def parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row) of a parquet file. Raises ValueError without pyarrow, or when it cannot be read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f'{path}: reading parquet needs pyarrow: pip install -e ".[data]", or give JSONL') from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from error
    # Where a row lacks a column, the file holds null.
    return enumerate(({name: value for name, value in row.items() if value is not None} for row in rows), 1)
