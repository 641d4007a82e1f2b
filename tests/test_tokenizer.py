"""Text to ids: end and begin tokens, chat templates against transformers' own."""

import json

import pytest
from conftest import change, character_tokenizer

from nanopcf import checkpoint
from nanopcf.data import Example, Format, encode_examples
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
    ours = TextTokenizer(library, "<eos>", chat_template=template, named={"eos_token": "<eos>", "bos_token": "<bos>"})
    user, answered = (
        {"role": "user", "content": "  Hi <there> "},
        {"role": "assistant", "content": "<think>x</think>\nHo"},
    )
    for messages in ([user], [{"role": "system", "content": " Be brief. "}, user], [user, answered, user]):
        want = theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
        assert ours.chat(messages) == want
    with pytest.raises(ValueError, match="the chat template failed"):
        ours.chat([{"role": "tool"}])


GENERATION = """{%- set shown = "outside" %}{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{%- set shown = "inside" %}{{ m.content }}<|im_end|>{% endgeneration %}
{{ shown }}
{%- else %}<|im_start|>{{ m.role }}
{{ m.content }}{{ pad_token }}<|im_end|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}{{ messages | tojson(indent=1, sort_keys=true) }}{{ messages[-1].reasoning_content }}{{ messages[-1].thinking }}"""


def test_generation_tags_and_thoughts_render_as_in_transformers():
    """34 of 74 published templates mark what is trained with {% generation %}; once that was an unknown tag."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>", pad_token="<pad>")
    ours = TextTokenizer(library, "<eos>", chat_template=GENERATION, named=dict(theirs.special_tokens_map))
    user, thoughtful = dict(role="user", content="Hi"), dict(role="assistant", content="Ho", reasoning="hm")
    for messages in ([user], [user, dict(role="assistant", content="Ho"), user], [user, thoughtful]):
        want = theirs.apply_chat_template(
            messages, chat_template=GENERATION, add_generation_prompt=True, tokenize=False
        )
        assert ours.chat(messages) == want


# ---- where a turn begins and ends ----

# What surrounds a chat below; the last line opens the answer.
PLAIN_CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def bytes_folder(folder, config: dict, template: str | None = None, **tokenizer_parts):
    """A folder with a tokenizer of single characters, and the special tokens <s>, </s>, <turn>, <pad>, <think>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    library = Tokenizer(models.BPE(alphabet, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>", "<turn>", "<pad>"])
    for name, value in tokenizer_parts.items():
        setattr(library, name, value)
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"} | config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def shown(tokenizer, ids: list[int]) -> str:
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def test_how_a_tokenizer_cut_and_filled_texts_before_does_not_matter(tmp_path):
    """transformers stores truncation and padding in tokenizer.json: training saw `How many[[Three ca` and no error."""
    from tokenizers import Tokenizer

    path = bytes_folder(tmp_path / "m", {}) / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    library.enable_truncation(4)
    library.enable_padding(length=32, pad_id=library.token_to_id("<pad>"), pad_token="<pad>")
    library.save(str(path))
    tokenizer = checkpoint.load_tokenizer_of(tmp_path / "m")
    assert shown(tokenizer, tokenizer.encode_prompt("How many?")) == "How many?"
    assert shown(tokenizer, tokenizer.encode_answer("Three cats.")) == "Three cats.</s>"
    tokenizer.save(path)
    assert '"truncation": null' in path.read_text() and '"padding": null' in path.read_text()


PROCESSORS = {
    "none": lambda p: None,
    "bytes": lambda p: p.ByteLevel(),
    "begin": lambda p: p.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)]),
    "end": lambda p: p.TemplateProcessing(single="$A <turn>", special_tokens=[("<turn>", 258)]),
    "two": lambda p: p.TemplateProcessing(single="<turn> <s> $A", special_tokens=[("<s>", 256), ("<turn>", 258)]),
    "roberta": lambda p: p.RobertaProcessing(sep=("<turn>", 258), cls_token=("<s>", 256)),
    "sequence": lambda p: p.Sequence(
        [p.ByteLevel(), p.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])]
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_a_prompt_begins_as_in_transformers(name, config, tmp_path):
    """Whatever the post-processor puts before a text, and nothing that it puts after it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import processors

    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = bytes_folder(tmp_path / "m", config | kind, post_processor=PROCESSORS[name](processors))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)("12").input_ids
    ours = checkpoint.load_tokenizer_of(folder)
    after = ours.tokenizer.token_to_id("<turn>")
    assert ours.encode_prompt("12") == (theirs[:-1] if theirs[-1] == after else theirs)


def test_begin_and_end_tokens_that_a_text_brings_along_are_not_doubled(tmp_path, capsys):
    from tokenizers import processors

    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = checkpoint.load_tokenizer_of(bytes_folder(tmp_path / "m", {}, post_processor=begin))
    for prompt in ("Legs?", "<s>Legs?"):
        assert shown(tokenizer, tokenizer.encode_prompt(prompt)) == "<s>Legs?"
    for answer in ("4", "4</s>", "4</s>\n"):
        assert shown(tokenizer, tokenizer.encode_answer(answer)) == "4</s>"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "begin with the begin token" in said[0] and "end with '</s>'" in said[1]
    turns = checkpoint.load_tokenizer_of(tmp_path / "m", end_token="<turn>")
    assert shown(turns, turns.encode_answer("4</s><turn>\n")) == "4<turn>"


@pytest.mark.parametrize(
    ("template", "options", "end", "said"),
    [
        (PLAIN_CHAT, {}, "</s>", ""),  # without --chat the template ends nothing
        (PLAIN_CHAT, {"chat": True}, "<turn>", "ends an answer with '<turn>'"),
        (PLAIN_CHAT.replace("<turn>", " </s>"), {"chat": True}, "</s>", ""),
        (PLAIN_CHAT.replace("<turn>", ""), {"chat": True}, "</s>", "with no token of its own: '</s>' ends it"),
        ("{{ raise_exception('no assistant here') }}", {"chat": True}, "</s>", "with no token of its own"),
        (PLAIN_CHAT, {"chat": True, "end_token": "</s>"}, "</s>", ""),
        (PLAIN_CHAT, {"end_token": "<pad>"}, "<pad>", ""),
    ],
)
def test_an_answer_ends_as_the_template_ends_it(template, options, end, said, tmp_path, capsys):
    """A base model's end token is <|endoftext|>, its chat template says <|im_end|>: trained was what no chat has."""
    folder = bytes_folder(tmp_path / "m", {}, template)
    tokenizer = checkpoint.load_tokenizer_of(folder, **options)
    heard = capsys.readouterr().err
    assert shown(tokenizer, tokenizer.encode_answer("4")) == f"4{end}"
    assert said in heard and bool(said) == bool(heard)
    ids = {tokenizer.tokenizer.token_to_id(token) for token in ("</s>", end)}
    assert ids <= set(tokenizer.stop_ids) and tokenizer.named["eos_token"] == "</s>"
    with pytest.raises(ValueError, match="--end-token: '<nowhere>' is no token of the tokenizer"):
        checkpoint.load_tokenizer_of(folder, end_token="<nowhere>")


