"""Text <-> token ids: a thin wrapper of Hugging Face's `tokenizers`, and the nano tasks' own character tokenizer.

A prompt and its trajectory are encoded *apart* and joined as ids, so that the boundary between what is given and
what is trained never moves. The end token is part of the answer: `encode_answer` appends it.

    python -m nanopcf.tokenizer show --model DIR --data F.jsonl     training examples, the trained tokens coloured
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from nanopcf import config
from nanopcf.runs import read_json

NANO_ALPHABET = "0123456789+-*= "
END = "<end>"


class TextTokenizer:
    """encode, decode, `eos_id`, `stop_ids`, `vocab_size`. Raises ValueError on text the vocabulary can't spell.

    `eos_id` ends what is trained; generation stops at any of `stop_ids` (Qwen has two, Llama 3 up to three).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_token: str = END,
        stop_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
        bos_token: str = "",
    ) -> None:
        self.tokenizer, self.end_token, self.chat_template = tokenizer, end_token, chat_template
        self.bos_token = bos_token
        self.eos_id = tokenizer.token_to_id(end_token)
        if self.eos_id is None:
            raise ValueError(f"tokenizer: its vocabulary has no end token {end_token!r}")
        self.stop_ids = sorted({self.eos_id, *stop_ids})
        # what the model expects before any text: Llama's tokenizers put a begin token there, Qwen's nothing
        marks = [i for i in tokenizer.encode("").ids if i != self.eos_id]
        self.bos_ids = marks[:1]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows an embedding must have."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception for a symbol without a token
            vocabulary = self.tokenizer.get_vocab()
            unknown = "".join(sorted({ch for ch in text if ch not in vocabulary}))
            raise ValueError(f"tokenizer: can't spell {unknown!r} in {text[:60]!r}") from error
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """A plain prompt as a base model expects it: after the begin token, where there is one."""
        return [*self.bos_ids, *self.encode(text)]

    def encode_answer(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos_id]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt text for messages [{"role", "content"}], up to where the assistant answers.

        Templates come from strangers: they run in jinja2's sandbox. Raises ValueError without one, or when it fails.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: it is a base model; give it plain text")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        # what templates are written against: transformers' environment
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: time.strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=True,
                eos_token=self.end_token,
                bos_token=self.bos_token,
                tools=None,
                documents=None,
            )
        except Exception as error:  # a template can fail in any way
            raise ValueError(f"the chat template failed: {error}") from error

    def save(self, path: Path) -> None:
        path.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")


def nano_tokenizer() -> TextTokenizer:
    """One token a character of the nano tasks' alphabet, and the end token: a vocabulary of 16."""
    vocabulary = {symbol: i for i, symbol in enumerate([*NANO_ALPHABET, END])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    return TextTokenizer(tokenizer)


def load_tokenizer(folder: Path, eos_token_id: int | list[int] | None = None) -> TextTokenizer:
    """Reads folder/tokenizer.json, and the end tokens: tokenizer_config.json names the one that is trained, config.json
    (`eos_token_id`) and generation_config.json those that stop generation. Raises ValueError when one is missing."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model folder needs its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error
    stops = as_ids(eos_token_id)
    if (folder / "generation_config.json").exists():
        stops += as_ids(read_json(folder / "generation_config.json").get("eos_token_id"))
    named = {}
    if (folder / "tokenizer_config.json").exists():
        named = read_json(folder / "tokenizer_config.json")
    end = named.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is None and stops:
        end = tokenizer.id_to_token(stops[0])
    if not isinstance(end, str) or tokenizer.token_to_id(end) is None:
        raise ValueError(
            f"{folder}: no end token of this tokenizer: eos_token in tokenizer_config.json is {end!r}"
        )
    template = named.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'}: not UTF-8 ({error})") from error
    if isinstance(template, list):  # several, by name
        several = [t for t in template if isinstance(t, dict)]
        template = next((t.get("template") for t in several if t.get("name") == "default"), None)
    stops = [i for i in stops if tokenizer.id_to_token(i) is not None]
    bos = named.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    return TextTokenizer(
        tokenizer, end, tuple(stops), template if isinstance(template, str) else None, bos or ""
    )


def as_ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and 0 <= v < 2**31]


def show(tokenizer: TextTokenizer, tokens: list[int], prompt_length: int, colour: bool) -> str:
    """A training sequence as text, a mark between two tokens: what is given, then what is trained (green, or in [[ ]])."""
    vocabulary = tokenizer.tokenizer
    pieces = [
        vocabulary.decode([t], skip_special_tokens=False) or repr(vocabulary.id_to_token(t)) for t in tokens
    ]
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
    from nanopcf.checkpoint import load_tokenizer_of
    from nanopcf.data import Format, encode_examples, read_examples

    tokenizer = load_tokenizer_of(c.model)
    examples = read_examples(c.data, need=("prompt", "trajectory"))[: c.count]
    form = Format(c.chat, c.template)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for s in encode_examples(examples, tokenizer, sys.maxsize, c.data, format=form):
        print(show(tokenizer, s.tokens, s.prompt_length, colour))
        print(
            f"({s.prompt_length} tokens given, {len(s.tokens) - s.prompt_length} trained)\n", file=sys.stderr
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["show"]:
        del sys.argv[1]
    config.run_cli(
        lambda: main(config.parse(ShowConfig, "Show training examples, the trained tokens coloured."))
    )
