"""Complete one prompt.

python -m nanopcf.generate --model DIR --prompt "47+85*36         ="
"""

from dataclasses import dataclass

import torch

from nanopcf import checkpoint, config, runs
from nanopcf.sampler import Sampler


@dataclass(frozen=True)
class GenerateConfig:
    model: str  # model folder
    prompt: str  # text to continue, or what the user says
    chat: bool = False  # put the prompt into the model's chat template
    samples: int = 1  # completions
    temperature: float = 0.7  # 0 is greedy
    top_p: float = 1.0  # nucleus
    max_new_tokens: int = 64  # longest answer
    seed: int = 0  # of the sampling
    threads: int = 1  # CPU threads; 1 is best for small models
    device: str = "auto"  # auto, cpu, cuda or mps


def main(c: GenerateConfig) -> None:
    torch.set_num_threads(c.threads)
    model, tokenizer = checkpoint.load(c.model, runs.choose_device(c.device))
    sampler = Sampler(model, slots=c.samples, max_length=model.config.max_length)
    text = tokenizer.chat([{"role": "user", "content": c.prompt}]) if c.chat else c.prompt
    for completion in sampler.generate(
        [tokenizer.encode(text)],
        n=c.samples,
        max_new_tokens=c.max_new_tokens,
        temperature=c.temperature,
        top_p=c.top_p,
        stop_ids=tokenizer.stop_ids,
        seed=c.seed,
    ):
        print(tokenizer.decode(completion.tokens))


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(GenerateConfig, __doc__.split("\n\n")[0])))
