"""Problem files of other projects: readers of the files, and the translation of their rows into our fields.

Our fields are prompt, trajectory (a worked solution), answer and messages (the prompt as a chat). `recognised` finds
them by the names that published data sets give them; docs/real-models.md lists what each becomes. A row is read wholly
or refused: what belongs to the problem and cannot be read, such as an image, is an error that names the field. What is
not used stays in `meta` under its own name.
"""

import datetime
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanopcf.answers.finding import last_boxed
from nanopcf.interop.choices import Choices, Columns, right_letter, take_choices, with_choices

LONGEST_LINE = 64 << 20  # bytes of a JSONL file

# ---- names of fields, as `choices.plain_name` writes them: first come, first served ----

PROMPTS = ("problem", "question", "query", "question_stem", "instruction", "input", "inputs", "ctx", "goal", "sentence")
# What a question is about: it stands before the question.
CONTEXTS = ("system", "system_prompt", "body", "context", "passage", "story", "article", "table", "instruction")
TRAJECTORIES = (
    *("trajectory", "completion", "generated_solution", "response", "output", "rationale", "r1_solution_1"),
    *("cot", "chain_of_thought", "reasoning", "explanation", "targets"),
)
# Thoughts, and the response that follows them.
THOUGHTS = (
    ("deepseek_thinking_trajectory", "deepseek_attempt"),
    ("deepseek_reasoning", "deepseek_solution"),
    ("gemini_thinking_trajectory", "gemini_attempt"),
    ("thinking_trajectories", "attempt"),
    ("complex_cot", "response"),
    ("reasoning_content", "response"),
    ("thinking", "response"),
)
ANSWERS = (
    *("answer", "final_answer", "expected_answer", "ground_truth", "answer_number", "final_ans", "numerical_answer"),
    *("correct_answer", "gold_answer", "reference_answer"),
)
IMAGES = ("image", "images", "img", "picture", "decoded_image", "image_path")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class Recognised(NamedTuple):
    shape: str  # what the prompt was found by
    fields: dict[str, Any]  # ours, and the others by their own names
    missing: dict[str, str]  # why a field of ours is not there, where it nearly is
    unused: list[str]  # names of text columns that are not used


# ---- a row ----

OURS = {"prompt", "trajectory", "answer", "meta"}  # as `data.write_jsonl` writes it


def recognised(row: dict) -> Recognised:
    """The row in our fields. A row of no known shape comes back as it is.

    Raises ValueError naming the field when a part of the problem or the answer cannot be read.
    """
    if row.keys() == OURS and isinstance(row["answer"], str) and row["answer"].isalnum():
        return Recognised(
            "prompt as text", row, {}, []
        )  # most rows of the nano tasks: nothing to look for, ten times faster
    columns = Columns(row)
    for name in IMAGES:
        if columns.peek(name):
            raise ValueError(f"{columns.name(name)!r} holds an image, and only text is read")
    fields: dict[str, Any] = {}
    missing: dict[str, str] = {}
    shape = take_messages(columns, fields) or take_prompt(columns, fields)
    if shape is None:
        return Recognised("none we know", row, {}, [])
    choices = take_choices(columns)
    if choices is not None:
        add_choices(fields, choices)
        name, value = given_answer(columns, choices.answer_names)
        if value is not None:
            fields["answer"] = right_letter(choices, value, name)
    take_trajectory(columns, fields, missing)
    take_answer(columns, fields, missing)
    rest = columns.rest()
    used = list(fields.values())
    unused = [name for name, value in rest.items() if holds_text(value) and name != "meta" and value not in used]
    return Recognised(shape, fields | {name: v for name, v in rest.items() if name not in fields}, missing, unused)


