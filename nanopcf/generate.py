"""Complete a prompt, or talk to a model. The text appears while it is sampled.

python -m nanopcf.generate --model DIR --prompt "17 *3 +6 _ _ ="
python -m nanopcf.generate --model DIR --chat            a conversation, one line per turn; Ctrl-D ends it
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from nanopcf.run import config, log
from nanopcf.run.config import Count, Device, DType, Natural, NonNegative, PositiveShare, Threads
from nanopcf.run.untrusted import printable
from nanopcf.sampler import Sampler
from nanopcf.scoring import check_finite, open_model
from nanopcf.tokenizer import TextTokenizer


@dataclass(frozen=True)
class GenerateConfig(config.Config):
    model: str  # model folder
    prompt: str = ""  # text to continue; with --chat the first message
    chat: bool = False  # put the prompt into the model's chat template
    samples: Count = 1  # completions
    temperature: NonNegative = 0.7  # of the sampling; 0 is greedy
    top_p: PositiveShare = 1.0  # probability mass to sample from (nucleus)
    max_new_tokens: Count = 256  # longest answer, in tokens
    seed: Natural = 0  # of the sampling
    threads: Threads = 0  # CPU threads (0: found by a probe)
    device: Device = "auto"  # auto, cpu, cuda or mps
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt and not self.chat:
            raise ValueError("--prompt is empty: give the text to continue, or --chat for a conversation")


class Typist:
    """Prints the tokens of one answer as they come.

    One character may need several tokens. Until all of them are there it decodes to the replacement character, and the
    text waits.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.printed = 0  # characters

    def __call__(self, _index: int, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(printable(text[self.printed :]), end="", flush=True)
            self.printed = len(text)


def answer(c: GenerateConfig, sampler: Sampler, tokenizer: TextTokenizer, prompt: list[int], seed: int) -> str:
    """Generate and print. One sample is printed token by token, several are printed when done. Returns the first."""
    began = time.perf_counter()
    typist = Typist(tokenizer) if c.samples == 1 else None
    completions = sampler.generate(
        [prompt],
        n=c.samples,
        max_new_tokens=c.max_new_tokens,
        temperature=c.temperature,
        top_p=c.top_p,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        stream=typist,
    )
    check_finite(completions)
    texts = [tokenizer.decode(completion.tokens) for completion in completions]
    if typist:
        # an answer that was cut may end in half a character, which the typist kept back
        print(printable(texts[0][typist.printed :]))
    else:
        print(printable("\n".join(texts)))
    tokens = sum(len(completion.tokens) for completion in completions)
    log.announce(f"({tokens} tokens, {tokens / (time.perf_counter() - began):.1f} a second)")
    return texts[0]


def read_lines() -> Iterator[str]:
    """The lines that a user types, until Ctrl-D."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def main(c: GenerateConfig) -> None:
    model, tokenizer, _ = open_model(c)
    sampler = Sampler(model, slots=c.samples, max_length=model.config.max_length)
    if not c.chat:
        answer(c, sampler, tokenizer, tokenizer.encode_prompt(c.prompt), c.seed)
        return
    messages: list[dict[str, str]] = []
    for turn, text in enumerate([c.prompt] if c.prompt else read_lines()):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.encode(tokenizer.chat(messages))  # the whole conversation up to here
        messages.append({"role": "assistant", "content": answer(c, sampler, tokenizer, prompt, c.seed + turn)})


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(GenerateConfig, __doc__)))
