"""Training examples as text, with the trained tokens in colour: does training see what you think it sees?

python -m nanopcf.tools.show --model DIR --data F.jsonl
"""

import os
import sys
from dataclasses import dataclass

from nanopcf.checkpoint import load_tokenizer_of
from nanopcf.data import Format, encode_examples, read_examples
from nanopcf.run import config
from nanopcf.run.config import Count, Text
from nanopcf.run.untrusted import printable
from nanopcf.tokenizer import TextTokenizer

SEPARATOR = "\N{MIDDLE DOT}"  # between two tokens
GREEN, RESET = "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class ShowConfig(config.Config):
    model: str  # folder of the model whose tokenizer it is
    data: str  # JSONL with prompt and trajectory
    chat: bool = False  # put each prompt into the model's chat template
    template: Text = "{prompt}"  # text around each prompt
    end_token: str = ""  # ends a trajectory (default: as the chat template does)
    count: Count = 1  # examples to show


def show(tokenizer: TextTokenizer, tokens: list[int], prompt_length: int, colour: bool) -> str:
    """A training sequence as text: the prompt, then the trained tokens in green (without colour: in [[ ]])."""
    vocabulary = tokenizer.tokenizer
    # a token that decodes to nothing, such as a part of a character, is shown by its name
    pieces = [vocabulary.decode([t], skip_special_tokens=False) or repr(vocabulary.id_to_token(t)) for t in tokens]
    pieces = [printable(piece) for piece in pieces]
    prompt = SEPARATOR.join(pieces[:prompt_length])
    trained = SEPARATOR.join(pieces[prompt_length:])
    return f"{prompt}{GREEN}{trained}{RESET}" if colour else f"{prompt}[[{trained}]]"


def main(c: ShowConfig) -> None:
    tokenizer = load_tokenizer_of(c.model, chat=c.chat, end_token=c.end_token)
    examples = read_examples(c.data, need=("prompt", "trajectory"))[: c.count]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for s in encode_examples(examples, tokenizer, sys.maxsize, c.data, format=Format(c.chat, c.template)):
        print(show(tokenizer, s.tokens, s.prompt_length, colour))
        print(f"({s.prompt_length} tokens given, {len(s.tokens) - s.prompt_length} trained)\n", file=sys.stderr)


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(ShowConfig, __doc__)))
