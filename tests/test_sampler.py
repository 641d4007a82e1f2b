"""What is drawn does not depend on slots, batches or refills, and its log-probs are the model's."""

import gc
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

import nanopcf.model
from nanopcf.model import Transformer
from nanopcf.padding import similar
from nanopcf.run import machine
from nanopcf.sampler import Buffers, Replay, Sampler, counter_uniforms, sample


def greedy_by_hand(model, prompt: list[int], count: int, stop: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax()))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def interrupt(sequence: int, token: int) -> None:
    raise KeyboardInterrupt


def random_prompts(count: int) -> list[list[int]]:
    return [torch.randint(0, 16, (int(n),)).tolist() for n in torch.randint(1, 15, (count,))]


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_equals_full_forward_without_a_cache(model, slots):
    """Cache, shared prefill, refill and compaction together against the model run from scratch for every token."""
    prompts = random_prompts(7)
    completions = Sampler(model, slots=slots, max_length=64).generate(
        prompts, n=2, max_new_tokens=12, temperature=0.0, stop_ids=[3]
    )
    assert [c.prompt_index for c in completions] == [i for i in range(7) for _ in range(2)]
    for c in completions:
        expected = greedy_by_hand(model, prompts[c.prompt_index], 12, stop=3)
        assert c.tokens == expected
        assert c.finish_reason == ("stop" if expected[-1] == 3 else "length")


def test_completion_does_not_depend_on_what_shares_the_batch(model):
    """Refilled slot == fresh slot; mixed batch == one at a time; a slot's old keys don't leak."""
    prompts = random_prompts(9)
    options = dict(n=3, max_new_tokens=10, temperature=0.8, stop_ids=[3], seed=5)
    wide = Sampler(model, slots=100, max_length=64).generate(prompts, **options)
    narrow = Sampler(model, slots=4, max_length=64).generate(prompts, **options)
    assert [c.tokens for c in wide] == [c.tokens for c in narrow]
    assert len({len(c.tokens) for c in wide}) > 2  # lengths differ, so slots were refilled at different times


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_the_model_gives_to_the_sampled_tokens(model, temperature):
    """Sampled distribution == scored distribution, the end token included."""
    prompts = random_prompts(5)
    completions = Sampler(model, slots=3, max_length=64).generate(
        prompts, n=2, max_new_tokens=8, temperature=temperature, stop_ids=[3]
    )
    for c in completions:
        tokens = prompts[c.prompt_index] + c.tokens
        logits = model.logits(model(torch.tensor([tokens]))[0]).double() / temperature
        expected = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]][-len(c.tokens) :]
        np.testing.assert_allclose(c.logprobs, expected.detach().numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("p", "top_p", "kept"),
    [
        ((0.5, 0.3, 0.1, 0.1), 0.8, 2),
        ((0.1, 0.3, 0.1, 0.5), 0.8, 2),
        ((0.5, 0.3, 0.1, 0.1), 0.9, 3),
        ((0.5, 0.3, 0.1, 0.1), 0.81, 3),
        ((0.25, 0.25, 0.25, 0.25), 0.5, 2),
        ((0.7, 0.1, 0.1, 0.1), 0.7, 1),
        ((0.6, 0.2, 0.1, 0.1), 0.8, 2),
    ],
)
def test_the_nucleus_ends_where_its_sum_reaches_top_p(p, top_p, kept):
    """0.5 + 0.3 is 0.79999995 in float32, which is no reason for a third token."""
    uniform = torch.linspace(0, 0.9999, 2000)
    token, logprob = sample(torch.tensor(p).log().expand(2000, 4), uniform, 1.0, top_p)
    assert len(token.unique()) == kept
    mass = sum(sorted(p)[-kept:])
    torch.testing.assert_close(logprob, (torch.tensor(p) / mass).log()[token], atol=1e-5, rtol=1e-5)


