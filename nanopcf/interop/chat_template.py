"""Chat templates: the jinja2 programs in which Hugging Face's models carry the text that surrounds their messages.

A template comes from a stranger, so it runs in jinja2's sandbox, which refuses access to Python's internals. Inside, it
finds what transformers offers to templates, because they are written against that library.
"""

import json
import time

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def to_json(value: object, indent: int | None = None) -> str:
    """The filter `tojson` as templates expect it: jinja2's own would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def raise_exception(message: str) -> None:
    """Lets a template refuse messages that it cannot show. Raises TemplateError."""
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    """Today's date for the templates that state it, such as Llama 3's."""
    return time.strftime(format)


def render_chat(template: str, messages: list[dict[str, str]], *, bos_token: str, eos_token: str) -> str:
    """The text of `messages`, each with role and content, up to where the assistant's next answer begins.

    Raises ValueError when the template fails, in whatever way.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(template).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=None,
            documents=None,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"the chat template failed: {error}") from error
