"""Makes docs/walkthrough.md: one problem through a whole RL step, an SFT row and a tile of the head, with numbers.

    python docs/walkthrough.py            prints the page; --write replaces docs/walkthrough.md

Every number comes from the functions that training calls, on a model of 1 layer and width 8 whose weights are drawn
from a fixed seed. tests/test_walkthrough.py makes the page again and compares.
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import kernels
import train_rl
from nanopcf.model import ModelConfig, Transformer
from nanopcf.objectives import rl_loss, token_terms, token_weights
from nanopcf.optim import Optimizer
from nanopcf.packing import Sequence, pack, token_logprobs, trained_hidden
from nanopcf.rollouts import Problem
from nanopcf.sampler import Sampler
from nanopcf.tokenizer import word_tokenizer

TOKENIZER = word_tokenizer("0123456789+-*=_")  # one token per word, and the end token
PROMPT, ANSWER = "7 + 8 =", "5"
LR = 0.01
WORD, CHANNEL = "5", 0  # the one weight that is followed: the head's row of this word, at this channel


def tiny_model() -> Transformer:
    """NumPy draws the weights, since its generator gives the same numbers everywhere."""
    shape = dict(vocab_size=16, width=8, layers=1, heads=2, kv_heads=1, mlp_width=16, max_length=32, tied=False)
    model, rng = Transformer(ModelConfig(**shape)), np.random.default_rng(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.from_numpy(rng.normal(size=p.shape) * 2 * p.shape[1] ** -0.5))
    return model


def word(token: int) -> str:
    return f"`{TOKENIZER.tokenizer.id_to_token(token)}`"


def function(name: str, file: str) -> str:
    return f"[`{name}`](../{file})"


def table(head: list[str], rows: list[list]) -> str:
    cells = [[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rl_step() -> str:
    """Roll out, judge, update: a group of four on one problem, as train_rl.py does it."""
    model = tiny_model()
    c = train_rl.RLConfig(
        model="-", train="-", val="-", out="-", algo="dapo_dc", prompts=1, update_prompts=1, round_prompts=1, group=4,
        max_new_tokens=3, pack_length=16, seed=8,
    )  # fmt: skip
    problems = [Problem(TOKENIZER.encode(PROMPT), ANSWER)]
    sampler = Sampler(model, slots=4, max_length=32)
    _, groups, _ = train_rl.collect(sampler, TOKENIZER, problems, 0, 0.0, c)
    batch = train_rl.judge(groups, model, model, c, require_finite=lambda *_: None)
    texts = [[word(t) for t in r.tokens] for r in groups[0].rollouts]
    answers = [
        [
            f"{i}",
            " ".join(texts[i]),
            "yes" if r.truncated else "no",
            float(batch.rewards[i]),
            float(batch.advantages[i]),
        ]
        for i, r in enumerate(groups[0].rollouts)
    ]

    weights = token_weights(batch.lengths, c.recipe.aggregation, c.max_new_tokens)
    terms = token_terms(c.recipe, batch, None, c.max_new_tokens)
    rows = pack(batch.sequences, c.pack_length)
    logprobs, _ = token_logprobs(model, rows, c.micro_rows, c.temperature)
    leaf = logprobs.clone().requires_grad_()
    losses = [
        rl_loss(leaf[i], None, torch.zeros(()), *(t[i] for t in terms), recipe=c.recipe) for i in range(len(leaf))
    ]
    (slopes,) = torch.autograd.grad(sum(losses), leaf)
    owner = torch.repeat_interleave(torch.arange(4), batch.lengths).tolist()
    tokens = [t for r in groups[0].rollouts for t in r.tokens]
    per_token = [
        [str(owner[i]), word(tokens[i]), float(batch.sampler_logprobs[i]), float(logprobs[i]),
         float((logprobs[i] - terms.old_logprob[i]).exp()), float(terms.advantage[i]), losses[i].item(), float(slopes[i])]
        for i in range(len(tokens))
    ]  # fmt: skip

    hidden, targets = trained_hidden(model, rows)  # (10, 8), (10,)
    place = rows.index[rows.trained]
    extras = [t[place] for t in terms]
    loss, _ = kernels.linear_token_loss(hidden, model.head_weight, targets, partial(rl_loss, recipe=c.recipe), extras)
    loss.backward()
    v = TOKENIZER.encode(WORD)[0]
    gradient = model.head_weight.grad[v, CHANNEL].item()
    with torch.no_grad():
        p = (hidden @ model.head_weight.T).softmax(-1)[:, v]
        chosen = (targets == v).float()
        in_order = place.argsort()  # from the order of the packed rows to that of the table
        chosen, p, h = (values[in_order] for values in (chosen, p, hidden[:, CHANNEL]))
        parts = slopes * (chosen - p) * h
    assert abs(parts.sum().item() - gradient) < 1e-6
    factors = [
        [word(tokens[i]), float(slopes[i]), f"{chosen[i]:.0f}", p[i].item(), h[i].item(), parts[i].item()]
        for i in range(len(tokens))
    ]

    fresh = tiny_model()
    before = fresh.head_weight[v, CHANNEL].item()
    seen = train_rl.update(fresh, Optimizer(fresh), batch, LR, c, require_finite=lambda *_: None)
    after = fresh.head_weight[v, CHANNEL].item()
    now, _ = token_logprobs(fresh, rows, c.micro_rows, c.temperature)
    ids = TOKENIZER.encode(PROMPT)
    return f"""## 1. One step of RL

