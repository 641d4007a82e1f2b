"""Multiple choice: a row's choices are written below its question with letters, and the answer becomes the letter."""

import json
import random
import re
from typing import Any, NamedTuple

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plain_name(name: str) -> str:
    """The name of a field however it is spelt: "Correct Answer" and "correct-answer" are "correct_answer"."""
    return re.sub(r"[\s-]+", "_", name.strip()).lower()


class Columns:
    """The fields of a row by their plain names; it remembers which were taken. One that is null or NaN is not there."""

    def __init__(self, row: dict) -> None:
        # Tables hold NaN, which is the one value that differs from itself, in an empty cell.
        self.empty = {plain_name(name) for name, value in row.items() if value != value}
        self.row = {name: value for name, value in row.items() if value is not None and value == value}
        self.names: dict[str, str] = {}  # plain name -> its spelling; of two spellings the plain one wins
        for name in sorted(self.row, key=lambda name: name != plain_name(name)):
            self.names.setdefault(plain_name(name), name)
        self.taken: set[str] = set()

    def name(self, plain: str) -> str:
        return self.names.get(plain, plain)

    def was_read(self, plain: str) -> bool:
        return self.name(plain) in self.taken

    def peek(self, *plain: str) -> Any:
        """The value of the first of these fields that is there and not blank; else of the first blank text; or None."""
        return self.find(plain)[1]

    def has(self, *plain: str) -> bool:
        return any(name in self.names and self.names[name] not in self.taken for name in plain)

    def take(self, *plain: str) -> Any:
        return self.take_named(*plain)[1]

    def take_named(self, *plain: str) -> tuple[str, Any]:
        """(spelling of the name, value) like `peek`; it counts as read."""
        name, value = self.find(plain)
        if value is not None:
            self.taken.add(name)
        return name, value

    def find(self, plain: tuple[str, ...]) -> tuple[str, Any]:
        there = [self.names[name] for name in plain if self.has(name)]
        filled = [name for name in there if self.row[name] not in ("", [], {}) and not is_blank(self.row[name])]
        blank = [name for name in there if isinstance(self.row[name], str)]
        name = next(iter(filled or blank), "")
        return name, self.row.get(name)

    def rest(self) -> dict:
        """The fields that were not taken, by their own names."""
        return {name: value for name, value in self.row.items() if name not in self.taken}


def is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


class Choices(NamedTuple):
    labels: list[str]  # as the row calls them: "A", "1"; empty where it counts from 0
    texts: list[str]
    answer_names: tuple[str, ...]  # the fields in which the right one may stand


ANSWER_NAMES = (
    *("answer_key", "answerkey", "answer", "answer_index", "answer_idx", "correct", "correct_answer", "correct_option"),
    *("ground_truth", "gold", "label", "cop"),
)


def take_choices(columns: Columns) -> Choices | None:
    """The choices of a question, or None where it has none. Raises ValueError naming the field that cannot be read.

    {"choices": ["4", "9", "11"], "answer": 2}                                          (MMLU)
    {"options": ["4", "9", "11"], "answer": "C"}                                        (MMLU-Pro, AQuA, MedQA)
    {"choices": {"text": ["4", "9"], "label": ["A", "B"]}, "answerKey": "B"}            (ARC, CommonsenseQA)
    {"A": "4", "B": "9", "C": "11", "Answer": "C"}                                      (MMLU's tables)
    {"Correct Answer": "11", "Incorrect Answer 1": "4", "Incorrect Answer 2": "9"}      (GPQA)
    """
    for wrong in ("incorrect_answer_", "distractor"):
        names = [f"{wrong}{i}" for i in range(1, 10) if columns.has(f"{wrong}{i}")]
        if names and columns.has("correct_answer"):
            texts = [str(columns.take(name)).strip() for name in ("correct_answer", *names)]
            right = texts[0]
            # In an order that follows from the texts, so that the right one is not always the first.
            random.Random("\n".join(texts)).shuffle(texts)
            columns.row["answer"] = LETTERS[texts.index(right)]
            columns.names["answer"] = "answer"
            return Choices(list(LETTERS[: len(texts)]), texts, ("answer",))
    for names, labels in (
        ([letter for letter in LETTERS if letter in columns.row], LETTERS),
        ([f"option_{letter.lower()}" for letter in LETTERS if columns.has(f"option_{letter.lower()}")], LETTERS),
        ([f"op{letter.lower()}" for letter in LETTERS[:8] if columns.has(f"op{letter.lower()}")], ""),
        ([f"option{i}" for i in range(1, 10) if columns.has(f"option{i}")], "123456789"),
        ([f"sol{i}" for i in range(1, 10) if columns.has(f"sol{i}")], ""),
    ):
        if len(names) >= 2 and names[0].lower() in ("a", "option_a", "opa", "option1", "sol1"):
            texts = [str(columns.take(name.lower())).strip() for name in names]
            return Choices(list(labels[: len(texts)]), texts, ANSWER_NAMES)
    name = next((name for name in ("choices", "options", "endings") if columns.peek(name)), None)
    if name is None:
        return None
    value, spelling = columns.take(name), columns.name(name)
    labels, texts = labels_and_texts(value)
    if len(texts) < 2 or len(texts) > len(LETTERS) or len(labels) not in (0, len(texts)):
        raise ValueError(f"{spelling!r} must be a list of 2 to 26 choices, found {value!r:.60}")
    return Choices(labels, texts, ANSWER_NAMES)


