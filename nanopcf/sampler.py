"""Batched generation: a static cache, one prefill per prompt shared by its samples, slots refilled as they finish.

A slot is one row of the cache. Rows of like length stand side by side and read equally far, so that a short one does
not pay for a long one (`similar`). The loop in `Sampler.generate` repeats two phases: fill the free slots with waiting
sequences, then draw one token in every slot and feed it to the model. When no sequence waits any longer, the rows that
are still at work move together, so that no time is spent on finished ones.

Randomness is counted, not streamed: token t of sequence i is drawn with the uniform number hash(seed, i, t), so a
completion depends neither on the sequences that share its batch nor on the number of slots (up to the rounding of a
matrix product with another number of rows). One uniform number per token is enough: it picks from the cumulative
distribution.

On a GPU the host never waits for a token. It knows the lengths without asking, asks only after every eighth step which
sequences have ended (what a sequence draws after its end is not read), and replays the step as a CUDA graph.

The log-probs returned are those of the distribution that was sampled, temperature and top-p included, in float32.

Left out: paged memory (a static cache and refilled slots need a fifth of the code), speculative decoding, beam search.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from kernels.drawing import draw
from kernels.products import packed_weights
from nanopcf.model import KVCache, Transformer
from nanopcf.padding import in_parts, similar
from nanopcf.run.counted_random import counter_uniforms
from nanopcf.run.cuda_graphs import Replay, graph_capture
from nanopcf.stopping import StopStrings, end_at_strings

PREFILL_TOKENS = 2048  # of prompts that go through the model together, padding included
PREFILL_WASTE = 256  # of these at most so many are padding
DECODE_WASTE = 4096  # positions read in vain that cost about as much as one more call of the attention


@dataclass
class Completion:
    prompt_index: int
    tokens: list[int]  # including the end token, when there is one
    logprobs: list[float]  # of each token, under the distribution that it was drawn from
    finish_reason: str  # "stop" (an end token) or "length"


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: logits [B, V] float32, uniform [B] -> tokens [B] int64, logprobs [B] float32.

    Temperature 0 is greedy (the log-prob is then the model's own, at temperature 1). top_p < 1 keeps the smallest set
    of most likely tokens whose probability reaches top_p (Holtzman et al., 2020), and renormalises.
    """
    if temperature == 0:
        logprobs = logits.log_softmax(-1)  # (B, V)
        token = logprobs.argmax(-1)  # (B,)
        return token, logprobs.gather(-1, token[:, None]).squeeze(-1)
    logprobs = (logits / temperature if temperature != 1 else logits).log_softmax(-1)  # (B, V)
    if top_p < 1:
        ordered, order = logprobs.sort(-1, descending=True)  # (B, V)
        probability_before = ordered.exp().cumsum(-1) - ordered.exp()  # rounded: 0.5 + 0.3 can fall short of 0.8
        ordered = ordered.masked_fill(probability_before >= top_p - 1e-6, -torch.inf).log_softmax(-1)
        logprobs = torch.empty_like(logprobs).scatter_(-1, order, ordered)
    token = draw(logprobs.exp(), uniform[:, None])  # (B, 1)
    return token.squeeze(-1), logprobs.gather(-1, token).squeeze(-1)


def prefill(model: Transformer, prompts: list[list[int]]) -> tuple[KVCache, Tensor]:
    """The keys and values of P prompts, one row each, and the hidden state of each one's last token [P, D]."""
    device, P, T = model.head_weight.device, len(prompts), max(map(len, prompts))
    kv_cache = KVCache(model.config, P, T, device, model.head_weight.dtype)
    tokens = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)  # (P, T)
    positions = torch.arange(T, device=device).expand(P, T)
    hidden = model(tokens, positions=positions, kv_cache=kv_cache, spans=[(P, T)])  # (P, T, D)
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    return kv_cache, hidden[torch.arange(P, device=device), last]  # (P, D)


