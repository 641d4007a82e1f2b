"""Strings that end a response: in the sampler, an evaluation and a run of RL."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import character_tokenizer, write_rows

import train_rl
from nanopcf import evaluate
from nanopcf.rewards import final_answer
from nanopcf.sampler import Sampler
from nanopcf.stopping import StopStrings

TOKENIZER = character_tokenizer()


def stops(*strings: str) -> StopStrings:
    return StopStrings(strings, TOKENIZER.decode)


def test_where_a_response_ends():
    tokens = TOKENIZER.encode("12=34=56*78")
    assert stops("=5").found(tokens[:7]) and not stops("=5").found(tokens[:6])
    assert stops("*7", "=3").length(tokens) == 4  # the first one that is complete
    assert stops("*7", "=3").text(tokens) == "12" and stops("9").text(tokens) == "12=34=56*78"
    assert not stops() and not stops().found(tokens) and stops().text(tokens) == "12=34=56*78"
    with pytest.raises(ValueError, match="--stop needs strings that aren't empty"):
        stops("")


def test_a_closing_tag_stays():
    words = ["<answer>", "7", "</answer>", "\n", "Question:"]
    tags = StopStrings(("</answer>", "Question:"), lambda tokens: "".join(words[t] for t in tokens))
    assert tags.text([0, 1, 2]) == "<answer>7</answer>" and tags.text([1, 3, 4]) == "7\n"
    assert tags.length([0, 1, 2, 3, 4]) == 3


@pytest.mark.parametrize(
    ("prompt", "response", "judged"),
    [
        ("<a><think>\n", "maybe \\boxed{5}", ""),
        ("<a><think>\n", "maybe \\boxed{4}</think>\\boxed{5}", "5"),
        ("<a>[THINK]", "maybe \\boxed{5}", ""),
        ("<a><|begin_of_thought|>", "maybe \\boxed{5}", ""),
        ("<a><think>\n\n</think>\n\n", "\\boxed{5}", "5"),
        ("<a><b>", "\\boxed{5}", "5"),
    ],
)
def test_thoughts_that_the_prompt_has_opened(prompt, response, judged):
    """Without its tag one couldn't tell that a response was cut off within its thoughts."""
    letters = StopStrings((), lambda tokens: "".join(map(chr, tokens)))
    assert final_answer(letters.response([*map(ord, prompt)], [*map(ord, response)])) == judged


@pytest.mark.parametrize(("slots", "check_every"), [(1, 1), (4, 1), (64, 1), (4, 8)])
def test_the_sampler_stops_there(model, slots, check_every):
    """Each completion is the one without strings, up to the token that completes a string, wherever the sampler looks;
    the sequences that take freed slots are drawn as before."""
    prompts = [torch.randint(0, 16, (5,)).tolist() for _ in range(6)]
    options = dict(n=3, max_new_tokens=20, temperature=1.5, stop_ids=TOKENIZER.stop_ids, seed=3)
    free = Sampler(model, slots=64, max_length=64).generate(prompts, **options)
    text = TOKENIZER.decode(free[0].tokens)
    strings = (text[4:6], "1", "00")
    sampler = Sampler(model, slots=slots, max_length=64, stop=stops(*strings))
    sampler.check_every = check_every
    stopped = sampler.generate(prompts, **options)
    shorter = 0
    for a, b in zip(free, stopped, strict=True):
        ends = [k for k in range(1, len(a.tokens) + 1) if any(s in TOKENIZER.decode(a.tokens[:k]) for s in strings)]
        count = ends[0] if ends else len(a.tokens)
        shorter += count < len(a.tokens)
        assert b.tokens == a.tokens[:count] and b.logprobs == pytest.approx(a.logprobs[:count], abs=2e-5)
        assert b.finish_reason == ("stop" if ends else a.finish_reason)
    assert shorter > 5


def test_evaluation_and_rollouts_stop(model_dir, rl, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [dict(prompt=f"{i}+{i}=", answer="1") for i in range(6)])
    c = evaluate.EvaluateConfig(
        model=str(model_dir), data=(data,), out=str(tmp_path / "out"), samples=4, max_new_tokens=12, temperature=1.5,
        stop=("1", "2="), device="cpu",
    )  # fmt: skip
    evaluate.main(c)
    rows = [json.loads(line) for line in (tmp_path / "out" / "d.jsonl").read_text().splitlines()]
    assert not any(s in text for row in rows for text in row["completions"] for s in c.stop)
    with pytest.raises(ValueError, match="--stop needs strings that aren't empty"):
        evaluate.main(replace(c, stop=("",), out=""))

    train_rl.main(replace(rl, stop=("0", "1", "2", "3"), max_new_tokens=12, steps=2))
    rows = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    shares = [row["truncated_share"] for row in rows if "truncated_share" in row]
    assert shares and max(shares) < 0.5  # without the strings nearly all come to the limit