def take_messages(columns: Columns, fields: dict) -> str | None:
    """The prompt of a row that holds a chat, and its trajectory if the chat ends with the assistant. Returns its shape,
    or None where there is no chat.

    {"prompt": [{"role": "user", "content": "1+1="}], "reward_model": {"ground_truth": "2"}}                    (verl)
    {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}                   (TRL)
    {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]}               (OpenThoughts)
    """
    said = as_chat(columns.peek("prompt")) or as_chat(columns.peek("input"))
    if said is not None:
        columns.take("prompt" if as_chat(columns.peek("prompt")) else "input")
        set_messages(columns, fields, said)
        return "prompt as messages"
    own = columns.has("prompt") and (columns.has("trajectory") or columns.has("completion"))
    for name in ("messages", "conversations", "conversation"):
        said = as_chat(columns.peek(name))
        if said is None or own:
            continue
        ends_with_answer = len(said) > 1 and said[-1]["role"] == "assistant"
        if not ends_with_answer and (columns.has("prompt") or not columns.has(*ANSWERS, "reward_model")):
            continue
        columns.take(name)
        if ends_with_answer:
            *said, last = said
            thoughts = last.get("reasoning_content") or last.get("thinking")
            fields["trajectory"] = thought(thoughts, last["content"]) if thoughts else last["content"]
        set_messages(columns, fields, said)
        # Some rows hold the problem once more; what differs from the chat is named as unused.
        for again in ("prompt", *PROMPTS):
            if isinstance(columns.peek(again), str) and columns.peek(again).strip() in fields["prompt"]:
                columns.take(again)
        return "messages"
    return None


def set_messages(columns: Columns, fields: dict, said: list[dict]) -> None:
    """The chat and its plain text; a system prompt that stands in a column of its own comes first."""
    system = columns.peek("system", "system_prompt")
    if isinstance(system, str) and system.strip() and said[0]["role"] != "system":
        columns.take("system", "system_prompt")
        said = [{"role": "system", "content": system}, *said]
    fields |= {"prompt": joined(said), "messages": said}


def take_prompt(columns: Columns, fields: dict) -> str | None:
    """The prompt of a row that holds it as text. Returns the shape of the row, or None where there is no prompt.

    {"prompt": "1+1=", "trajectory": "2", "answer": "2"}                                                       (ours)
    {"Body": "He has 3 eggs", "Question": "How many eggs has he?", "Answer": 3.0}                             (SVAMP)
    """
    if columns.has("prompt"):
        fields["prompt"] = columns.take("prompt")
        messages = columns.take("messages")
        if messages:
            fields["messages"] = as_chat(messages) or messages
        elif isinstance(columns.peek("system", "system_prompt"), str) and isinstance(fields["prompt"], str):
            set_messages(columns, fields, [{"role": "user", "content": fields["prompt"]}])
        return "prompt as text"
    main = next((name for name in PROMPTS if isinstance(columns.peek(name), str) and columns.peek(name).strip()), None)
    if main is None:
        return None
    prompt = columns.take(main).strip() if columns.has("body") else columns.take(main)
    if main == "instruction" and columns.peek("input"):
        prompt = f"{prompt}\n\n{columns.take('input')}"
    for name in reversed(CONTEXTS):
        context = columns.peek(name)
        if not context or name == main:
            continue
        if not isinstance(context, str):
            raise ValueError(f"{columns.name(name)!r} must be text, found {context!r:.40}")
        columns.take(name)
        if context.strip() in prompt:  # the question repeats it
            continue
        if name == "body":
            # Some stories of SVAMP lack the full stop at their end.
            stop = "" if context.strip().endswith((".", "?", "!")) else "."
            prompt = f"{context.strip()}{stop} {prompt}"
        elif name in ("system", "system_prompt"):
            fields["messages"] = [{"role": "system", "content": context}, {"role": "user", "content": prompt}]
            prompt = joined(fields["messages"])
        else:
            prompt = f"{context}\n\n{prompt}"
    fields["prompt"] = prompt
    return main


def add_choices(fields: dict, choices: Choices) -> None:
    """Write the choices of a question below it, unless they stand there already."""
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        return
    fields["prompt"] = with_choices(prompt, choices)
    if fields.get("messages") and fields["prompt"] != prompt:
        *earlier, last = fields["messages"]
        fields["messages"] = [*earlier, {**last, "content": with_choices(last["content"], choices)}]