def test_frequencies_follow_the_distribution():
    """40,000 draws against softmax and against the nucleus by brute force (4 standard deviations of room)."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])
    uniform = torch.from_numpy(counter_uniforms(1, np.arange(40_000), 1))[:, 0]
    for top_p in (1.0, 0.75):
        p = logits.double().softmax(0)
        if top_p < 1:
            kept, mass = [], 0.0
            for i in p.argsort(descending=True).tolist():
                if mass >= top_p:
                    break
                kept.append(i)
                mass += p[i].item()
            p = torch.zeros_like(p).index_copy(0, torch.tensor(kept), p[kept]) / mass
        token, logprob = sample(logits.expand(40_000, 6), uniform, 1.0, top_p)
        seen = torch.bincount(token, minlength=6).double() / 40_000
        assert ((seen - p).abs() <= 4 * (p * (1 - p) / 40_000).sqrt()).all()
        torch.testing.assert_close(logprob.double(), p[token].log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [5000, 9 * 512])
def test_a_large_vocabulary_is_drawn_from_in_two_levels(words):
    """The word at the same place of the cumulative sum in float64, but where the place is on the edge by rounding; and
    never one of probability 0, which nearly all are here."""
    logits = torch.randn(4000, words) * 3
    logits[:, torch.randperm(words)[: words - 40]] = -torch.inf
    uniform = torch.rand(4000)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    token, logprob = sample(logits, uniform, 1.0, 1.0)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    assert torch.isfinite(logprob).all()
    at = uniform.double()[:, None]
    assert (cumulative.gather(-1, token[:, None]) >= at - 1e-6).all()
    before = cumulative.gather(-1, token[:, None]) - logprob.double().exp()[:, None]
    assert (before <= at + 1e-6).all()
    token, logprob = sample(torch.full((1, words), torch.nan), uniform[:1], 1.0, 1.0)  # the caller stops at the NaN
    assert token.item() < words and logprob.isnan()


def test_seed_changes_the_samples_and_nothing_else_does(model):
    prompts = random_prompts(6)
    sampler = Sampler(model, slots=4, max_length=64)

    def run(seed: int) -> list[list[int]]:
        return [c.tokens for c in sampler.generate(prompts, max_new_tokens=9, seed=seed)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_uniforms_are_uniform_and_independent():
    u = counter_uniforms(7, np.arange(300), 200)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    correlation = [np.corrcoef(u[:-1].ravel(), u[1:].ravel()), np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())]
    assert max(abs(c[0, 1]) for c in correlation) < 0.02
    # entry (i, t) is the same whatever the table's size
    assert np.array_equal(counter_uniforms(7, np.array([9, 3]), 50), u[[9, 3], :50])
    assert not np.isin(counter_uniforms(8, np.arange(300), 200), u).mean() > 0.05


def test_limits(model):
    sampler = Sampler(model, slots=2, max_length=20)
    (c,) = sampler.generate([[1] * 15], max_new_tokens=50, stop_ids=[])
    assert len(c.tokens) == 5 and c.finish_reason == "length"  # what fits in max_length
    assert sampler.generate([], max_new_tokens=3) == []
    with pytest.raises(ValueError, match="prompt 1 has 20 tokens"):
        sampler.generate([[1], [1] * 20], max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        sampler.generate([[]], max_new_tokens=3)
    with pytest.raises(ValueError, match="beyond the model's context"):
        Sampler(model, slots=2, max_length=65)


@pytest.mark.parametrize(
    ("lengths", "new"), [([16] * 63 + [2000], [8] * 64), ([16, 2000] * 16, [8] * 32), ([20] * 64, [200] + [9] * 63)]
)
def test_short_sequences_do_not_pay_for_a_long_one(tiny_config, monkeypatch, lengths, new):
    """Tokens that the prefill computes and positions that decoding reads, against what the sequences really have."""
    model = Transformer(replace(tiny_config, layers=1, max_length=2100))
    tokens, positions, one_token = [], [], nanopcf.model.attend_one_token
    model.embedding.register_forward_hook(lambda _, inputs, output: tokens.append(inputs[0].numel()))

    def read(q, k, v, mask):
        positions.append(k.shape[0] * k.shape[2])
        return one_token(q, k, v, mask)

    monkeypatch.setattr(nanopcf.model, "attend_one_token", read)
    prompts = [[1 + i % 9] * n for i, n in enumerate(lengths)]
    got = Sampler(model, slots=64, max_length=2100).generate(prompts, max_new_tokens=new, seed=1)
    assert sum(tokens) - sum(new) <= sum(lengths) + 256
    needed = sum(n + t + 1 for n, count in zip(lengths, new, strict=True) for t in range(count))
    assert needed <= sum(positions) <= needed + 1024 * max(new)
    (alone,) = Sampler(model, slots=1, max_length=2100).generate(prompts[:1], max_new_tokens=new[0], seed=1)
    assert got[0].tokens == alone.tokens


def test_what_shares_a_length():
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    for waste, most in ((0, np.inf), (100, np.inf), (1000, 700), (10**9, np.inf)):
        groups, left = similar(lengths, waste, most), list(lengths)
        for count, longest in groups:
            part, left = left[:count], left[count:]
            assert longest == max(part) and count * longest - sum(part) <= waste
            assert count * longest <= most or count == 1
        assert not left
    assert similar([5, 5, 5], 0) == [(3, 5)] and similar(lengths, 10**9) == [(200, max(lengths))]


@pytest.mark.parametrize(("slots", "n"), [(8, 3), (3, 2), (1, 1)])
def test_the_schedule_of_a_gpu_draws_the_same(model, slots, n):
    """A look at every eighth step, and steps replayed with rounded rows and lengths: rows that are idle or have ended
    draw on, and nothing of that shows in the results. The capture here only calls the step again, as a replay would."""
    prompts = [[1], [2, 3, 4, 5, 6], [7] * 20, [8, 9], [5] * 11]
    options = dict(n=n, max_new_tokens=[20, 30, 7, 1, 25], temperature=1.0, stop_ids=[3, 9], seed=5)
    want = Sampler(model, slots=slots, max_length=64).generate(prompts, **options)
    sampler = Sampler(model, slots=slots, max_length=64)
    captures = []
    sampler.check_every, sampler.capture = 8, lambda: lambda work: captures.append(1) or work
    got = sampler.generate(prompts, **options)
    assert [(c.tokens, c.finish_reason) for c in got] == [(c.tokens, c.finish_reason) for c in want]
    for a, b in zip(got, want, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert 0 < len(captures) <= 4 * 2  # a few rows, one or two lengths
    # Later calls replay what has been captured, and nothing of an earlier or interrupted one shows in them.
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(prompts, stream=interrupt, **options | dict(max_new_tokens=30))
    few = len(captures)
    assert sampler.generate(prompts, **options) == sampler.generate(prompts, **options) == got
    assert len(captures) <= few + 2
    alone = Sampler(model, slots=slots, max_length=64).generate(prompts[:2], stop_ids=[9], max_new_tokens=9)
    assert [c.tokens for c in sampler.generate(prompts[:2], stop_ids=[9], max_new_tokens=9)] == [
        c.tokens for c in alone
    ]
    if slots > 1:
        assert {c.finish_reason for c in want} == {"stop", "length"} and len({len(c.tokens) for c in want}) > 3


def test_rows_that_have_ended_stay_within_the_context(tiny_config):
    """On a GPU the cache's length is rounded up to a multiple of 64, here past a context of 40. Rows that have ended
    step on until the next look, and must not reach positions that have no rotary angle."""
    torch.manual_seed(0)
    model = Transformer(replace(tiny_config, max_length=40))
    prompts = [[1] * 38, [2] * 5, [3] * 30]
    options = dict(n=2, max_new_tokens=40, stop_ids=[], seed=5)
    want = Sampler(model, slots=4, max_length=40).generate(prompts, **options)
    sampler = Sampler(model, slots=4, max_length=40)
    sampler.check_every, sampler.capture = 8, lambda: lambda work: work
    got = sampler.generate(prompts, **options)
    assert [(c.tokens, c.finish_reason) for c in got] == [(c.tokens, c.finish_reason) for c in want]
    assert [len(c.tokens) for c in got] == [2, 2, 35, 35, 10, 10]


def test_buffers_that_are_kept_show_nothing_of_an_earlier_call(model):
    sampler, prompts = Sampler(model, slots=3, max_length=64), [[1], [2, 3, 4, 5, 6], [7] * 20, [8, 9]]
    few = dict(n=1, max_new_tokens=9, stop_ids=[3], seed=1)
    many = dict(n=2, max_new_tokens=[40, 30, 7, 1], stop_ids=[3, 9], seed=2)

    def interrupt_late(sequence: int, token: int) -> None:
        if sequence > 3:  # half of the sequences are done
            raise KeyboardInterrupt

    for options in (few, many, few, many):
        got, want = (s.generate(prompts, **options) for s in (sampler, Sampler(model, slots=3, max_length=64)))
        assert [(c.tokens, c.finish_reason) for c in got] == [(c.tokens, c.finish_reason) for c in want]
        for a, b in zip(got, want, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        buffers = sampler.kept[0]
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(prompts, stream=interrupt_late, **many)
    assert sampler.kept[0] is buffers and buffers.cache.keys.shape[1] == 3
    sampler = Sampler(model, slots=100, max_length=64)
    for count, rows in ((2, 2), (5, 5), (3, 5)):
        sampler.generate([[1]] * count, max_new_tokens=5)
        assert sampler.kept[0].cache.keys.shape[1] == rows


def test_larger_buffers_take_the_place_of_the_old_ones(model):
    """A GPU cannot hold two caches: the old one is gone before the new one is made, and no reference cycle keeps either
    until Python's collector comes by."""
    sampler, made = Sampler(model, slots=2, max_length=64), []

    def buffers_of(*arguments):
        assert not any(buffers() for buffers in made)
        made.append(weakref.ref(new := Buffers(*arguments)))
        return new

    sampler.check_every, sampler.capture = 8, lambda: lambda work: work
    with mock.patch("nanopcf.sampler.Buffers", buffers_of):
        gc.disable()
        try:
            for count in (1, 3, 2, 5):
                sampler.generate([[1]] * count, max_new_tokens=20)
            del sampler
            assert len(made) == 3 and not any(buffers() for buffers in made)
        finally:
            gc.enable()


