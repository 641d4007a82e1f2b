"""Strings that end a response, such as "Question:", for base models, which otherwise go on with a problem of their own.

A string ends where a token completes it, whatever the tokenizer made of it. So the sampler asks after every step
whether the newest tokens of a sequence, as text, hold one of the strings.
"""

from collections.abc import Callable
from typing import Any

from nanopcf.answers.finding import opened_thoughts

PROMPT_END = 24  # tokens in which a tag at the end of a prompt is looked for
EXTRA = 16  # tokens beside those of the string: the sampler asks after every eighth step on a GPU


class StopStrings:
    """Of one tokenizer. Without strings nothing ends and nothing is cut. Raises ValueError for an empty string."""

    def __init__(self, strings: tuple[str, ...], decode: Callable[[list[int]], str]) -> None:
        if not all(strings):
            raise ValueError("--stop needs strings that aren't empty")
        self.strings, self.decode = strings, decode
        # A token is a byte at least. Half a character at the start of the tail does no harm.
        self.tail = max((len(s.encode()) for s in strings), default=0) + EXTRA

    def __bool__(self) -> bool:
        return bool(self.strings)

    def found(self, tokens: list[int]) -> bool:
        """Do the newest tokens hold a string?"""
        text = self.decode(tokens[-self.tail :])
        return any(s in text for s in self.strings)

    def length(self, tokens: list[int]) -> int:
        """How many of the tokens there are up to the one that completes the first string; all where there is none."""
        few, enough = 0, len(tokens)  # `enough` tokens hold a string, if there is one, and `few` don't
        while enough - few > 1:
            middle = (few + enough) // 2
            text = self.decode(tokens[:middle])
            few, enough = (few, middle) if any(s in text for s in self.strings) else (middle, enough)
        return enough

    def response(self, prompt: list[int], tokens: list[int]) -> str:
        """The text to judge: after the tag, if the prompt ends with one that opens the thoughts."""
        return opened_thoughts(self.decode(prompt[-PROMPT_END:])) + self.text(tokens)

    def text(self, tokens: list[int]) -> str:
        """The response without the string that ended it; a closing tag, such as </answer>, stays."""
        text = self.decode(tokens)
        places = [(at, s) for s in self.strings if (at := text.find(s)) >= 0]
        if not places:
            return text
        at, string = min(places)
        return text[: at + len(string) if string.startswith("</") else at]


def end_at_strings(stop: StopStrings, buffers: Any, live: int) -> None:
    """Of the first `live` slots in the sampler's `Buffers`, those whose sequence holds a stop string have ended: with
    the token that completed it, and what came after it is forgotten."""
    s = buffers.slots.first(live)
    for row, (i, made, ended) in enumerate(zip(s.sequence.tolist(), s.made.tolist(), s.ended.tolist(), strict=True)):
        count = int(buffers.lengths[i]) if ended else made
        if stop.found(buffers.tokens[i, max(0, count - stop.tail) : count].tolist()):
            buffers.lengths[i] = stop.length(buffers.tokens[i, :count].tolist())
            buffers.stopped[i] = s.ended[row] = True
