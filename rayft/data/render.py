"""Example -> text and the spans of it that are trained, by the tokenizer's chat template.

Masks by prefix rendering: turn k of a conversation is trained on the characters between
render(turns[:k] + generation prompt) and render(turns[:k + 1]), so the end-of-turn token is always
in and the header of the turn never is; no tag in the template is needed. Where a template renders
earlier turns in another way once later ones follow (Qwen3 drops thoughts), the end is found instead
as content followed by the same tail, or by a special token; where that fails too, or what is said
is not in the span, the row is refused. A last turn that a template leaves without any end gets the
tokenizer's end-of-sequence token.

Prompt and completion as plain strings become a user and an assistant turn when there is a chat
template: that is how the tuned model will be called. (TRL concatenates them; do so here by taking a
tokenizer without a template.) Without one the document is prompt + completion + eos, trained on
completion + eos. Text is what the tokenizer makes of it (its own bos) + eos, all of it trained.

Left out: images and audio; generation tags of templates (`{% generation %}`) are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from rayft.core.errors import ConfigError
from rayft.data.shapes import ChatExample, Example, PreferencePair, PromptPair, TextExample
from rayft.data.turns import BadRow, Message

if TYPE_CHECKING:  # transformers takes a second to import
    from transformers import PreTrainedTokenizerBase

_LAST_WORDS = 20  # characters of a turn that must be found in what is trained
Span = tuple[int, int]  # characters [start, stop)

# what a template can raise when it meets a row it was not written for
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class RenderedText:
    """Text, the spans of it that are trained, and what the tokenizer adds: its own special tokens
    (`special`), an end-of-sequence token (`eos`; trained as `spans` end says)."""

    text: str
    spans: tuple[Span, ...]
    special: bool
    eos: bool


class ExampleRenderer:
    """Renders examples for one tokenizer.

    Args:
        tokenizer: of transformers.
        train_all: every token is trained (lm, or sft with train_on_prompt), else completions only.
        text_only_fails: whether plain text is refused, as it has no completion (sft).
        chat_template: jinja text that replaces the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_all: bool,
        text_only_fails: bool,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer, self.train_all, self.chat_template = tokenizer, train_all, chat_template
        self.text_only_fails = text_only_fails
        self.has_template = chat_template is not None or tokenizer.chat_template is not None
        self.specials = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token (eos_token)")

    def __call__(self, example: Example) -> RenderedText:
        """The text of an example.

        Raises:
            BadRow: nothing in it can be trained, or the template refuses it.
            ConfigError: a conversation, but no template; text, but an objective for completions.
        """
        if isinstance(example, PreferencePair):
            return self(example.chosen)
        rendered = self._render(example)
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"invalid UTF-8 at character {error.start}") from None
        return rendered

    def _render(self, example: TextExample | PromptPair | ChatExample) -> RenderedText:
        if isinstance(example, TextExample):
            return self._text(example)
        if isinstance(example, ChatExample):
            return self._chat(example)
        if not example.completion.strip():
            raise BadRow("empty completion")
        if self.has_template:
            turns = ({"role": "user", "content": example.prompt},)
            answer = {"role": "assistant", "content": example.completion}
            return self._chat(ChatExample((*turns, answer), (None, None), start=1))
        text = example.prompt + example.completion
        start = 0 if self.train_all else len(example.prompt)
        return RenderedText(text, ((start, len(text)),), special=True, eos=True)

    def _text(self, example: TextExample) -> RenderedText:
        if self.text_only_fails:
            raise ConfigError(
                "objective sft trains completions, and rows of plain text have none",
                fix="objective: {kind: lm}, or columns: {prompt: .., completion: ..}",
            )
        if not example.text.strip():
            raise BadRow("empty text")
        return RenderedText(example.text, ((0, len(example.text)),), special=True, eos=True)

    # --- conversations ---

    def _chat(self, chat: ChatExample) -> RenderedText:
        if not self.has_template:
            raise ConfigError(
                "the data holds conversations, and the tokenizer has no chat template",
                fix="model.chat_template: jinja text or a file",
            )
        whole = self._apply(chat, len(chat.messages), generation=False)
        marked = [index for index in range(len(chat.messages)) if self._differs(chat, index)]
        if self.train_all:
            spans = _complement([self._span(chat, whole, index) for index in marked], len(whole))
            return RenderedText(whole, tuple(spans), special=False, eos=False)
        if not any(_says(chat.messages[index]) for index in marked):
            known = any(message["role"] == "assistant" for message in chat.messages)
            raise BadRow("every trained turn is empty" if known else "no assistant turn")
        spans = [self._span(chat, whole, index) for index in marked]
        bare = marked[-1] == len(chat.messages) - 1 and _endless(chat.messages[-1], whole)
        return RenderedText(whole, tuple(spans), special=False, eos=bare)

    def _differs(self, chat: ChatExample, index: int) -> bool:
        """Whether a turn is not treated like the bulk: trained among untrained, or the reverse."""
        flag = chat.flags[index]
        if self.train_all:
            return flag is False
        if flag is not None:
            return flag
        return chat.messages[index]["role"] == "assistant" and index >= chat.start

    def _span(self, chat: ChatExample, whole: str, index: int) -> Span:
        start = self._start(chat, whole, index)
        stop = self._end(chat, whole, index, start)
        if chat.messages[index]["content"].strip()[-_LAST_WORDS:] not in whole[start:stop]:
            raise BadRow(f"the chat template leaves out what turn {index} says")
        return start, stop

    def _start(self, chat: ChatExample, whole: str, index: int) -> int:
        """Where turn `index` begins to speak: after its header if it is the assistant's."""
        speaks = chat.messages[index]["role"] == "assistant"
        if index == 0:
            if not speaks:
                return 0
            first = self._apply(chat, 1, generation=False)
            header = self._apply(chat, 1, generation=True)[len(first) :]
            place = whole.find(header) if header else -1
            if place < 0:
                raise BadRow("the chat template cannot open a conversation with the assistant")
            return place + len(header)
        before = self._apply(chat, index, generation=speaks)
        if not whole.startswith(before):
            before = _shared(before, self._apply(chat, index, generation=False), whole)
        if before is None:
            raise BadRow(f"the chat template renders the turns before turn {index} in another way")
        return len(before)

    def _end(self, chat: ChatExample, whole: str, index: int, start: int) -> int:
        if index == len(chat.messages) - 1:
            return len(whole)
        until = self._apply(chat, index + 1, generation=False)
        # some templates close what they take for the whole conversation with eos (Phi-3)
        eos = cast(str, self.tokenizer.eos_token)  # a list only where tokens are asked for together
        for prefix in (until, until.removesuffix(eos)):
            if whole.startswith(prefix):
                return len(prefix)
        said = chat.messages[index]["content"].strip()
        spoken = whole.find(said, start) + len(said) if said and said in until else -1
        tail = until[until.rfind(said) + len(said) :]
        # ... or end their last turn with another token than those before it (gpt-oss)
        for end in (tail, *self.specials):
            if end and spoken >= start + len(said) and whole.startswith(end, spoken):
                return spoken + len(end)
        raise BadRow(f"the chat template renders turn {index} in another way inside the whole")

    def _apply(self, chat: ChatExample, count: int, *, generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(chat.messages[:count]),
                tools=chat.tools,
                chat_template=self.chat_template,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except _TEMPLATE_ERRORS as error:
            raise BadRow(f"the chat template refuses it: {str(error)[:160]}") from error
        return cast(str, text)  # tokenize=False


def _shared(prompted: str, plain: str, whole: str) -> str | None:
    """What of a generation prompt the whole conversation has as well: some templates open it with
    an empty thought that a real turn replaces. None when the turns before differ already."""
    if not prompted.startswith(plain) or not whole.startswith(plain):
        return None
    size = len(plain)
    while size < min(len(prompted), len(whole)) and prompted[size] == whole[size]:
        size += 1
    return whole[:size] if size > len(plain) else None


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _endless(message: Message, whole: str) -> bool:
    """Whether nothing but blanks follows the last words: nothing would teach the model to stop."""
    said = message["content"].strip()
    return bool(said) and whole.rstrip().endswith(said)


def _complement(holes: Sequence[Span], length: int) -> list[Span]:
    """[0, length) without the holes, which are sorted."""
    spans, at = [], 0
    for start, stop in holes:
        spans.append((at, start))
        at = stop
    return [(a, b) for a, b in [*spans, (at, length)] if a < b]
