"""Training examples as text, the trained tokens coloured.

python -m nanopcf.tools.show --model DIR --data F.jsonl
"""

import os
import sys
from dataclasses import dataclass

from nanopcf.checkpoint import load_tokenizer_of
from nanopcf.data import Format, encode_examples, read_examples
from nanopcf.run import config
from nanopcf.tokenizer import TextTokenizer


def show(tokenizer: TextTokenizer, tokens: list[int], prompt_length: int, colour: bool) -> str:
    """A training sequence as text, a mark between two tokens: what is given, then what is trained (green, or in [[ ]])."""
    vocabulary = tokenizer.tokenizer
    pieces = [vocabulary.decode([t], skip_special_tokens=False) or repr(vocabulary.id_to_token(t)) for t in tokens]
    given, trained = ("\u00b7".join(p) for p in (pieces[:prompt_length], pieces[prompt_length:]))
    return f"{given}\x1b[32m{trained}\x1b[0m" if colour else f"{given}[[{trained}]]"


@dataclass(frozen=True)
class ShowConfig:
    model: str  # folder of the model whose tokenizer it is
    data: str  # JSONL with prompt and trajectory
    chat: bool = False  # put each prompt into the model's chat template
    template: str = "{prompt}"  # text around each prompt
    count: int = 1  # examples to show


def main(c: ShowConfig) -> None:
    tokenizer = load_tokenizer_of(c.model)
    examples = read_examples(c.data, need=("prompt", "trajectory"))[: c.count]
    form = Format(c.chat, c.template)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for s in encode_examples(examples, tokenizer, sys.maxsize, c.data, format=form):
        print(show(tokenizer, s.tokens, s.prompt_length, colour))
        print(f"({s.prompt_length} tokens given, {len(s.tokens) - s.prompt_length} trained)\n", file=sys.stderr)


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(ShowConfig, __doc__)))
