"""A small GGUF file written here, in llama.cpp's layout, converted and read back."""

import numpy as np
import pytest
import torch

from nanopcf import checkpoint
from nanopcf.model import ModelConfig, Transformer
from nanopcf.tools import smollm2

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def write_gguf(path, model: Transformer) -> None:
    """As llama.cpp's converter does: rows of q and k interleaved, float16 or float32 tensors, the tokenizer as
    metadata."""
    gguf = pytest.importorskip("gguf")
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in [
        (writer.add_block_count, c.layers),
        (writer.add_context_length, c.max_length),
        (writer.add_embedding_length, c.width),
        (writer.add_feed_forward_length, c.mlp_width),
        (writer.add_head_count, c.heads),
        (writer.add_head_count_kv, c.kv_heads),
        (writer.add_rope_freq_base, c.rope_theta),
        (writer.add_layer_norm_rms_eps, c.norm_eps),
        (writer.add_vocab_size, c.vocab_size),
        (writer.add_rope_dimension_count, c.head_dim),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_chat_template, TEMPLATE),
    ]:
        add(value)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789", "a", "b", "Ġ", "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    back = {theirs: ours for ours, theirs in smollm2.NAMES.items()}
    for name, w in checkpoint.to_hf_weights(model).items():
        parts = name.removesuffix(".weight").split(".")
        block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        ours = back[".".join(parts[3:]) if block else ".".join(parts)]
        w = w.detach().numpy()
        if ours in ("attn_q", "attn_k"):
            heads = c.heads if ours == "attn_q" else c.kv_heads
            w = w.reshape(heads, 2, -1, c.width).swapaxes(1, 2).reshape(w.shape)
        writer.add_tensor(f"{block}{ours}.weight", np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_comes_back_as_it_was(tmp_path):
    """Every weight to the bit, so also the order of the rows of q and k; the tokenizer's digits and control tokens."""
    config = ModelConfig(
        vocab_size=17, width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, max_length=64, qk_norm=False
    )
    torch.manual_seed(0)
    model = Transformer(config)
    write_gguf(tmp_path / "m.gguf", model)
    smollm2.convert(tmp_path / "m.gguf", tmp_path / "m")
    loaded, tokenizer = checkpoint.load(tmp_path / "m")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items() if k not in ("cos", "sin"))
    assert loaded.config.rope_theta == config.rope_theta and loaded.config.norm_eps == pytest.approx(1e-6)
    assert tokenizer.encode("<|im_start|>ab12<|im_end|>") == [1, 16, 4, 5, 2]
    assert tokenizer.decode(tokenizer.encode("ab 12")) == "ab 12"
    assert tokenizer.stop_ids == [0, 2] and tokenizer.end_token == "<|im_end|>"
    messages = [{"role": "user", "content": "1 a"}]
    assert tokenizer.chat(messages) == "<|im_start|>user\n1 a<|im_end|>\n<|im_start|>assistant\n"
    checkpoint.save(loaded, tokenizer, tmp_path / "again")
    assert checkpoint.load(tmp_path / "again")[1].chat(messages) == tokenizer.chat(messages)


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        smollm2.fetch(tmp_path)