def test_steps_of_many_lengths_are_few_captures():
    """Every request is covered, and above 512 positions at most a quarter of the work is wasted."""
    covered = []
    replay = Replay(lambda spans: covered.append(spans[0]), lambda work: work, slots=24, length=5000)
    for live, S in [(24, 1), (13, 64), (12, 65), (7, 700), (3, 4095), (1, 4999)] + [(24, s) for s in range(600, 5000)]:
        replay([(live, S)])
        rows, length = covered[-1]
        assert live <= rows < 2 * live and S <= length <= max(S + 63, 1.25 * S)
    assert len({s for _, s in covered if s > 512}) <= 16


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gpu_draws_what_the_cpu_draws(model, temperature):
    """The captured step. In float32: the same tokens, with refilled slots. In bfloat16, which flash attention decodes,
    also compiled: log-probs of its own logits."""
    prompts = random_prompts(9)
    options = dict(n=3, max_new_tokens=20, temperature=temperature, stop_ids=[3], seed=5)
    want = Sampler(model, slots=8, max_length=64).generate(prompts, **options)
    got = Sampler(model.cuda(), slots=8, max_length=64).generate(prompts, **options)
    assert [(c.tokens, c.finish_reason) for c in got] == [(c.tokens, c.finish_reason) for c in want]
    for a, b in zip(got, want, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    completions = Sampler(model.bfloat16(), slots=8, max_length=64).generate(prompts, **options)
    machine.compile_blocks(model)
    completions += Sampler(model, slots=8, max_length=64).generate(prompts, **options)
    for c in completions:
        tokens = torch.tensor(prompts[c.prompt_index] + c.tokens, device="cuda")
        hidden = model(tokens[None])[0, :-1]
        expected = model.logits(hidden).log_softmax(-1).gather(-1, tokens[1:, None])[-len(c.tokens) :, 0]
        np.testing.assert_allclose(c.logprobs, expected.tolist(), atol=0.15)