The algorithm is `{c.algo}` ([algorithms.md](algorithms.md)). The problem is `{PROMPT}` and its answer `{ANSWER}`, modulo 10. {function("TextTokenizer.encode", "nanopcf/tokenizer.py")} turns the prompt into the ids
{ids}, one per word.

**Roll out.** {function("roll_out", "nanopcf/rollouts.py")} asks {function("Sampler.generate", "nanopcf/sampler.py")} for a group of four responses of at most {c.max_new_tokens} tokens.
**Judge.** {function("verify", "nanopcf/rewards.py")} compares each with the answer, and {function("group_advantages", "nanopcf/objectives.py")} normalises the rewards within the
group. Here their mean is {batch.rewards.mean().item():.4f} and their standard deviation {batch.rewards.std().item():.4f}, so A = (R - mean) / deviation:

{table(["response", "tokens", "cut at the limit", "reward R", "advantage A"], answers)}

**Update.** {function("pack", "nanopcf/packing.py")} lays prompts and responses into rows, and {function("token_logprobs", "nanopcf/packing.py")} scores them. No update has
happened since the responses were drawn, so the trainer's log-probs are the sampler's and the ratio is 1.
{function("token_weights", "nanopcf/objectives.py")} gives each of the {len(tokens)} tokens the weight 1 / {len(tokens)} = {weights[0].item():.4f} (token-mean), and
{function("rl_loss", "nanopcf/objectives.py")} makes of each token the loss -weight * min(ratio * A, clip(ratio) * A). Its slope says how the
log-prob of this token should move: a negative slope pushes it up.

{table(["response", "token", "log-prob, sampler", "log-prob, trainer", "ratio", "A", "loss", "d loss / d log-prob"], per_token)}

The losses sum to {loss.item():.4f}. This is near 0 whatever the model has learned, since the advantages of a group
cancel except for the lengths of the responses: watch the reward, not the loss.

**One weight.** {function("linear_token_loss", "kernels/__init__.py")} takes the slopes to the output head. For the word {word(v)} and channel {CHANNEL} of its row,
each token brings slope * (is it {word(v)}? - p({word(v)})) * hidden[{CHANNEL}]:

{table(["token", "slope", f"is it {word(v)}?", f"p({word(v)})", f"hidden[{CHANNEL}]", "product"], factors)}

The gradient is their sum, {gradient:+.4f}.

{function("Optimizer.step", "nanopcf/optim.py")} clips the norm of the whole gradient ({seen["grad_norm"]:.4f}) at {c.clip:g} and lets AdamW move the weight at a learning rate of
{LR:g}: {before:.4f} becomes {after:.4f}. The log-probs of the first response's tokens go from {logprobs[0].item():.4f} and {logprobs[1].item():.4f} to {now[0].item():.4f} and {now[1].item():.4f}."""


