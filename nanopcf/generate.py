"""Complete a prompt, or talk to a model: the text appears as it is drawn.

python -m nanopcf.generate --model DIR --prompt "47+85*36         ="
python -m nanopcf.generate --model DIR --chat            a conversation, a line a turn; Ctrl-D ends it
"""

import sys
import time
from dataclasses import dataclass

from nanopcf import checkpoint
from nanopcf.run import config, log, machine
from nanopcf.sampler import Sampler
from nanopcf.tokenizer import TextTokenizer


@dataclass(frozen=True)
class GenerateConfig:
    model: str  # model folder
    prompt: str = ""  # text to continue, or what the user says; without one --chat asks
    chat: bool = False  # put the prompt into the model's chat template
    samples: int = 1  # completions
    temperature: float = 0.7  # 0 is greedy
    top_p: float = 1.0  # nucleus
    max_new_tokens: int = 256  # longest answer
    seed: int = 0  # of the sampling
    threads: int = 0  # CPU threads (0: found by a probe)
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # float32 or bfloat16 (auto: bfloat16 on CUDA)

    def __post_init__(self) -> None:
        config.at_least(1, self, "samples max_new_tokens")
        config.at_least(0, self, "threads")
        if not self.prompt and not self.chat:
            raise ValueError("--prompt is empty: give the text to continue, or --chat for a conversation")


class Typist:
    """Prints tokens as they come. A character may need several tokens: incomplete ones wait."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer, self.tokens, self.printed = tokenizer, [], 0

    def __call__(self, _: int, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)


def answer(c: GenerateConfig, sampler: Sampler, tokenizer: TextTokenizer, prompt: list[int], seed: int) -> str:
    """Generate and print; one sample is streamed, several are printed whole. Returns the first."""
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
    texts = [tokenizer.decode(done.tokens) for done in completions]
    if typist:
        print(texts[0][typist.printed :])
    else:
        print("\n".join(texts))
    made = sum(len(done.tokens) for done in completions)
    log.announce(f"({made} tokens, {made / (time.perf_counter() - began):.1f} a second)")
    return texts[0]


def main(c: GenerateConfig) -> None:
    device = machine.choose_device(c.device)
    model, tokenizer = checkpoint.load(c.model, device, machine.choose_dtype(c.dtype, device))
    machine.set_threads(c.threads, model)
    sampler = Sampler(model, slots=c.samples, max_length=model.config.max_length)
    if not c.chat:
        answer(c, sampler, tokenizer, tokenizer.encode_prompt(c.prompt), c.seed)
        return
    messages: list[dict[str, str]] = []
    turns = [c.prompt] if c.prompt else iter(lambda: asked("> "), None)
    for turn, said in enumerate(turns):
        messages.append({"role": "user", "content": said})
        reply = answer(c, sampler, tokenizer, tokenizer.encode(tokenizer.chat(messages)), c.seed + turn)
        messages.append({"role": "assistant", "content": reply})


def asked(mark: str) -> str | None:
    """A line from the terminal; None at its end."""
    print(mark, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(GenerateConfig, __doc__)))
