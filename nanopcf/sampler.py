"""Batched generation: static KV cache, one prefill a prompt shared by its samples, slots refilled as they finish.

The loop has two phases a step: fill the free slots from the queue, then decode one token in every slot. A slot is a
row of the cache. A prompt's keys and values are computed once and copied into the slot of each of its samples; when
the queue is empty and rows fall idle, the live rows move together so that no work is spent on finished ones.

Randomness is counted, not streamed: token t of sequence i uses the uniform number hash(seed, i, t), so a completion
doesn't depend on which other sequences share the batch, nor on the number of slots (up to the rounding of a matrix
product whose number of rows differs). One uniform a token suffices, by inverting the cumulative distribution.

The log-probs returned are those of the distribution that was sampled (temperature and top-p included), in float32.

Left out: paged memory (a static cache plus refill is a fifth of the code), speculative decoding, beam search.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanopcf import runs
from nanopcf.model import KVCache, Transformer


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
        key = mix(
            np.array([seed % 2**64], dtype=np.uint64) + step
        )  # mixed first, so seeds 1 and 2 share nothing
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
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp_(
        max=logits.shape[-1] - 1
    )
    return token.squeeze(-1), logprob.gather(-1, token).squeeze(-1)


def slots_that_fit(model: Transformer, length: int) -> int:
    """Sequences of `length` tokens whose keys and values take a quarter of the free memory; 1 to 256."""
    c, dtype = model.config, model.head_weight.dtype
    row = 2 * c.layers * c.kv_heads * c.head_dim * length * dtype.itemsize
    return int(min(256, max(1, runs.free_memory(model.head_weight.device) // 4 // row)))


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
        progress: Callable[[int], object] | None = None,
        stream: Callable[[int, int], object] | None = None,
    ) -> list[Completion]:
        """n completions of each prompt, len(prompts) * n in order. Raises ValueError on a prompt that can't be continued.

        `max_new_tokens`: for all, or one a prompt. `places`: which prompts of a larger batch these are (default: all), so that a part draws what the whole would have.
        progress(k) is called with the number of sequences that ended in a step, stream(i, token) with each token of
        sequence i as soon as it is drawn.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if n < 1 or min(limits, default=1) < 1:
            raise ValueError(f"sampler: n and max_new_tokens must be at least 1, got {n} and {min(limits)}")
        if not 0 < top_p <= 1 or temperature < 0:
            raise ValueError(
                f"sampler: need 0 < top_p <= 1 and temperature >= 0, got {top_p} and {temperature}"
            )
        for i, p in enumerate(prompts):
            if not 0 < len(p) < self.max_length:
                raise ValueError(
                    f"sampler: prompt {i} has {len(p)} tokens; need 1 to {self.max_length - 1} (max_length {self.max_length})"
                )
        model, device = self.model, self.model.head_weight.device
        total = len(prompts) * n
        slots = min(self.slots, total)
        budget = [min(k, self.max_length - len(p)) for p, k in zip(prompts, limits, strict=True)]
        longest_answer = max(budget, default=0)
        # no cache beyond what can be written
        length = max((len(p) + k for p, k in zip(prompts, budget, strict=True)), default=1)
        first = np.array(range(len(prompts)) if places is None else places, dtype=np.int64) * n
        sequences = (first[:, None] + np.arange(n)).ravel()
        uniforms = torch.from_numpy(counter_uniforms(seed, sequences, longest_answer)).to(device)
        stop = torch.tensor(sorted(stop_ids), device=device)
        # what comes out, filled in place; read once at the end
        out_tokens = torch.zeros(total, longest_answer, dtype=torch.long, device=device)
        out_logprobs = torch.zeros(total, longest_answer, device=device)
        out_length, out_stopped = [0] * total, [False] * total

        cache = KVCache(model.config, slots, length, device, model.head_weight.dtype)
        hidden = torch.zeros(slots, model.config.width, device=device, dtype=model.head_weight.dtype)
        sequence = torch.zeros(slots, dtype=torch.long, device=device)  # which sequence sits in the slot
        made = torch.zeros(slots, dtype=torch.long, device=device)  # tokens it has made
        position = torch.zeros(slots, dtype=torch.long, device=device)  # where its next token will stand
        limit = torch.zeros(slots, dtype=torch.long, device=device)

        queue = deque(range(total))
        prefilled = range(0)  # prompts whose keys and values wait in `scratch`
        free = list(range(slots))
        live = 0  # rows 0..live-1 of the cache are in use
        while queue or live:
            # ---- 1. fill the free slots ----
            while free and queue:
                first = queue[0] // n
                if first not in prefilled:
                    prefilled = range(first, min(first + slots, len(prompts)))
                    scratch, last_hidden = self._prefill([prompts[i] for i in prefilled])
                take = min(len(free), len(queue), (prefilled.stop - first) * n - queue[0] % n)
                ids = [queue.popleft() for _ in range(take)]
                rows = torch.tensor([free.pop(0) for _ in range(take)], device=device)
                source = torch.tensor([i // n - prefilled.start for i in ids], device=device)
                width = scratch.keys.shape[3]
                cache.keys[:, rows, :, :width] = scratch.keys[:, source]
                cache.values[:, rows, :, :width] = scratch.values[:, source]
                hidden[rows] = last_hidden[source]
                sequence[rows] = torch.tensor(ids, device=device)
                made[rows] = 0
                position[rows] = torch.tensor([len(prompts[i // n]) for i in ids], device=device)
                limit[rows] = torch.tensor([budget[i // n] for i in ids], device=device)
                live = max(live, int(rows.max()) + 1)
            if free:  # the queue is empty: the last rows at work move into the idle ones' places
                busy = sorted(set(range(live)) - set(free))
                live, free = len(busy), []
                if live == 0:
                    break
                moved = [row for row in busy if row >= live]
                if moved:
                    source = torch.tensor(moved, device=device)
                    target = torch.tensor(sorted(set(range(live)) - set(busy)), device=device)
                    for state in (hidden, sequence, made, position, limit):
                        state[target] = state[source]
                    S = int(position[:live].max())
                    cache.keys[:, target, :, :S] = cache.keys[:, source, :, :S]
                    cache.values[:, target, :, :S] = cache.values[:, source, :, :S]

            # ---- 2. draw a token in every slot ----
            s, m = sequence[:live], made[:live]
            token, logprob = sample(model.logits(hidden[:live]), uniforms[s, m], temperature, top_p)
            out_tokens[s, m], out_logprobs[s, m] = token, logprob
            if stream:
                for i, t in zip(s.tolist(), token.tolist(), strict=True):
                    stream(i, t)
            m += 1
            stopped = torch.isin(token, stop)
            ended = stopped | (m >= limit[:live])
            if ended.any():
                done = ended.nonzero().squeeze(-1).tolist()
                for row, i, k, was_stop in zip(
                    done, s[ended].tolist(), m[ended].tolist(), stopped[ended].tolist(), strict=True
                ):
                    out_length[i], out_stopped[i] = k, was_stop
                    free.append(row)
                if progress:
                    progress(len(done))
            # ---- 3. feed it to the model ----
            # (a slot that just ended is fed too: it is refilled before anyone reads it)
            at = position[:live].clamp(max=length - 1)
            hidden[:live] = model(token[:, None], positions=at[:, None], kv_cache=cache)[:, 0]
            position[:live] += 1

        tokens, logprobs = out_tokens.tolist(), out_logprobs.tolist()
        return [
            Completion(i // n, tokens[i][:k], logprobs[i][:k], "stop" if out_stopped[i] else "length")
            for i, k in enumerate(out_length)
        ]

    def _prefill(self, prompts: list[list[int]]) -> tuple[KVCache, Tensor]:
        """Keys and values of prompts (padded on the right) and the hidden state of each one's last token [P, D]."""
        model, device = self.model, self.model.head_weight.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max())
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
        positions = torch.arange(width, device=device).expand(len(prompts), width)
        cache = KVCache(model.config, len(prompts), width, device, model.head_weight.dtype)
        hidden = model(tokens, positions=positions, kv_cache=cache)
        return cache, hidden[torch.arange(len(prompts), device=device), lengths - 1]
