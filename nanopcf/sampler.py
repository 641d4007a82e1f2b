"""Batched generation: static KV cache, one prefill a prompt shared by its samples, slots refilled as they finish.

The loop has two phases a step: fill the free slots from the queue, then decode one token in every slot. A slot is a
row of the cache. A prompt's keys and values are computed once and copied into the slot of each of its samples; when
the queue is empty and rows fall idle, the live rows move together so that no work is spent on finished ones.

Randomness is counted, not streamed: token t of sequence i uses the uniform number hash(seed, i, t), so a completion
doesn't depend on which other sequences share the batch, nor on the number of slots (up to the rounding of a matrix
product whose number of rows differs). One uniform a token suffices, by inverting the cumulative distribution.

On a GPU the host never waits for a token: lengths are known without asking, whether answers have ended is asked every
eighth step (what a sequence draws after its end isn't read), and the step is replayed as a CUDA graph, captured at a
few numbers of rows and lengths of the cache.

The log-probs returned are those of the distribution that was sampled (temperature and top-p included), in float32.

Left out: paged memory (a static cache plus refill is a fifth of the code), speculative decoding, beam search.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopcf.model import KVCache, Transformer
from nanopcf.run import machine
from nanopcf.run.cuda_graphs import Replay, graph_capture

PREFILL = 32  # prompts that go through the model together


@dataclass
class Completion:
    prompt_index: int
    tokens: list[int]  # the end token included, when there is one
    logprobs: list[float]  # of each token, under the distribution it was drawn from
    finish_reason: str  # "stop" (an end token) or "length"


def counter_uniforms(seed: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """[len(rows), columns] float32 in [0, 1): entry (i, t) is a hash of (seed, rows[i], t), by the splitmix64 finaliser."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        # mixed first, so that seeds 1 and 2 share nothing
        key = mix(np.array([seed % 2**64], dtype=np.uint64) + step)
        row = mix(key + step * (rows.astype(np.uint64) + np.uint64(1)))[:, None]
        bits = mix(row + step * np.arange(1, columns + 1, dtype=np.uint64))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob: logits [B, V] float32, uniform [B] -> tokens [B], logprobs [B].

    Temperature 0 is greedy (its log-prob is the model's own, at temperature 1). top_p < 1 keeps the smallest set of
    most likely tokens whose mass reaches top_p (Holtzman et al., 2020), renormalised.
    """
    if temperature == 0:
        logprob = logits.log_softmax(-1)
        token = logprob.argmax(-1)
        return token, logprob.gather(-1, token[:, None]).squeeze(-1)
    logprob = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    if top_p < 1:
        ordered, order = logprob.sort(-1, descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        ordered = ordered.masked_fill(mass_before >= top_p, -torch.inf).log_softmax(-1)
        logprob = torch.empty_like(logprob).scatter_(-1, order, ordered)
    cdf = logprob.exp().cumsum(-1)
    # scaled by the last entry, since a float32 sum seldom ends at 1 exactly
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp_(max=logits.shape[-1] - 1)
    return token.squeeze(-1), logprob.gather(-1, token).squeeze(-1)


def slots_that_fit(model: Transformer, length: int) -> int:
    """Sequences of `length` tokens whose keys and values take a quarter of the free memory; 1 to 256."""
    c, dtype = model.config, model.head_weight.dtype
    row = 2 * c.layers * c.kv_heads * c.head_dim * length * dtype.itemsize
    return int(min(256, max(1, machine.free_memory(model.head_weight.device) // 4 // row)))


class Sampler:
    """Generates from `model` with `slots` sequences at a time, prompt and answer within `max_length` tokens."""

    def __init__(self, model: Transformer, *, slots: int, max_length: int) -> None:
        if slots < 1:
            raise ValueError(f"sampler: slots must be at least 1, got {slots}")
        if max_length > model.config.max_length:
            raise ValueError(
                f"sampler: max_length {max_length} is beyond the model's context of {model.config.max_length}"
            )
        self.model, self.slots, self.max_length = model, slots, max_length
        on_gpu = model.head_weight.device.type == "cuda"
        self.every = 8 if on_gpu else 1  # steps between two looks at which answers have ended
        self.capture = graph_capture if on_gpu else None

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
        """n completions of each prompt, len(prompts) * n in order. Raises ValueError on a prompt that can't be continued.

        `max_new_tokens`: for all, or one a prompt. `places`: which prompts of a larger batch these are (default: all), so
        that a part draws what the whole would have.
        stream(i, token) is called with each token of sequence i as soon as it is drawn.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if n < 1 or min(limits, default=1) < 1:
            raise ValueError(f"sampler: n and max_new_tokens must be at least 1, got {n} and {min(limits)}")
        if not 0 < top_p <= 1 or temperature < 0:
            raise ValueError(f"sampler: need 0 < top_p <= 1 and temperature >= 0, got {top_p} and {temperature}")
        for i, p in enumerate(prompts):
            if not 0 < len(p) < self.max_length:
                raise ValueError(
                    f"sampler: prompt {i} has {len(p)} tokens; need 1 to {self.max_length - 1} (max_length {self.max_length})"
                )
        if not prompts:
            return []
        model, device = self.model, self.model.head_weight.device
        total = len(prompts) * n
        slots = min(self.slots, total)
        budget = [min(k, self.max_length - len(p)) for p, k in zip(prompts, limits, strict=True)]
        longest = max(budget)
        # no cache beyond what can be written; on a GPU in whole blocks of the attention kernels
        length = max(len(p) + k for p, k in zip(prompts, budget, strict=True))
        length = -(-length // 64) * 64 if self.capture else length
        first = np.array(range(len(prompts)) if places is None else places, dtype=np.int64) * n
        sequences = (first[:, None] + np.arange(n)).ravel()
        uniforms = torch.from_numpy(counter_uniforms(seed, sequences, longest)).to(device)
        uniforms = F.pad(uniforms, (0, 1, 0, 1))  # for idle rows, and for steps after the last
        stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        # what comes out, filled in place and read once at the end; the last row is that of idle slots
        out_tokens = torch.zeros(total + 1, longest + 1, dtype=torch.long, device=device)
        out_logprobs = torch.zeros(total + 1, longest + 1, device=device)
        out_length = torch.zeros(total + 1, dtype=torch.long, device=device)
        out_stopped = torch.zeros(total + 1, dtype=torch.bool, device=device)

        cache = KVCache(model.config, slots, length, device, model.head_weight.dtype)
        hidden = torch.zeros(slots, model.config.width, device=device, dtype=model.head_weight.dtype)
        sequence = torch.full((slots,), total, device=device)  # which sequence sits in the slot
        made = torch.zeros(slots, dtype=torch.long, device=device)  # tokens it has made
        position = torch.zeros(slots, dtype=torch.long, device=device)  # where its next token will stand
        limit = torch.zeros(slots, dtype=torch.long, device=device)
        ended = torch.zeros(slots, dtype=torch.bool, device=device)
        token = torch.zeros(slots, dtype=torch.long, device=device)  # drawn last

        def step(rows: int, S: int) -> None:
            """Draw a token in rows 0..rows-1 and feed it to the model, which sees S positions. All in place."""
            s, m, at = sequence[:rows], made[:rows].clamp(max=longest), position[:rows].clamp(max=length - 1)
            token[:rows], logprob = sample(model.logits(hidden[:rows]), uniforms[s, m], temperature, top_p)
            out_tokens[s, m], out_logprobs[s, m] = token[:rows], logprob
            stopped = (token[:rows, None] == stop).any(-1)  # torch.isin may sort, and wait for the GPU
            now = (stopped | (m + 1 >= limit[:rows])) & ~ended[:rows]
            out_length[s] = torch.where(now, m + 1, out_length[s])
            out_stopped[s] = torch.where(now, stopped, out_stopped[s])
            ended[:rows] |= now
            # (a row that has ended is fed too: it is refilled before anyone reads it)
            hidden[:rows] = model(token[:rows, None], positions=at[:, None], kv_cache=cache, length=S)[:, 0]
            made[:rows] += 1
            position[:rows] += 1

        replay = Replay(step, self.capture(), slots, length) if self.capture else step
        every = 1 if stream else self.every
        queue = deque(range(total))
        prefilled = range(0)  # prompts whose keys and values wait in `scratch`
        free = list(range(slots))
        live = 0  # rows 0..live-1 of the cache are in use
        top = [0] * slots  # host's copy of `position`
        while queue or live:
            # ---- 1. fill the free slots ----
            while free and queue:
                first = queue[0] // n
                if first not in prefilled:
                    prefilled = range(first, min(first + slots, len(prompts)))
                    scratch, last_hidden = self._prefill([prompts[i] for i in prefilled])
                take = min(len(free), len(queue), (prefilled.stop - first) * n - queue[0] % n)
                ids = [queue.popleft() for _ in range(take)]
                chosen = [free.pop(0) for _ in range(take)]
                rows = torch.tensor(chosen, device=device)
                source = torch.tensor([i // n - prefilled.start for i in ids], device=device)
                width = max(len(prompts[i // n]) for i in ids)
                cache.keys[:, rows, :, :width] = scratch.keys[:, source, :, :width]
                cache.values[:, rows, :, :width] = scratch.values[:, source, :, :width]
                hidden[rows] = last_hidden[source]
                sequence[rows] = torch.tensor(ids, device=device)
                made[rows] = 0
                ended[rows] = False
                for row, i in zip(chosen, ids, strict=True):
                    top[row] = len(prompts[i // n])
                position[rows] = torch.tensor([top[row] for row in chosen], device=device)
                limit[rows] = torch.tensor([budget[i // n] for i in ids], device=device)
                live = max(live, max(chosen) + 1)
            if free:  # the queue is empty: the last rows at work move into the idle ones' places
                busy = sorted(set(range(live)) - set(free))
                live, free = len(busy), []
                if live == 0:
                    break
                moved = [row for row in busy if row >= live]
                holes = sorted(set(range(live)) - set(busy))
                if moved:
                    source, target = torch.tensor(moved, device=device), torch.tensor(holes, device=device)
                    for state in (hidden, sequence, made, position, limit, ended):
                        state[target] = state[source]
                    S = max(top[row] for row in moved)
                    cache.keys[:, target, :, :S] = cache.keys[:, source, :, :S]
                    cache.values[:, target, :, :S] = cache.values[:, source, :, :S]
                    for row, hole in zip(moved, holes, strict=True):
                        top[hole] = top[row]
                sequence[live:] = total

            # ---- 2. draw and feed, until it is time to look which answers have ended ----
            for _ in range(every):
                replay(live, min(length, max(top[:live]) + 1))
                top = [p + 1 for p in top]
                if stream:
                    for i, t in zip(sequence[:live].tolist(), token[:live].tolist(), strict=True):
                        stream(i, t)
            free += ended[:live].nonzero().squeeze(-1).tolist()

        tokens, logprobs = out_tokens.tolist(), out_logprobs.tolist()
        return [
            Completion(i // n, tokens[i][:k], logprobs[i][:k], "stop" if stopped else "length")
            for i, (k, stopped) in enumerate(zip(out_length.tolist()[:-1], out_stopped.tolist()[:-1], strict=True))
        ]

    def _prefill(self, prompts: list[list[int]]) -> tuple[KVCache, Tensor]:
        """Keys and values of prompts (padded on the right) and the hidden state of each one's last token [P, D]."""
        model, device = self.model, self.model.head_weight.device
        width = max(map(len, prompts))
        cache = KVCache(model.config, len(prompts), width, device, model.head_weight.dtype)
        last = torch.zeros(len(prompts), model.config.width, device=device, dtype=model.head_weight.dtype)
        # prompts of like lengths together: little padding
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for part in (order[i : i + PREFILL] for i in range(0, len(order), PREFILL)):
            lengths = [len(prompts[i]) for i in part]
            W = max(lengths)
            tokens = torch.tensor([prompts[i] + [0] * (W - len(prompts[i])) for i in part], device=device)
            own = KVCache(model.config, len(part), W, device, model.head_weight.dtype)
            hidden = model(
                tokens, positions=torch.arange(W, device=device).expand(len(part), W), kv_cache=own, length=W
            )
            rows = torch.tensor(part, device=device)
            cache.keys[:, rows, :, :W], cache.values[:, rows, :, :W] = own.keys, own.values
            last[rows] = hidden[torch.arange(len(part), device=device), torch.tensor(lengths, device=device) - 1]
        return cache, last