def take_trajectory(columns: Columns, fields: dict, missing: dict) -> None:
    """The worked solution, and an answer that a field called "solution" turns out to be.

    {"question": "...", "solution": "128", "deepseek_thinking_trajectory": "...", "deepseek_attempt": "..."}     (s1K)
    """
    for thoughts, response in THOUGHTS:
        if "trajectory" not in fields and columns.peek(thoughts) and isinstance(columns.peek(response), str):
            said = columns.take(thoughts)
            said = said[0] if isinstance(said, list) else said
            fields["trajectory"] = thought(said, columns.take(response))
    solution = columns.peek("solution")
    given = columns.peek(*ANSWERS)
    # Beside an answer a short solution is worth training, unless it is that answer once more.
    bare = isinstance(solution, str) and (is_bare(solution) if given is None else same(solution, given))
    # Several solutions are several ways to the same answer: the first is as good as any.
    if isinstance(solution, list):
        solution = solution[0] if solution else None
    if isinstance(solution, (int, float)) and not isinstance(solution, bool):
        solution, bare = number_text(solution, "solution"), True
    answered = "answer" in fields or columns.has(*ANSWERS, "reward_model")
    if bare:
        missing["trajectory"] = f"{columns.name('solution')!r} is the answer alone, no worked solution"
        if not answered:
            columns.take("solution")
            fields["answer"] = solution.strip()
    elif isinstance(solution, str) and solution.strip():
        if "trajectory" not in fields and not columns.has("trajectory"):
            columns.take("solution")
            fields["trajectory"] = solution
        elif not answered and marked_answer(solution) is not None:
            columns.take("solution")
            fields["answer"] = marked_answer(solution)
    if "trajectory" not in fields:
        trajectory = columns.take(*TRAJECTORIES)
        if trajectory is not None:
            said = as_chat(trajectory)
            fields["trajectory"] = trajectory if said is None else joined(said)


def take_answer(columns: Columns, fields: dict, missing: dict) -> None:
    """The answer: its own field, the end of a field that holds a whole solution, or the box of the trajectory.

    {"question": "How many eggs?", "answer": "16-3=<<16-3=13>>13 eggs are left.\\n#### 13"}                    (GSM8K)
    {"problem": "Find x.", "solution": "So $x=\\\\boxed{3}$."}                                                  (MATH)
    {"question": "Find both roots.", "final_answer": ["1", "2"]}                                      (OlympiadBench)
    """
    if "answer" in fields:
        return
    name, value = given_answer(columns, ANSWERS)
    own = columns.was_read("trajectory")
    if value is None or (value == "" and not own):
        value = marked_answer(fields.get("trajectory")) or value
        if value is not None:
            fields["answer"] = value
        return
    # Several final answers are all needed: the right answer is the list of them.
    if isinstance(value, list) and (name.lower().startswith("final") or [type(item) for item in value] == [str]):
        fields["answer"] = ", ".join(map(str, value))
        return
    if not isinstance(value, str):
        fields["answer"] = number_text(value, name)
        return
    # NuminaMath-1.5 writes "proof" where there is nothing to compare, GSM-Plus "None".
    if value.strip().lower() in (("nan",) if own else ("nan", "none", "null", "proof")):
        raise ValueError(f"{name!r} is {value.strip()}, which is no answer")
    # Our own files have both fields, and an answer is what they say it is.
    if own or ("####" not in value and not is_whole(value)):
        # ASDiv's answers name their unit: "9 (apples)".
        unit = re.fullmatch(r"([\d.,/:]+) \([^()]+\)", value.strip())
        fields["answer"] = unit[1] if unit and columns.was_read("body") else value
        return
    # A whole solution: its end is the answer.
    if "####" in value:
        steps, _, last = value.rpartition("####")
        answer = last.strip()
        # Notes for a calculator, such as <<16-3=13>>, are no text that a model should learn.
        value = f"{re.sub(r'<<[^<>]*>>', '', steps).strip()}\n#### {answer}"
    else:
        answer = marked_answer(value)
        other = columns.take(*(other for other in ANSWERS if other != name)) if answer is None else None
        if other is not None:
            answer = number_text(other, name)
    if not fields.get("trajectory"):
        fields["trajectory"] = value
    if answer is not None:
        fields["answer"] = answer
    else:
        missing["answer"] = f"{name!r} holds a whole solution that doesn't mark its answer (\\boxed, ####)"


def given_answer(columns: Columns, names: tuple[str, ...]) -> tuple[str, Any]:
    """(name, value) of the first of these fields, or of verl's reward_model. Raises ValueError for one that is NaN."""
    name, value = columns.take_named(*names)
    reward_model = columns.peek("reward_model")
    if value is None and isinstance(reward_model, dict):
        name, value = "reward_model.ground_truth", reward_model.get("ground_truth")
    if value is None and (empty := columns.empty & set(names)):
        raise ValueError(f"{min(empty)!r} is NaN, which is no answer")
    return name, value


