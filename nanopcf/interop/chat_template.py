"""Chat templates: the jinja2 programs in which Hugging Face's models carry the text that surrounds their messages.

A template comes from a stranger, so it runs in jinja2's sandbox, which refuses access to Python's internals, and
within limits of time and memory. Inside, it finds what transformers offers to templates, because they are written
against that library.
"""

import json
import time
from functools import cache

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanopcf.run.untrusted import TooLong, memory_limit, time_limit

SECONDS, MEMORY_BYTES = 5.0, 1 << 30  # of a template, for one conversation
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which messages keep their thoughts


def to_json(value: object, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    """The filter `tojson` as templates expect it: jinja2's own would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """Lets a template refuse messages that it cannot show. Raises TemplateError."""
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    """Today's date for the templates that state it, such as Llama 3's."""
    return time.strftime(format)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant says. The text is that without the marks."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block with a scope of its own, as in transformers: a variable that is set in it is unknown after it.
        return nodes.CallBlock(self.call_method("unchanged"), [], [], body).set_lineno(line)

    def unchanged(self, caller) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """Without powers: 2 ** 2 ** 40 is one call of C code for hours, which no `time_limit` can end."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context, operator: str, left, right) -> object:
        raise TemplateError(f"{operator} isn't allowed in a chat template")


@cache
def compiled(template: str) -> Template:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def with_reasoning(message: dict) -> dict:
    """The message with its thoughts, if it has any, under the names that templates read."""
    thoughts = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def render_chat(
    template: str, messages: list[dict[str, str]], named: dict[str, str], *, add_generation_prompt: bool = True
) -> str:
    """The text of `messages`, each with role and content, up to where the assistant's next answer begins.

    named: the special tokens that the template may use, {"bos_token": "<s>", ...}. Raises ValueError when the template
    fails, in whatever way, or takes too long or too much memory.
    """
    try:
        with time_limit(SECONDS), memory_limit(MEMORY_BYTES):
            return compiled(template).render(
                messages=[with_reasoning(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **named,
            )
    except TooLong as error:
        raise ValueError(f"the chat template takes more than {SECONDS:g} s; does it loop?") from error
    except MemoryError as error:
        raise ValueError(f"the chat template wants more than {MEMORY_BYTES >> 30} GiB of memory") from error
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error