@dataclass
class Slots:
    """The state of every slot, on the device."""

    hidden: Tensor  # (slots, D), the last hidden state: the next token is drawn from it
    sequence: Tensor  # (slots,) int64, which sequence sits here; an idle slot holds the last row of `tokens`
    made: Tensor  # (slots,) int64, how many tokens the sequence has drawn
    position: Tensor  # (slots,) int64, where its next token will stand
    limit: Tensor  # (slots,) int64, how many tokens it may draw
    ended: Tensor  # (slots,) bool
    token: Tensor  # (slots,) int64, drawn last

    def first(self, rows: int) -> "Slots":
        """Views of the first rows: what is written to them is written here."""
        return Slots(**{name: state[:rows] for name, state in vars(self).items()})


class Buffers:
    """All that a step reads and writes, on the device: always in place, since a CUDA graph keeps the addresses."""

    def __init__(self, model: Transformer, rows: int, sequences: int, longest: int, length: int) -> None:
        self.model, self.sequences, self.longest, self.size = model, sequences, longest, (sequences, longest, length)
        self.last_position = min(length, model.config.max_length) - 1
        device, dtype, width = model.head_weight.device, model.head_weight.dtype, model.config.width
        self.cache = KVCache(model.config, rows, length, device, dtype)
        # One row more than there are sequences, for idle slots, and one column more, for steps after the last token.
        shape = (sequences + 1, longest + 1)
        self.uniforms, self.logprobs = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.lengths = torch.zeros(sequences + 1, dtype=torch.long, device=device)
        self.stopped = torch.zeros(sequences + 1, dtype=torch.bool, device=device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        hidden, ended = torch.zeros(rows, width, device=device, dtype=dtype), torch.zeros_like(zeros, dtype=torch.bool)
        self.slots = Slots(hidden, *(zeros.clone() for _ in range(4)), ended, zeros.clone())
        self.stop_tensor = cache(partial(torch.tensor, dtype=torch.long, device=device))

    def step(self, spans: list[tuple[int, int]], temperature: float, top_p: float, stop: tuple[int, ...]) -> None:
        """Draw a token in the first slots and feed it to the model. spans [(rows, S)]: rows read up to S positions.

        Nothing waits for the device. Rows that have ended draw on until they are refilled; nothing reads what they
        draw.
        """
        s = self.slots.first(sum(rows for rows, _ in spans))
        # 1. draw
        t = s.made.clamp(max=self.longest)  # (rows,)
        token, logprob = sample(self.model.logits(s.hidden), self.uniforms[s.sequence, t], temperature, top_p)
        s.token.copy_(token)
        self.tokens[s.sequence, t], self.logprobs[s.sequence, t] = token, logprob
        # 2. note which sequences end with this token
        stopped = (token[:, None] == self.stop_tensor(stop)).any(-1)  # (rows,); torch.isin may wait for the GPU
        ends = (stopped | (t + 1 >= s.limit)) & ~s.ended
        self.lengths[s.sequence] = torch.where(ends, t + 1, self.lengths[s.sequence])
        self.stopped[s.sequence] = torch.where(ends, stopped, self.stopped[s.sequence])
        s.ended |= ends
        # 3. feed
        position = s.position.clamp(max=self.last_position)[:, None]  # (rows, 1)
        s.hidden.copy_(self.model(token[:, None], positions=position, kv_cache=self.cache, spans=spans)[:, 0])
        s.made += 1
        s.position += 1


class Sampler:
    """Generates from `model` with `slots` sequences at a time, prompt and answer within `max_length` tokens.
    The cache and the other buffers stay in memory for the next call."""

    def __init__(self, model: Transformer, *, slots: int, max_length: int, stop: StopStrings | None = None) -> None:
        if slots < 1:
            raise ValueError(f"sampler: slots must be at least 1, got {slots}")
        if max_length > (context := model.config.max_length):
            raise ValueError(f"sampler: max_length {max_length} is beyond the model's context of {context}")
        self.model, self.slots, self.max_length, self.stop = model, slots, max_length, stop
        on_gpu = model.head_weight.device.type == "cuda"
        self.check_every = 8 if on_gpu else 1  # steps between two looks at which sequences have ended
        self.capture = graph_capture if on_gpu else None
        self.kept: tuple[Buffers, Callable[..., None]] | None = None  # of the last call, and their step

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int = 1,
        max_new_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_ids: set[int] | list[int] = (),
        seed: int = 0,
        places: Sequence[int] | None = None,
        stream: Callable[[int, int], object] | None = None,
    ) -> list[Completion]:
        """n completions of each prompt, len(prompts) * n in order. Raises ValueError when a prompt cannot be continued.

        max_new_tokens: one number, or one per prompt. places: the index of each prompt in a larger batch, so that a
        part of the batch draws what the whole would have drawn (default: 0, 1, 2 ...). stream(i, token) is called with
        each token of sequence i as soon as it is drawn.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        self.check(prompts, n, limits, temperature, top_p)
        if not prompts:
            return []
        limits = [min(limit, self.max_length - len(p)) for p, limit in zip(prompts, limits, strict=True)]
        starts = n * np.array(range(len(prompts)) if places is None else places, dtype=np.int64)
        uniforms = counter_uniforms(seed, (starts[:, None] + np.arange(n)).ravel(), max(limits))  # (sequences, longest)
        length = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
        buffers, step = self.buffers(*uniforms.shape, length)
        work = Generation(buffers, prompts, n, limits, uniforms)
        stop = tuple(sorted(stop_ids))
        with packed_weights():
            while True:
                # ---- 1. fill: free slots take waiting sequences; when none waits, the live rows move together ----
                work.fill()
                work.compact()
                if work.live == 0:
                    return work.completions()
                # ---- 2. step: draw a token in every live row and feed it, until it is time to see what has ended ----
                for _ in range(1 if stream else self.check_every):
                    step(work.spans(), temperature, top_p, stop)
                    if stream:
                        now = buffers.slots.first(work.live)
                        for sequence, token in zip(now.sequence.tolist(), now.token.tolist(), strict=True):
                            stream(sequence, token)
                if self.stop:
                    end_at_strings(self.stop, buffers, work.live)
                work.free += buffers.slots.ended[: work.live].nonzero().squeeze(-1).tolist()

    def buffers(self, sequences: int, longest: int, length: int) -> tuple[Buffers, Callable[..., None]]:
        """For so many sequences, of at most `longest` new tokens, and `length` tokens with their prompts; and the step.
        Those of the last call, or larger ones in their place: the first writes to new memory are slow.
        """
        if self.capture:  # few sizes, since each new one needs new graphs
            length = min(2 ** max(6, (length - 1).bit_length()), -(-self.max_length // 64) * 64)
            sequences = 2 ** (sequences - 1).bit_length()
        had = self.kept[0].size if self.kept else (0, 0, 0)
        if (size := tuple(map(max, had, (sequences, longest, length)))) != had:
            self.kept = None  # freed before the larger ones are made
            buffers = Buffers(self.model, rows := min(self.slots, size[0]), *size)
            step = Replay(buffers.step, self.capture(), rows, size[2]) if self.capture else buffers.step
            self.kept = buffers, step
        return self.kept

    def check(self, prompts: list[list[int]], n: int, limits: list[int], temperature: float, top_p: float) -> None:
        least, longest = min(limits, default=1), self.max_length - 1
        if n < 1 or least < 1:
            raise ValueError(f"sampler: n and max_new_tokens must be at least 1, got {n} and {least}")
        if not 0 < top_p <= 1 or not temperature >= 0:
            raise ValueError(f"sampler: need 0 < top_p <= 1 and temperature >= 0, got {top_p} and {temperature}")
        for i, p in enumerate(prompts):
            if not 0 < len(p) <= longest:
                raise ValueError(
                    f"sampler: prompt {i} has {len(p)} tokens; need 1 to {longest} (max_length {self.max_length})"
                )


class Generation:
    """The host's side of one call of `Sampler.generate`. Sequence i is sample i % n of prompt i // n."""

    def __init__(
        self, buffers: Buffers, prompts: list[list[int]], n: int, limits: list[int], uniforms: np.ndarray
    ) -> None:
        self.buffers, self.prompts, self.n, self.limits = buffers, prompts, n, limits
        self.slots, self.cache, self.device = buffers.slots, buffers.cache, buffers.tokens.device
        self.total, longest = uniforms.shape
        buffers.uniforms[: self.total, :longest] = torch.from_numpy(uniforms)
        buffers.slots.sequence.fill_(buffers.sequences)  # all idle, also after a call that was interrupted
        buffers.slots.position.zero_()
        # The prompts that are still to come, in parts that go through the model together.
        self.parts = in_parts([len(p) for p in prompts], PREFILL_WASTE, PREFILL_TOKENS)
        self.waiting: list[tuple[int, int]] = []  # of the newest part: (row of prompt_cache, sequence)
        self.free = list(range(min(len(self.slots.made), self.total)))  # slots that wait for a sequence
        self.live = 0  # slots 0..live-1 take part in a step
        # The host's copy of slots.position. It tells how much of the cache a step must read; to ask a GPU would mean
        # to wait for all steps that it has been given.
        self.position = np.zeros(len(self.free), dtype=np.int64)

    def fill(self) -> None:
        """Free slots take waiting sequences. A prompt is computed once and copied into the slot of each sample."""
        while self.free and (self.waiting or self.parts):
            if not self.waiting:
                part = self.parts.pop(0)
                self.prompt_cache, self.prompt_hidden = prefill(self.buffers.model, [self.prompts[i] for i in part])
                self.waiting = [(row, i * self.n + k) for row, i in enumerate(part) for k in range(self.n)]
            count = min(len(self.free), len(self.waiting))
            self.admit(self.free[:count], *zip(*self.waiting[:count], strict=True))
            self.free, self.waiting = self.free[count:], self.waiting[count:]

    def admit(self, rows: list[int], prompt_rows: tuple[int, ...], sequences: tuple[int, ...]) -> None:
        """Put sequences into slots: the keys and values of their prompts, and a state that begins anew."""
        prompt_of = [i // self.n for i in sequences]
        lengths, T = [len(self.prompts[p]) for p in prompt_of], self.prompt_cache.keys.shape[3]
        target, source = (torch.tensor(i, device=self.device) for i in (rows, prompt_rows))
        self.cache.keys[:, target, :, :T] = self.prompt_cache.keys[:, source]
        self.cache.values[:, target, :, :T] = self.prompt_cache.values[:, source]
        s = self.slots
        s.hidden[target] = self.prompt_hidden[source]
        s.sequence[target] = torch.tensor(sequences, device=self.device)
        s.made[target] = 0
        s.ended[target] = False
        s.position[target] = torch.tensor(lengths, device=self.device)
        s.limit[target] = torch.tensor([self.limits[p] for p in prompt_of], device=self.device)
        self.position[rows] = lengths
        self.live = max(self.live, max(rows) + 1)

    def spans(self) -> list[tuple[int, int]]:
        """How far the live rows read in the next step, which moves all of them by one."""
        self.position = np.minimum(self.position + 1, self.buffers.size[2])
        return similar(self.position[: self.live].tolist(), DECODE_WASTE)

    def compact(self) -> None:
        """When no sequence waits for the slots that are free, the last live rows move into their places."""
        if not self.free:
            return
        free = set(self.free)
        busy = [row for row in range(self.live) if row not in free]
        self.live, self.free = len(busy), []  # no sequence waits, so a freed slot is never used again
        moved = [row for row in busy if row >= self.live]
        holes = [row for row in range(self.live) if row in free]
        if moved:
            source, target = torch.tensor(moved, device=self.device), torch.tensor(holes, device=self.device)
            for state in vars(self.slots).values():
                state[target] = state[source]
            T = int(self.position[moved].max())
            self.cache.keys[:, target, :, :T] = self.cache.keys[:, source, :, :T]
            self.cache.values[:, target, :, :T] = self.cache.values[:, source, :, :T]
            self.position[holes] = self.position[moved]
        self.slots.sequence[self.live :] = self.buffers.sequences  # idle slots write into the spare last row
        self.slots.position[self.live :] = 0  # and read next to nothing

    def completions(self) -> list[Completion]:
        b, total = self.buffers, self.total
        results = (t[:total].tolist() for t in (b.tokens, b.logprobs, b.lengths, b.stopped))
        return [
            Completion(i // self.n, tokens[:k], logprobs[:k], "stop" if stopped else "length")
            for i, (tokens, logprobs, k, stopped) in enumerate(zip(*results, strict=True))
        ]
