"""Where a text begins and ends: what a tokenizer puts before it, what a chat template puts after an answer, and what
the text of an example says itself. What is there twice would be trained twice, and no model writes like that.
"""

import json
import re
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from nanopcf.answers.finding import CLOSES_THOUGHTS, OPENS_THOUGHTS
from nanopcf.run import log

if TYPE_CHECKING:
    from nanopcf.tokenizer import TextTokenizer

# ---- the begin token ----


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer's post-processor puts before a text, which is what transformers puts there too.

    The ids of an empty text would not tell: they may hold the end token, or the sign for a space.
    """
    return ids_before(json.loads(tokenizer.post_processor.__getstate__())) if tokenizer.post_processor else []


def ids_before(processor: dict) -> list[int]:
    """The same of a post-processor as tokenizer.json describes it."""
    if processor["type"] == "Sequence":
        return [i for part in processor["processors"] for i in ids_before(part)]
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]]
    ids: list[int] = []
    for piece in processor.get("single", ()):  # [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
        if "Sequence" in piece:
            break
        ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


def with_begin(ids: list[int], begin: list[int]) -> list[int]:
    """The ids after the begin token. A text that begins with it already gets no other one, and the run says so."""
    if not begin or ids[: len(begin)] != begin:
        return [*begin, *ids]
    log.announce_once("some prompts begin with the begin token themselves: they don't get it twice")
    return ids


# ---- the end token ----


def without_end(text: str, tokenizer: "TextTokenizer") -> str:
    """The text without end tokens at its end, since one is put there anyway; the run says so."""
    ends = [tokenizer.end_token, *map(tokenizer.tokenizer.id_to_token, tokenizer.stop_ids)]
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        log.announce_once(f"some trajectories end with {end!r} themselves: they end with {tokenizer.end_token!r}, once")
        text = text.rstrip().removesuffix(end)
    return text


def closing_token(tokenizer: "TextTokenizer") -> str | None:
    """The special token with which the chat template ends an answer; None where it ends it without one."""
    from nanopcf.interop.chat_template import render_chat  # jinja2 is slow to import, and few runs need it

    answer = "an answer"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = render_chat(tokenizer.chat_template, chat, tokenizer.named, add_generation_prompt=False)
    except ValueError:  # the template wants another chat, such as one with a system message
        return None
    after = text.rpartition(answer)[2].lstrip()
    tokens = [token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()]
    return max((token for token in tokens if after.startswith(token)), key=len, default=None)


def choose_end(tokenizer: "TextTokenizer", chat: bool, end_token: str, source: object) -> None:
    """Set the token that ends an answer: `end_token` if one is given, or else with `chat` that of the chat template.

    Generation stops at the old one too. Raises ValueError when `end_token` is no token of the vocabulary.
    """
    was = tokenizer.end_token
    if not end_token and chat and tokenizer.chat_template is not None:
        end_token = closing_token(tokenizer)
        if end_token is None:
            log.announce_once(f"the chat template ends an answer with no token of its own: {was!r} ends it")
        elif end_token != was:
            log.announce_once(
                f"the chat template ends an answer with {end_token!r}, and so do the answers here; the tokenizer's own "
                f"end token is {was!r} (--end-token chooses what is trained)"
            )
    if not end_token or end_token == was:
        return
    eos_id = tokenizer.tokenizer.token_to_id(end_token)
    if eos_id is None:
        raise ValueError(f"--end-token: {end_token!r} is no token of the tokenizer in {source}")
    tokenizer.end_token, tokenizer.eos_id = end_token, eos_id
    tokenizer.stop_ids = sorted({eos_id, *tokenizer.stop_ids})


# ---- thoughts ----

# An opening tag at the end of a prompt, such as "<think>\n" or "[THINK]".
OPENED = re.compile(r"(<\w[^<>\s/]*>|\[[A-Z_]+\]|<\|begin_of_thought\|>)(\s*)\Z")
CLOSED = re.compile(r"<think>\s*</think>\s*\Z")  # some templates let the model think nothing


def after_prompt(trajectory: str, prompt_end: str) -> str:
    """The trajectory as it follows a prompt that ends with `prompt_end`.

    Where the template has opened the thoughts, a trajectory that opens them itself begins after its tag. The run says
    so, and it says when a trajectory leaves open what the template has opened.
    """
    said = trajectory.lstrip()
    opened, closed = OPENED.search(prompt_end), CLOSED.search(prompt_end)
    if closed and (empty := re.match(r"<think>\s*</think>\s*", said)):
        return said[empty.end() :]
    if closed and said.startswith("<think>"):
        log.announce_once(
            "the chat template closes the thoughts (<think></think>), and some trajectories open new ones"
        )
    if not opened:
        return trajectory
    tag, space = opened.groups()
    if said.startswith(tag):
        log.announce_once(f"the prompt ends with {tag}, and some trajectories open it too: it stands there once")
        return said.removeprefix(tag).removeprefix(space)
    thinks = OPENS_THOUGHTS.fullmatch(tag)  # another tag may open the answer itself
    if thinks and trajectory and not CLOSES_THOUGHTS.search(trajectory):
        log.announce_once(f"the prompt ends with {tag}, and some trajectories don't close it")
    return trajectory
