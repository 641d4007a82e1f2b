"""Examples, their files, packed rows: from text to the tensors that the loops train on.

A row of training data packs several examples one after the other. Three things keep that exact: `positions` restart
with every example, `documents` stop one example from seeing another, and `targets` are -100 wherever the next token
isn't a trained one. Masks come from lengths, never from token ids, so the end token (part of the answer) is trained
like any other and nothing after it is.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from nanopcf.interop.problems import is_chat, jsonl_rows, parquet_rows, recognised
from nanopcf.packing import Sequence
from nanopcf.run import files, log
from nanopcf.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Example:
    prompt: str
    trajectory: str = ""  # the expert's worked solution; empty in RL and evaluation data
    answer: str = ""  # the final answer that a verifier compares with
    meta: dict = field(default_factory=dict)
    messages: tuple[dict, ...] = ()  # the prompt as a chat, where the file has one
    line: int = field(default=0, compare=False)  # of the file it came from


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
            raise ValueError(f"{at}: its shape is {shape!r}, that of line {first[1]} {first[0]!r}; one shape a file")
        first = first if first[0] else (shape, number)
        known = {k: row.pop(k) for k in ("prompt", "trajectory", "answer") if k in row}
        messages, meta = row.pop("messages", ()), row.pop("meta", {})
        if messages and not is_chat(messages):
            raise ValueError(f"{at}: 'messages' must be a list of objects with role and content, both strings")
        meta = {**(meta if isinstance(meta, dict) else {"meta": meta}), **row}
        examples.append(Example(**known, meta=meta, messages=tuple(messages), line=number))
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """Whole or not at all: written under a temporary name, then renamed."""

    def row(e: Example) -> dict:
        asked = {"messages": e.messages} if e.messages else {}
        return {"prompt": e.prompt, **asked, "trajectory": e.trajectory, "answer": e.answer, "meta": e.meta}

    files.write_text(path, "".join(json.dumps(row(e)) + "\n" for e in examples))


def check_disjoint(**splits: list[Example]) -> None:
    """Raises ValueError when a prompt stands in two of the named splits: a score on seen problems means nothing."""
    seen: dict[str, str] = {}
    for name, examples in splits.items():
        for e in examples:
            if seen.setdefault(e.prompt, name) != name:
                raise ValueError(f"data: {e.prompt!r} is in both {seen[e.prompt]!r} and {name!r}")


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
        log.announce(f"{source}: {dropped} of {count} examples dropped, longer than {max_length} tokens")
