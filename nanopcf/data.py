"""Examples: read from files, checked, written again, and encoded as token ids.

An example is one problem: a prompt, the expert's worked solution (its trajectory), and the answer that a verifier
compares with. SFT trains on prompt + trajectory + end token (`encode_examples`); in RL and evaluation the model is
given the prompt alone (`encode_prompts`). How rows of other projects' files become our fields is told in
`nanopcf/interop/problems.py`, and how sequences of different lengths share a batch in `nanopcf/packing.py`.

Left out: streaming and shuffling. The paper's data fit in memory, and a run's order of examples follows from its seed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanopcf.answers.comparing import is_formula
from nanopcf.answers.finding import bare
from nanopcf.answers.mathematics import INSTALL, installed
from nanopcf.interop.problems import is_chat, jsonl_rows, parquet_rows, recognised
from nanopcf.interop.turns import after_prompt
from nanopcf.packing import Sequence
from nanopcf.rewards import verify
from nanopcf.run import files, log
from nanopcf.tokenizer import TextTokenizer

TEXT_FIELDS = ("prompt", "trajectory", "answer")
LONGEST_TAG = 24  # tokens of the end of a prompt in which a tag is looked for


@dataclass(frozen=True)
class Example:
    prompt: str
    trajectory: str = ""  # the expert's worked solution; empty in RL and evaluation data
    answer: str = ""  # the final answer that a verifier compares with
    meta: dict = field(default_factory=dict)  # whatever else its row held
    messages: tuple[dict, ...] = ()  # the prompt as a chat, where the file has one
    line: int = field(default=0, compare=False)  # of the file it came from


# ---- files ----


def read_examples(path: str | Path, *, need: tuple[str, ...] = ("prompt",)) -> list[Example]:
    """One example per line (JSONL) or row (.parquet, extra `data`), all of one shape that `recognised` knows.

    `need` names the fields that must be there and not empty. Raises ValueError naming the file, the line and the field.
    """
    path = Path(path)
    examples: list[Example] = []
    # The shape of the first row, and its line: the other rows must have the same shape.
    first_shape, first_line = None, 0
    unused: dict[str, None] = {}  # the names of text columns, in their order
    for line, row in parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path):
        where = f"{path}, line {line}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        try:
            shape, fields, missing, unused_here = recognised(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        check_text_fields(fields, need, where, missing)
        unused |= dict.fromkeys(unused_here)
        if first_shape is None:
            first_shape, first_line = shape, line
        if shape != first_shape:
            raise ValueError(
                f"{where}: its shape is {shape!r}, that of line {first_line} {first_shape!r}; a file has one shape"
            )
        examples.append(to_example(fields, line, where))
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    if "answer" in need:
        announce_answers(examples, path)
    if unused:
        log.announce_once(f"{path}: text that is not used: {', '.join(unused)}")
    turns = sum(e.trajectory != "" and any(m["role"] == "assistant" for m in e.messages) for e in examples)
    if turns:
        log.announce_once(
            f"{path}: {turns} of {len(examples)} chats have several answers: the last one is trained alone"
        )
    return examples


def check_text_fields(fields: dict, need: tuple[str, ...], where: str, missing: dict[str, str]) -> None:
    """Raises ValueError when a needed field is missing or blank, or when one of the three is no text.

    missing: why a field is not there, where more can be said about it.
    """
    for name in TEXT_FIELDS:
        if name in need and name not in fields:
            because = f" ({missing[name]})" if name in missing else ""
            raise ValueError(f"{where}: no field {name!r}{because}; it has {', '.join(fields) or 'none'}")
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"{where}: {name!r} must be a string, found {fields[name]!r:.40}")
        if name in need and not fields[name].strip():
            raise ValueError(f"{where}: {name!r} is empty")


def announce_answers(examples: list[Example], path: Path) -> None:
    """Say on stderr which right answers no response can give, since they don't equal themselves in a box, and how many
    are formulas, which only math-verify compares by value, where it isn't installed."""
    count = len(examples)
    lost = [e for e in examples if not verify(f"\\boxed{{{e.answer}}}", e.answer)]
    if lost:
        named = ", ".join(f"line {e.line} {e.answer!r:.40}" for e in lost[:5]) + (" ..." if len(lost) > 5 else "")
        log.announce(f"{path}: {len(lost):,} of {count:,} answers are never right, not even in a box: {named}")
    formulas = 0 if installed() else sum(is_formula(e.answer) for e in examples)
    if formulas:
        log.announce(f"{path}: {formulas:,} of {count:,} answers are formulas: {INSTALL} compares them by value")


