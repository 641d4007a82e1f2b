"""Training compute in FLOPs (the paper's Appendix E, Eqs. 20-25), the x axis of every curve.

    P_mlp = 3 H H_ff    P_attn = 2 H (D_q + D_kv)    P_vocab = 2 V H                       (20)
    F_fwd = 2 [L (P_mlp + P_attn) + P_vocab] + 4 S L D_q        per token                  (21)
    F_bwd = 2 F_fwd                                                                        (22)

The paper writes H for the width of the queries, D_q = heads * head_dim. The two are equal in the models it
uses; where they differ (Qwen3), D_q is what the matrices and the attention really cost: it stands here.
Kept as in the paper: the embedding look-up is counted like the output head, although it multiplies nothing,
and attention over all S positions, although a causal model needs half of them.
Left out: Eqs. 26-29 (the synchronized methods LUFFY, SRFT and UPT).

A config is anything with layers, width, mlp_width, vocab_size, heads, kv_heads and head_dim.
"""

from typing import Any


def forward_per_token(config: Any, seq_len: float) -> float:
    """FLOPs of one forward pass, per token of a sequence of (mean) length seq_len: Eqs. 20 and 21."""
    q_width = config.heads * config.head_dim
    kv_width = config.kv_heads * config.head_dim
    mlp = 3 * config.width * config.mlp_width
    attention = 2 * config.width * (q_width + kv_width)  # the q, o and the k, v projections
    vocabulary = 2 * config.vocab_size * config.width
    dense = 2 * (config.layers * (mlp + attention) + vocabulary)  # a multiply and an add per weight
    return float(dense + 4 * seq_len * config.layers * q_width)


def sft_step(config: Any, batch: float, seq_len: float) -> float:
    """FLOPs of one SFT step on `batch` sequences, forward and backward: Eq. 23."""
    return 3 * batch * seq_len * forward_per_token(config, seq_len)


def rl_step(
    config: Any,
    prompts: float,
    group: int,
    seq_len: float,
    *,
    train_prompts: float | None = None,
    rounds: float = 1.0,
) -> float:
    """FLOPs of one RL step: every generated token costs one forward pass, every trained one three more.

    GRPO (Eq. 25):  rl_step(config, B, G, S) = 4 B G S F_fwd
    DAPO (Eq. 24):  rl_step(config, B_gen, G, S, train_prompts=B_train, rounds=K)
                    = (K B_gen + 3 B_train) G S F_fwd

    `rounds` may be a mean over steps. With the total of generated prompts at hand, pass that as `prompts` and
    leave rounds at 1. `group` responses a prompt; `seq_len` is the mean of prompt + response.
    """
    trained = prompts if train_prompts is None else train_prompts
    return (rounds * prompts + 3 * trained) * group * seq_len * forward_per_token(config, seq_len)