# ---- texts ----


def as_chat(value: object) -> list[dict] | None:
    """The value as messages, each an object with the texts role and content (and what else it held); None if it is no
    chat. Raises ValueError for a chat with images or calls of tools.

    Read are {"role", "content"} and {"from", "value"}, and contents that are lists of parts.
    """
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        return None
    messages = []
    for m in value:
        m = {name: part for name, part in m.items() if part is not None}
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        if m.get("tool_calls") or m.get("function_call"):
            raise ValueError("its messages call tools, which is not read")
        if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
            if not all(part.get("type", "text") == "text" and isinstance(part.get("text"), str) for part in content):
                raise ValueError("its messages hold more than text")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        others = {name: part for name, part in m.items() if name not in ("role", "from", "content", "value")}
        messages.append({"role": ROLES.get(role, role), "content": content, **others})
    return messages


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


def thought(thoughts: object, response: str) -> str:
    """Thoughts and the response after them, as models write both."""
    return f"<think>\n{str(thoughts).strip()}\n</think>\n\n{response.strip()}"


def holds_text(value: object) -> bool:
    """Is it a text, or a list or object with texts in it?"""
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    if isinstance(value, list):
        return any(map(holds_text, value))
    return isinstance(value, str) and bool(value.strip())


def plain_words(text: str) -> list[str]:
    """The words of a text that are not LaTeX."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+|\$[^$]*\$", " ", text[:5000])
    return re.findall(r"(?<![a-zA-Z])[a-zA-Z]{2,}(?![a-zA-Z])", text)


def is_whole(answer: str) -> bool:
    """Is an answer a whole worked solution? Words with a box are, two sentences, one that computes, and a long text."""
    words = len(plain_words(answer))
    if words and last_boxed(answer) is not None and plain_words(answer.replace(last_boxed(answer), "")):
        return True
    sentences = len(re.findall(r"[a-z0-9)$}%][.!?]\s+(?=[A-Z$\\])", answer[:5000]))
    computes = words >= 5 and "=" in answer and answer.rstrip().endswith((".", "!"))
    return (words >= 4 and sentences >= 1) or computes or words > 60


def is_bare(solution: str) -> bool:
    """Is a solution the answer alone, like "128", and no worked solution?"""
    text = solution.strip()
    if not text or len(text) > 100 or "\n" in text or last_boxed(text) is not None:
        return False
    words, parts = len(plain_words(text)), len(text.split())
    sentence = parts > 1 and (text.endswith(".") or (words and parts > 2))  # "5 apples" is none
    return words <= 1 and text.count("=") <= 1 and not sentence


def same(solution: str, answer: object) -> bool:
    """Are they the same text, up to the marks of LaTeX's mathematics?"""
    return solution.strip().strip("$") == str(answer).strip().strip("$")


def marked_answer(solution: object) -> str | None:
    """What a solution marks as its answer: its last box, or what follows "####" or "The answer is" in its last line."""
    if not isinstance(solution, str):
        return None
    boxed = last_boxed(solution)
    if boxed is not None:
        return boxed
    last_line = solution.rstrip().rpartition("\n")[2][-500:]
    match = re.search(r"(?:####|[Tt]he (?:final )?answer is:?)\s*(\S[^\n]*?)\.?$", last_line)
    return match[1] if match else None


def number_text(answer: object, name: str) -> object:
    """A number as text: 27 and 27.0 are "27", since some files hold whole numbers as decimals.

    Anything else stays as it is; what is no text then is refused by `data.read_examples`. Raises ValueError for a
    number that is none, which is how tables hold an empty cell.
    """
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return answer
    if not math.isfinite(answer):
        raise ValueError(f"{name!r} is {answer}, which is no answer".replace("nan", "NaN"))
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
        table = parquet.read_table(path)
        for i, field in enumerate(table.schema):
            if str(field.type).startswith("timestamp[ns"):  # Python's dates end at the microsecond
                micro = pyarrow.timestamp("us", field.type.tz)
                table = table.set_column(i, field.name, table[i].cast(micro, safe=False))
        rows = table.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from error
    return enumerate(map(as_json, rows), 1)


def as_json(value: object) -> object:
    """A value of a table as JSON has it: dates in ISO's spelling, and what else JSON does not know as text."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