def labels_and_texts(value: object) -> tuple[list[str], list[str]]:
    """The parts of choices in any of their spellings; ([], []) for one that is unknown."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            # MathQA: "a ) 38 , b ) 27 , c ) none of these"
            value = [part.strip(" ,") for part in re.split(r"(?:^|,)\s*(?=[a-e] \) )", value) if part.strip(" ,")]
    if isinstance(value, dict):
        texts = value.get("text", value.get("texts"))
        if isinstance(texts, list):
            labels = value.get("label", value.get("labels", []))
            return [str(label) for label in labels], [str(text).strip() for text in texts]
        return [str(label) for label in value], [str(text).strip() for text in value.values()]
    if not isinstance(value, list):
        return [], []
    if value and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("label", item.get("key")), item.get("text", item.get("value"))) for item in value]
        if any(label is None or text is None for label, text in pairs):
            return [], []
        return [str(label) for label, _ in pairs], [str(text).strip() for _, text in pairs]
    if not all(isinstance(item, (str, int, float)) for item in value):
        return [], []
    texts = [str(item).strip() for item in value]
    # "A)21", "(B) 22", "c . 23": the letters are labels, and no part of the texts.
    parts = [re.fullmatch(r"\(?([A-Za-z])\s*[).:]\s*(.*)", text, re.DOTALL) for text in texts]
    if all(parts) and [part[1].upper() for part in parts] == list(LETTERS[: len(parts)]):
        return [part[1].upper() for part in parts], [part[2].strip() for part in parts]
    return [], texts


def with_choices(question: str, choices: Choices) -> str:
    """The question and below it "A. ...", one line each; the question alone where it shows its choices already."""
    lettered = list(zip(LETTERS, choices.texts, strict=False))
    marks = (". ", ") ", ": ", ".", ")", ":")
    if all(any(f"{letter}{mark}{text}" in question for mark in marks) for letter, text in lettered):
        return question
    return f"{question}\n\n" + "\n".join(f"{letter}. {text}" for letter, text in lettered)


def right_letter(choices: Choices, value: object, name: str) -> str:
    """The letter of the right choice, which a row gives as a letter, a label, a text, or a number that counts from 0.

    Raises ValueError naming the field when it is none of the choices.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    labels = [label.upper() for label in choices.labels] or list(LETTERS[: len(choices.texts)])
    letter = re.fullmatch(r"\(?([A-Za-z0-9])\)?[.:]?", text)
    if letter and letter[1].upper() in labels and not isinstance(value, bool):
        return LETTERS[labels.index(letter[1].upper())]
    if type(value) is int and 0 <= value < len(choices.texts):
        return LETTERS[value]
    if choices.texts.count(text) == 1:
        return LETTERS[choices.texts.index(text)]
    if isinstance(value, str) and text.isdecimal() and int(text) < len(choices.texts):
        return LETTERS[int(text)]
    raise ValueError(f"{name!r} is {value!r:.40}, which is none of the {len(choices.texts)} choices")