def sft_row() -> str:
    """A packed row of two examples, its log-probs and its loss, as train_sft.py has it."""
    model = tiny_model()
    prompt, other = TOKENIZER.encode(PROMPT), TOKENIZER.encode("1 + 1 =")
    sequences = [
        Sequence([*prompt, *TOKENIZER.encode_answer(ANSWER)], len(prompt)),
        Sequence([*other, *TOKENIZER.encode_answer("2")], len(other)),
    ]
    rows = pack(sequences, 14)
    columns = [getattr(rows, name)[0].tolist() for name in ("tokens", "positions", "documents", "targets")]
    shown = [
        ["token", *(word(t) if d else "" for t, d in zip(columns[0], columns[2], strict=True))],
        ["position", *columns[1]],
        ["document", *columns[2]],
        ["target", *(word(t) if t >= 0 else "." for t in columns[3])],
    ]
    logprobs, _ = token_logprobs(model, rows, 1, 1.0)
    hidden, targets = trained_hidden(model, rows)
    loss = kernels.linear_cross_entropy(hidden, model.head_weight, targets)
    loss.backward()
    v = TOKENIZER.encode(WORD)[0]
    with torch.no_grad():
        p = (hidden @ model.head_weight.T).softmax(-1)[:, v]
        parts = -((targets == v).float() - p) * hidden[:, CHANNEL] / len(targets)
    gradient = model.head_weight.grad[v, CHANNEL].item()
    assert abs(parts.sum().item() - gradient) < 1e-6
    losses = [f"{-x:.4f}" for x in logprobs.tolist()]
    return f"""## 2. A row of SFT

Two examples, `{PROMPT} {ANSWER}` and `1 + 1 = 2`, packed into one row by {function("pack", "nanopcf/packing.py")}. A position predicts its target; a dot is not
trained. The end token is a target like any other, the prompt is not.

{table(shown[0], shown[1:])}

The loss of a target is -log-prob ({function("token_logprobs", "nanopcf/packing.py")}): {", ".join(losses)}. Their mean is the loss of
{function("linear_cross_entropy", "kernels/__init__.py")}: {loss.item():.4f}. It is the RL loss with A = 1 everywhere and no ratio. The same weight, row {word(v)} and channel {CHANNEL},
gets the sum over the targets of (p({word(v)}) - (1 if the target is {word(v)} else 0)) * hidden[{CHANNEL}] / {len(targets)}:

    {" ".join(f"{x:+.4f}" for x in parts.tolist())}  =  {gradient:+.4f}"""


def head_tile() -> str:
    """One token's logits in tiles, and how the tiles' numbers combine, as kernels/gpu/logprob.py does it."""
    model = tiny_model()
    sequence = Sequence([*TOKENIZER.encode(PROMPT), *TOKENIZER.encode_answer(ANSWER)], 4)
    hidden, targets = trained_hidden(model, pack([sequence], 8))
    x, y = hidden[:1].detach(), targets[:1]
    tiles = (x @ model.head_weight.detach().T).view(-1, 4)  # (4 tiles, 4 words): of 16 words
    lse_t = tiles.logsumexp(1)
    entropy_t = -(tiles.softmax(1) * tiles.log_softmax(1)).sum(1)
    lse = lse_t.logsumexp(0)
    share = (lse_t - lse).exp()
    entropy = (share * (entropy_t - share.log())).sum()
    logprob, h = kernels.linear_logprob(x, model.head_weight, y, entropy=True)
    assert abs(tiles.flatten()[y].item() - lse.item() - logprob.item()) < 1e-5 and abs(entropy - h).item() < 1e-5
    rows = [
        [f"{t}", " ".join(word(v) for v in range(4 * t, 4 * t + 4)), " ".join(f"{z:.4f}" for z in tiles[t].tolist()),
         lse_t[t].item(), entropy_t[t].item(), share[t].item()]
        for t in range(4)
    ]  # fmt: skip
    return f"""## 3. A tile of the fused head

The target {word(y.item())} after `{PROMPT}`. Its 16 logits are never in memory together: a program of the GPU kernel sees one tile of words and
leaves three numbers ([`stats_kernel`](../kernels/gpu/logprob.py)), here with tiles of four words. lse is log sum exp, H the entropy within the tile:

{table(["tile", "words", "logits", "lse_t", "H_t", "share s_t"], rows)}

Tiles combine by the chain rule: lse = log sum exp(lse_t) = {lse.item():.4f}, s_t = exp(lse_t - lse), and the entropy is the sum of s_t (H_t - log s_t) =
{entropy.item():.4f}. The log-prob is the target's logit less lse: {tiles.flatten()[y].item():.4f} - {lse.item():.4f} = {logprob.item():.4f}, which is what
{function("linear_logprob", "kernels/__init__.py")} returns on every path."""


def page() -> str:
    torch.set_num_threads(1)
    head = """# A walk through one step, with its numbers

Made by `python docs/walkthrough.py --write`; the test suite makes it again and compares. A model of one layer and width 8,
with weights drawn from a fixed seed, has learned nothing yet; all else is what training does, by the same functions."""
    return "\n\n".join([head, rl_step(), sft_row(), head_tile()]) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        (ROOT / "docs" / "walkthrough.md").write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
