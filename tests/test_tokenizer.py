"""Text to ids: end and begin tokens, chat templates against transformers' own."""

import json

import pytest
from conftest import change, character_tokenizer

from nanopcf import checkpoint
from nanopcf.tokenizer import TextTokenizer, word_tokenizer


def test_a_tokenizer_of_words():
    tokenizer = word_tokenizer(["1", "12", "+2", "="])
    assert tokenizer.vocab_size == 5 and tokenizer.encode("12 +2 =") == [1, 2, 3]
    assert tokenizer.encode_answer("1") == [0, tokenizer.eos_id] and tokenizer.decode([1, 2, 3, 4]) == "12 +2 ="
    with pytest.raises(ValueError, match="can't spell '13 x'"):
        tokenizer.encode("12 x 13 x 1")


def test_end_tokens_from_all_three_files(folder):
    change(folder, eos_token_id=[15, 3])
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 999]}')
    _, tokenizer = checkpoint.load(folder)
    assert tokenizer.eos_id == 15 and tokenizer.stop_ids == [3, 4, 15]
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ValueError, match="no end token of this tokenizer"):
        checkpoint.load(folder)


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are "
    "helpful<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception("only user and assistant") }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not ns.found %}{%- set ns.found = true %}{%- set ns.last = loop.index0 %}{%- endif %}
    {%- if ns.found %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' + ({"n": "é"} | tojson) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3], ids=["chatml", "llama3", "qwen3"])
def test_chat_templates_give_what_transformers_gives(template):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.WordLevel({"<eos>": 0, "<bos>": 1}))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>", bos_token="<bos>")
    ours = TextTokenizer(library, "<eos>", chat_template=template, bos_token="<bos>")
    user, answered = (
        {"role": "user", "content": "  Hi <there> "},
        {"role": "assistant", "content": "<think>x</think>\nHo"},
    )
    for messages in ([user], [{"role": "system", "content": " Be brief. "}, user], [user, answered, user]):
        want = theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
        assert ours.chat(messages) == want
    with pytest.raises(ValueError, match="the chat template failed"):
        ours.chat([{"role": "tool"}])


def test_a_chat_template_runs_no_code():
    nano = character_tokenizer()
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}a{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ):
        nano.chat_template = attack
        with pytest.raises(ValueError, match="the chat template failed"):
            nano.chat([{"role": "user", "content": "1"}])


def test_the_begin_token_stands_before_a_plain_prompt_and_survives_a_save(folder):
    """Llama's tokenizers put one there by a post-processor, Qwen's none: the prompt of a base model is what they
    make."""
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(
        single="= $A", special_tokens=[("=", library.token_to_id("="))]
    )
    library.save(str(folder / "tokenizer.json"))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"bos_token": {"content": "="}}))
    model, tokenizer = checkpoint.load(folder)
    assert tokenizer.encode_prompt("12") == library.encode("12").ids == [tokenizer.bos_ids[0], *tokenizer.encode("12")]
    checkpoint.save(model, tokenizer, folder.parent / "again")
    again = checkpoint.load(folder.parent / "again")[1]
    assert again.bos_token == "=" and again.bos_ids == tokenizer.bos_ids and character_tokenizer().bos_ids == []


def test_templates_are_sandboxed_and_missing_ones_said():
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([])
    for template in (
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{% if %}",
        "{{ raise_exception('no system') }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat template failed"):
            tokenizer.chat([{"role": "user", "content": "1"}])
