"""Examples, their files, packed rows: from text to the tensors that the loops train on.

A row of training data packs several examples one after the other. Three things keep that exact: `positions` restart
with every example, `documents` stop one example from seeing another, and `targets` are -100 wherever the next token
isn't a trained one. Masks come from lengths, never from token ids, so the end token (part of the answer) is trained
like any other and nothing after it is.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanopcf import parallel, runs
from nanopcf.rewards import last_boxed
from nanopcf.tokenizer import TextTokenizer

IGNORE = -100
LONGEST_LINE = 64 << 20  # bytes of a JSONL file


@dataclass(frozen=True)
class Example:
    prompt: str
    trajectory: str = ""  # the expert's worked solution; empty in RL and evaluation data
    answer: str = ""  # the final answer that a verifier compares with
    meta: dict = field(default_factory=dict)
    messages: tuple[dict, ...] = ()  # the prompt as a chat, where the file has one
    line: int = field(default=0, compare=False)  # of the file it came from


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
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip


def as_chat(messages: list[dict]) -> dict:
    return {"prompt": joined(messages), "messages": messages}


def joined(messages: list[dict]) -> str:
    return "\n\n".join(m["content"] for m in messages)


def as_text(answer: object) -> object:
    """27.0 -> "27": benchmark files hold their whole numbers as decimals. What is neither text nor number stays."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return answer
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def read_examples(path: str | Path, *, need: tuple[str, ...] = ("prompt",)) -> list[Example]:
    """One example a line (JSONL) or row (.parquet, extra `data`), all of one of the shapes that `recognised` knows.

    `need` names the fields that must be there and not empty. Other fields go to `meta`. Raises ValueError naming file,
    line and field.
    """
    path = Path(path)
    examples: list[Example] = []
    first = ("", 0)  # shape of the file, and where it was seen
    for number, row in parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path):
        at = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{at}: expected a JSON object, found {type(row).__name__}")
        shape, row = recognised(row)
        for name in ("prompt", "trajectory", "answer"):
            if name in need and name not in row:
                raise ValueError(f"{at}: no field {name!r}; it has {', '.join(row) or 'none'}")
            if not isinstance(row.get(name, ""), str):
                raise ValueError(f"{at}: {name!r} must be a string, found {row[name]!r:.40}")
            if name in need and not row[name].strip():
                raise ValueError(f"{at}: {name!r} is empty")
        if first[0] not in ("", shape):
            raise ValueError(
                f"{at}: its shape is {shape!r}, that of line {first[1]} {first[0]!r}; one shape a file"
            )
        first = first if first[0] else (shape, number)
        known = {k: row.pop(k) for k in ("prompt", "trajectory", "answer") if k in row}
        messages, meta = row.pop("messages", ()), row.pop("meta", {})
        if messages and not is_chat(messages):
            raise ValueError(
                f"{at}: 'messages' must be a list of objects with role and content, both strings"
            )
        meta = {**(meta if isinstance(meta, dict) else {"meta": meta}), **row}
        examples.append(Example(**known, meta=meta, messages=tuple(messages), line=number))
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


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
        raise ValueError(
            f"{path}: can't be read ({error.strerror}); expected a JSONL file of examples"
        ) from error


def json_value(line: bytes, at: str) -> object:
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if (
            b"\\u" in line
        ):  # \ud800 alone is half a character, which no tokenizer can read and no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # includes bytes that aren't UTF-8
        raise ValueError(f"{at}: not valid JSON in UTF-8 ({error})") from error
    return value


def parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f'{path}: reading parquet needs pyarrow: pip install -e ".[data]", or give JSONL'
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from error
    # a column that a row doesn't have is null there
    return enumerate(({k: v for k, v in row.items() if v is not None} for row in rows), 1)


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """Whole or not at all: written under a temporary name, then renamed."""

    def row(e: Example) -> dict:
        asked = {"messages": e.messages} if e.messages else {}
        return {"prompt": e.prompt, **asked, "trajectory": e.trajectory, "answer": e.answer, "meta": e.meta}

    runs.write_text(path, "".join(json.dumps(row(e)) + "\n" for e in examples))


def check_disjoint(**splits: list[Example]) -> None:
    """Raises ValueError when a prompt stands in two of the named splits: a score on seen problems means nothing."""
    seen: dict[str, str] = {}
    for name, examples in splits.items():
        for e in examples:
            if seen.setdefault(e.prompt, name) != name:
                raise ValueError(f"data: {e.prompt!r} is in both {seen[e.prompt]!r} and {name!r}")


@dataclass(frozen=True)
class Sequence:
    tokens: list[int]
    prompt_length: int  # tokens[prompt_length:] are trained


@dataclass(frozen=True)
class Format:
    """How an example becomes tokens: the same in training, in RL and in evaluation of one model."""

    chat: bool = False  # put the prompt into the model's chat template
    template: str = "{prompt}"  # text around the prompt, e.g. "Question: {prompt}\nAnswer:"

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"--template must hold {{prompt}}, got {self.template!r}")

    def prompt(self, e: Example, tokenizer: TextTokenizer) -> list[int]:
        """Ids of the prompt, up to where the answer begins."""
        if not self.chat:
            return tokenizer.encode_prompt(self.template.replace("{prompt}", e.prompt))
        *before, last = e.messages or [{"role": "user", "content": e.prompt}]
        asked = self.template.replace("{prompt}", last["content"])
        return tokenizer.encode(tokenizer.chat([*before, {**last, "content": asked}]))


PLAIN = Format()