def to_example(fields: dict, line: int, where: str) -> Example:
    """The fields that an Example has, and all others in its `meta`. Raises ValueError when `messages` are no chat."""
    texts = {name: fields[name] for name in TEXT_FIELDS if name in fields}
    if "answer" in texts:
        texts["answer"] = bare(texts["answer"])
    messages = fields.get("messages") or []
    if messages and not is_chat(messages):
        raise ValueError(f"{where}: 'messages' must be a list of objects with role and content, both strings")
    meta = fields.get("meta", {})
    meta = dict(meta) if isinstance(meta, dict) else {"meta": meta}
    meta |= {name: value for name, value in fields.items() if name not in (*TEXT_FIELDS, "messages", "meta")}
    return Example(**texts, meta=meta, messages=tuple(messages), line=line)


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """Write a file that `read_examples` reads; whole or not at all. Raises OSError when it cannot be written."""
    lines = []
    for e in examples:
        chat = {"messages": e.messages} if e.messages else {}
        row = {"prompt": e.prompt, **chat, "trajectory": e.trajectory, "answer": e.answer, "meta": e.meta}
        lines.append(json.dumps(files.strict(row)) + "\n")
    files.write_text(path, "".join(lines))


def check_disjoint(**splits: list[Example]) -> None:
    """Raises ValueError when a prompt is in two of the named splits: a score on trained problems means nothing."""
    split_of: dict[str, str] = {}
    for name, examples in splits.items():
        for e in examples:
            if split_of.setdefault(e.prompt, name) != name:
                raise ValueError(f"data: {e.prompt!r} is in both {split_of[e.prompt]!r} and {name!r}")


# ---- token ids ----


@dataclass(frozen=True)
class Format:
    """How a prompt becomes token ids. One model needs the same format in training, in RL and in evaluation.

    Raises ValueError when the template has no place for the prompt.
    """

    chat: bool = False  # put the prompt into the model's chat template
    template: str = "{prompt}"  # text around the prompt, e.g. "Question: {prompt}\nAnswer:"

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"--template must hold {{prompt}}, got {self.template!r}")

    def prompt(self, e: Example, tokenizer: TextTokenizer) -> list[int]:
        """Ids of the prompt, up to where the answer begins. Raises ValueError when it cannot be encoded."""
        if not self.chat:
            return tokenizer.encode_prompt(self.template.replace("{prompt}", e.prompt))
        # Of a chat, the template surrounds the last message. A system message and earlier turns stay as they are.
        *earlier, last = e.messages or [{"role": "user", "content": e.prompt}]
        content = self.template.replace("{prompt}", last["content"])
        return tokenizer.encode(tokenizer.chat([*earlier, {**last, "content": content}]))


PLAIN = Format()


def encode_trajectory(prompt: list[int], e: Example, tokenizer: TextTokenizer) -> list[int]:
    """Ids of the trajectory as it follows the ids of its prompt, and the end token. Raises like `encode_answer`.

    Neither the end token nor a tag that the template has opened at the end of the prompt, such as <think>, is repeated.
    """
    prompt_end = tokenizer.tokenizer.decode(prompt[-LONGEST_TAG:], skip_special_tokens=False)
    return tokenizer.encode_answer(after_prompt(e.trajectory, prompt_end))


def encode_examples(
    examples: list[Example],
    tokenizer: TextTokenizer,
    max_length: int,
    source: str,
    *,
    format: Format = PLAIN,
    drop: bool = False,
) -> list[Sequence]:
    """prompt + trajectory + end token of each example. `source` is the name of their file, for messages.

    `drop` leaves out those of over max_length tokens. Raises ValueError for one without `drop`, or if none is left.
    """
    sequences = []
    for e in examples:
        prompt = format.prompt(e, tokenizer)
        tokens = prompt + encode_trajectory(prompt, e, tokenizer)
        if len(tokens) <= max_length:
            sequences.append(Sequence(tokens, prompt_length=len(prompt)))
        elif not drop:
            raise ValueError(
                f"{source}, line {e.line}: {len(tokens)} tokens, at most {max_length} fit; "
                "--drop-long leaves such examples out"
            )
    report_dropped(len(examples) - len(sequences), len(examples), max_length, source)
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
    """(examples, the ids of their prompts). `source` is the name of their file, for messages.

    `drop` leaves out prompts of over max_length tokens. Raises ValueError for one without `drop`, if none is left, and
    for a prompt without tokens.
    """
    kept, prompts = [], []
    for e in examples:
        prompt = format.prompt(e, tokenizer)
        if not prompt:
            raise ValueError(f"{source}, line {e.line}: the prompt has no tokens")
        if len(prompt) <= max_length:
            kept.append(e)
            prompts.append(prompt)
        elif not drop:
            raise ValueError(
                f"{source}, line {e.line}: the prompt has {len(prompt)} tokens; at most {max_length} leave room for "
                "the answer: a smaller --max-new-tokens makes room, --drop-long leaves such prompts out"
            )
    report_dropped(len(examples) - len(kept), len(examples), max_length, source)
    return kept, prompts


def report_dropped(dropped: int, count: int, max_length: int, source: str) -> None:
    """Say on stderr how many examples were left out. Raises ValueError when all were."""
    if dropped == count:
        raise ValueError(f"{source}: all {count} examples are longer than {max_length} tokens")
    if dropped:
        log.announce(f"{source}: {dropped} of {count} examples dropped, longer than {max_length} tokens")


# ---- order ----


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
