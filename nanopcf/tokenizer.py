"""From text to token ids and back: a thin wrapper of Hugging Face's `tokenizers`.

A prompt and its trajectory are encoded *apart* and then joined as ids. Encoded as one text, a token could span the end
of the prompt and the start of the trajectory, and the boundary between what is given and what is trained would move.
The end token is part of the answer: `encode_answer` appends it, so that the model learns to stop.

Left out: training a tokenizer; and padding, because sequences are packed by their lengths.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from nanopcf.interop.turns import with_begin, without_end

END = "<end>"


class TextTokenizer:
    """A tokenizer with the ids that training and generation need.

    eos_id      the end token, which is appended to what is trained
    stop_ids    generation stops at any of these; eos_id is one of them (Qwen has two, Llama 3 up to three)
    bos_ids     what a base model expects before any text: Llama a begin token, Qwen nothing
    named       the special tokens that a chat template knows by name, such as {"bos_token": "<s>"}

    Raises ValueError when the vocabulary does not hold `end_token`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_token: str = END,
        stop_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
        bos_ids: tuple[int, ...] = (),
        named: dict[str, str] | None = None,
    ) -> None:
        self.tokenizer, self.end_token, self.chat_template = tokenizer, end_token, chat_template
        self.bos_ids, self.named = list(bos_ids), named or {"eos_token": end_token}
        self.eos_id = tokenizer.token_to_id(end_token)
        if self.eos_id is None:
            raise ValueError(f"tokenizer: its vocabulary has no end token {end_token!r}")
        self.stop_ids = sorted({self.eos_id, *stop_ids})

    @property
    def vocab_size(self) -> int:
        """The number of rows that an embedding must have: one more than the highest id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, no begin or end token. Raises ValueError when the vocabulary cannot spell it."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # for a word without a token the library raises a bare Exception
            vocabulary = self.tokenizer.get_vocab()
            unknown = " ".join(sorted({word for word in text.split() if word not in vocabulary}))
            raise ValueError(f"tokenizer: can't spell {unknown!r} in {text[:60]!r}") from error

    def encode_prompt(self, text: str) -> list[int]:
        """A plain prompt as a base model expects it: after the begin token, if there is one. Raises like `encode`."""
        return with_begin(self.encode(text), self.bos_ids)

    def encode_answer(self, text: str) -> list[int]:
        """An answer and the end token. Raises like `encode`."""
        return [*self.encode(without_end(text, self)), self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; begin, end and other special tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt text for messages [{"role", "content"}], up to where the assistant's answer begins.

        Raises ValueError when the model has no chat template, or when the template fails.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: it is a base model; give it plain text")
        from nanopcf.interop.chat_template import render_chat  # jinja2 is slow to import, and few runs need it

        return render_chat(self.chat_template, messages, self.named)

    def save(self, path: Path) -> None:
        """Write the file tokenizer.json of a model folder."""
        path.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")


def word_tokenizer(words: Iterable[str]) -> TextTokenizer:
    """One token per word, and the end token. The words of a text stand between single spaces."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, END])}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    return TextTokenizer(tokenizer)
