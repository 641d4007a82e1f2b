"""Text <-> token ids: a thin wrapper of Hugging Face's `tokenizers`, and the nano tasks' own character tokenizer.

A prompt and its trajectory are encoded *apart* and joined as ids, so that the boundary between what is given and
what is trained never moves. The end token is part of the answer: `encode_answer` appends it.
"""

import json
import time
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

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
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
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