@pytest.mark.parametrize(
    ("opened", "trajectory", "trained", "said"),
    [
        ("<think>\n", "<think>\nfour\n</think>\n4", "four\n</think>\n4", "stands there once"),
        ("<think>", "<think>\nfour</think>4", "\nfour</think>4", "stands there once"),
        ("<think>\n", "four</think>4", "four</think>4", ""),
        ("<think>\n", "4", "4", "don't close it"),
        ("[THINK]", "[THINK]four[/THINK]4", "four[/THINK]4", "stands there once"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n4", "4", ""),
        ("<think>\n\n</think>\n\n", "<think>four</think>4", "<think>four</think>4", "open new ones"),
        ("\n", "<think>four</think>4", "<think>four</think>4", ""),
        ("</b>", "</b>4", "</b>4", ""),
    ],
)
def test_thoughts_are_opened_once(opened, trajectory, trained, said, tmp_path, capsys):
    """By the template or by the trajectory."""
    template = PLAIN_CHAT.replace("<a>", "<a>" + opened)
    tokenizer = checkpoint.load_tokenizer_of(bytes_folder(tmp_path / "m", {}, template))
    (s,) = encode_examples([Example("Legs?", trajectory)], tokenizer, 999, "F", format=Format(chat=True))
    assert shown(tokenizer, s.tokens) == f"<user>Legs?<turn>\n<a>{opened}{trained}</s>"
    heard = capsys.readouterr().err
    assert said in heard and bool(said) == bool(heard)


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
    assert (
        again.named["bos_token"] == "=" and again.bos_ids == tokenizer.bos_ids and character_tokenizer().bos_ids == []
    )


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
