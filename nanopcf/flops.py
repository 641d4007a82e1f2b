"""Training compute in FLOPs (the paper's Appendix E, Eqs. 20-29), the x axis of every curve.

    P_mlp = 3 H H_ff    P_attn = 2 H (D_q + D_kv)    P_vocab = 2 V H                       (20)
    F_fwd = 2 [L (P_mlp + P_attn) + P_vocab] + 4 S L D_q        per token                  (21)
    F_bwd = 2 F_fwd                                                                        (22)

H is the width of the model, H_ff that of its MLP, D_q = heads * head_dim and D_kv = kv_heads * head_dim, V the
vocabulary, L the layers, S the (mean) length of a sequence. The paper writes H for D_q too. The two are equal in the
models that it uses; where they differ (Qwen3), D_q is what the matrices and the attention really cost.

As in the paper, three things are not exact: the look-up of embeddings is counted like the output head, although it
multiplies nothing; attention is counted over all S positions, although a causal model needs half of them; and the extra
forward pass for old log-probs is not counted. Eq. 27 is printed without the factor B that the equations beside it have;
here it has it.

A config is any object with the attributes layers, width, mlp_width, vocab_size, heads, kv_heads and head_dim.
"""

from typing import Any


def forward_per_token(config: Any, seq_len: float) -> float:
    """FLOPs of a forward pass, per token of a sequence of (mean) length seq_len: Eqs. 20 and 21."""
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
    config: Any, prompts: float, group: int, seq_len: float, *, train_prompts: float | None = None, rounds: float = 1.0
) -> float:
    """FLOPs of one RL step: a forward pass per generated token, and three times as much per trained one.

    GRPO (Eq. 25):  rl_step(config, B, G, S) = 4 B G S F_fwd
    DAPO (Eq. 24):  rl_step(config, B_gen, G, S, train_prompts=B_train, rounds=K)
                    = (K B_gen + 3 B_train) G S F_fwd

    prompts: those of one round of generation; rounds: K, which may be a mean over steps. If the number of all generated
    prompts is known, pass that as `prompts` and leave rounds at 1. group: G, responses per prompt; seq_len: S, the mean
    length of prompt and response together.
    """
    trained = prompts if train_prompts is None else train_prompts
    return (rounds * prompts + 3 * trained) * group * seq_len * forward_per_token(config, seq_len)


def mixed_step(
    config: Any, prompts: float, group: float, on_len: float, experts: float, off_len: float, *,
    train_prompts: float | None = None,
) -> float:  # fmt: skip
    """FLOPs of one LUFFY or SRFT step, Eq. 26: 4 [B G S_on + B N S_off] F_fwd, less if only train_prompts train.

    Every prompt has G = `group` rollouts of mean length S_on and N = `experts` trajectories of mean length S_off, which
    cost as much as rollouts. F_fwd is that of the mean length of all sequences. Prefix-RFT counts as GRPO (`rl_step`).
    """
    tokens = prompts * (group * on_len + experts * off_len)
    passes = (prompts + 3 * (prompts if train_prompts is None else train_prompts)) / prompts  # 4 if all are trained
    return passes * tokens * forward_per_token(config, tokens / (prompts * (group + experts)))


def upt_step(
    config: Any, prompts: float, group: float, on_len: float, trained_on: float, trained_off: float, off_len: float
) -> float:
    """FLOPs of one UPT step, Eqs. 27-29: [B G S_on + 3 (N_on S_on + N_off S_off)] F_fwd.

    Every prompt is rolled out G times, and then trains on its rollouts or on its expert trajectory: N_on = `trained_on`
    rollouts and N_off = `trained_off` expert trajectories in the whole step.
    """
    trained = trained_on * on_len + trained_off * off_len
    sequences = prompts * group + trained_on + trained_off
    mean_length = (prompts * group * on_len + trained) / sequences
    return (prompts * group * on_len + 3 * trained) * forward_per_token(config, mean_length)
