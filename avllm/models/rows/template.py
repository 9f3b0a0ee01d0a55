"""Render a chat template, which is a program from somebody else, within bounds.

Transformers renders templates in Jinja's sandbox, where they reach no attributes and no files. The
sandbox bounds neither time nor size: a loop within a loop runs for days, and ``9**9**9`` never ends
and holds the interpreter. So powers are refused when a template is read, and a rendering is ended
after some seconds.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from avllm.errors import UserError

SECONDS = 5.0
"""For one rendering, which takes a millisecond."""
LARGEST_FACTOR = 10_000


class ChatTemplateError(UserError):
    """A chat template that cannot be used.

    Reasons: ``syntax``, ``power``, ``time``, ``failed``.
    """


class _TooLongError(Exception):
    """Raised in the thread that renders for too long."""


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that is no Jinja, computes powers, or does not end.

    Raises:
        ChatTemplateError: the template, or one of several that the tokenizer has.
    """
    templates = tokenizer.chat_template
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    for text in texts:
        _check_source(str(text))
    trial = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(TemplateError):  # a row that it refuses says so by itself
        render_chat(tokenizer, trial, generation=False)


def _check_source(text: str) -> None:
    environment = _compile_jinja_template("").environment
    if not isinstance(environment, SandboxedEnvironment):
        raise ChatTemplateError(
            "this transformers renders chat templates without Jinja's sandbox, so that a template "
            "could run code; install a version with it",
            reason="no_sandbox",
        )
    try:
        tree = environment.parse(text)
    except (TemplateSyntaxError, RecursionError) as error:
        raise ChatTemplateError(
            f"the chat template is no Jinja ({error}); copy the tokenizer's files again",
            reason="syntax",
        ) from error
    for operation in tree.find_all((nodes.Pow, nodes.Mul)):
        if isinstance(operation, nodes.Pow) or _is_large(operation):
            raise ChatTemplateError(
                "the chat template computes a power or a very long text in line "
                f"{operation.lineno}, which may never end; use another template",
                reason="power",
            )


def variables_of(template: str) -> set[str]:
    """Return the names whose values a chat template is given when it is rendered."""
    tree = _compile_jinja_template("").environment.parse(template)
    return find_undeclared_variables(tree)


def _is_large(product: nodes.Expr) -> bool:
    """Return True for a product with a large number in it."""
    values = [constant.value for constant in product.find_all(nodes.Const)]
    return any(isinstance(value, int) and value > LARGEST_FACTOR for value in values)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    generation: bool,
    **arguments: Any,
) -> str:
    """Write a chat by the tokenizer's template.

    Args:
        tokenizer: its template is used.
        messages: ``{"role", "content"}`` each.
        generation: end where the next answer begins.
        arguments: of the template.

    Raises:
        TemplateError: the template refuses the chat.
        ChatTemplateError: it takes more than some seconds, or fails in another way.
    """
    try:
        with _limited(SECONDS):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **arguments
            )
    except _TooLongError as error:
        raise ChatTemplateError(
            f"the chat template did not end within {SECONDS:g} s; it loops. Use another template",
            reason="time",
        ) from error
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError) as error:
        raise ChatTemplateError(
            f"the chat template fails: {type(error).__name__}: {error}. Use another template",
            reason="failed",
        ) from error
    return str(text)


class _Watch:
    """End renderings that take too long, from one thread for the whole process.

    A timer for each rendering would take several times as long as the rendering.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        """Watch the calling thread from now on."""
        thread = self._thread
        if thread is None or not thread.is_alive():  # also after a fork, which copies no threads
            self._lock = threading.Lock()
            self._deadlines = {}
            self._thread = threading.Thread(target=self._run, daemon=True, name="chat templates")
            self._thread.start()
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + seconds

    def end(self) -> None:
        """Watch the calling thread no longer."""
        with self._lock:
            self._deadlines.pop(threading.get_ident(), None)
            _raise_in(threading.get_ident(), None)  # an exception that was not delivered yet

    def _run(self) -> None:
        while True:
            time.sleep(0.25)
            with self._lock:
                for thread, deadline in list(self._deadlines.items()):
                    if time.monotonic() > deadline:
                        del self._deadlines[thread]
                        _raise_in(thread, _TooLongError)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    argument = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), argument)


_WATCH = _Watch()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `_TooLongError` in this thread if the block takes longer."""
    _WATCH.begin(seconds)
    try:
        yield
    finally:
        _WATCH.end()