def encode_examples(
    examples: list[Example],
    tokenizer: TextTokenizer,
    max_length: int,
    source: str,
    *,
    format: Format = PLAIN,
    drop: bool = False,
) -> list[Sequence]:
    """prompt + trajectory + end token. One longer than max_length tokens is dropped and counted, or raises ValueError."""
    sequences, long = [], []
    for e in examples:
        prompt = format.prompt(e, tokenizer)
        sequence = Sequence(prompt + tokenizer.encode_answer(e.trajectory), len(prompt))
        (long if len(sequence.tokens) > max_length else sequences).append(sequence)
        if long and not drop:
            raise ValueError(
                f"{source}, line {e.line}: {len(sequence.tokens)} tokens, at most {max_length} fit; "
                "--drop-long leaves such examples out"
            )
    report_dropped(len(long), len(examples), max_length, source)
    return sequences


def encode_prompts(
    examples: list[Example],
    tokenizer: TextTokenizer,
    max_length: int,
    source: str,
    *,
    format: Format = PLAIN,
    drop: bool = False,
) -> tuple[list[Example], list[list[int]]]:
    """(examples, their prompts' ids), those of at most max_length tokens: `drop` leaves longer ones out and counts them.

    Raises ValueError naming file and line of a longer one without `drop`, and of an empty one.
    """
    kept, ids = [], []
    for e in examples:
        prompt = format.prompt(e, tokenizer)
        if not prompt:
            raise ValueError(f"{source}, line {e.line}: the prompt has no tokens")
        if len(prompt) <= max_length:
            kept.append(e)
            ids.append(prompt)
        elif not drop:
            raise ValueError(
                f"{source}, line {e.line}: the prompt has {len(prompt)} tokens; at most {max_length} leave room for the "
                "answer: a smaller --max-new-tokens makes room, --drop-long leaves such prompts out"
            )
    report_dropped(len(examples) - len(kept), len(examples), max_length, source)
    return kept, ids


def report_dropped(dropped: int, count: int, max_length: int, source: str) -> None:
    if dropped == count:
        raise ValueError(f"{source}: all {count} examples are longer than {max_length} tokens")
    if dropped:
        runs.announce(f"{source}: {dropped} of {count} examples dropped, longer than {max_length} tokens")


@dataclass(frozen=True)
class Rows:
    """Packed sequences, all int64 [rows, length]."""

    tokens: Tensor
    positions: Tensor  # restart at 0 with every sequence
    documents: Tensor  # 1, 2, ... within a row; 0 is padding
    targets: Tensor  # the token that this position must predict, or -100
    index: Tensor  # that token's place among all trained ones, in the order of the sequences given; or -100

    def map(self, f: Callable[[Tensor], Tensor]) -> "Rows":
        return Rows(*(f(getattr(self, field.name)) for field in fields(self)))

    def to(self, device: torch.device) -> "Rows":
        return self.map(lambda t: t.to(device))

    def own(self, device: torch.device) -> "Rows":
        """This process's share of the rows, where there are several processes."""
        return self.map(parallel.share).to(device)

    def split(self, rows: int) -> list["Rows"]:
        """Micro-batches of at most `rows` rows."""
        return [self.map(lambda t, i=i: t[i : i + rows]) for i in range(0, len(self.tokens), rows)]

    @property
    def trained(self) -> Tensor:
        return self.targets != IGNORE


def trained_hidden(model: torch.nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """(hidden [N, D], targets [N]) at the N trained tokens of packed rows: the head sees no other."""
    hidden = model(rows.tokens, positions=rows.positions, documents=rows.documents)  # (R, S, D)
    return hidden[rows.trained], rows.targets[rows.trained]


def pack(sequences: list[Sequence], length: int) -> Rows:
    """First-fit decreasing into rows of `length` tokens (longer when one sequence is)."""
    length = max(length, max(len(s.tokens) for s in sequences))
    # the place of each sequence's first trained token
    first = np.cumsum([0] + [len(s.tokens) - s.prompt_length for s in sequences])
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens)):
        size = len(sequences[i].tokens)
        b = next((b for b, r in enumerate(room) if r >= size), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(length)
        bins[b].append(i)
        room[b] -= size
    length -= min(room)  # no column that every row leaves empty
    tokens, positions, documents = (np.zeros((len(bins), length), dtype=np.int64) for _ in range(3))
    targets, index = (np.full((len(bins), length), IGNORE, dtype=np.int64) for _ in range(2))
    for b, row in enumerate(bins):
        at = 0
        for d, i in enumerate(row, 1):
            s = sequences[i]
            end = at + len(s.tokens)
            tokens[b, at:end], positions[b, at:end] = s.tokens, np.arange(len(s.tokens))
            documents[b, at:end] = d
            trained = slice(at + s.prompt_length - 1, end - 1)  # position t predicts token t + 1
            targets[b, trained] = s.tokens[s.prompt_length :]
            index[b, trained] = np.arange(first[i], first[i + 1])
            at = end
    return Rows(*(torch.from_numpy(a) for a in (tokens, positions, documents, targets, index)))


def batch_indices(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    """The examples of optimizer step `step` (from 0): epochs of fresh permutations, cut into batches.

    A function of (seed, step) alone, so that a resumed run sees the data that an uninterrupted one would.
    """
    start = step * batch
    order = [
        np.random.default_rng((seed, epoch)).permutation(count)
        for epoch in range(start // count, (start + batch - 1) // count + 1)
    ]
    return np.concatenate(order)[start % count :][:batch]
