"""What the commands share: options, reading input, and turning errors into exit codes.

stdout carries data only; everything said to the user goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from optlm.errors import CheckpointError, ConfigError, OptlmError, RequestError, TokenizerError

if TYPE_CHECKING:
    from optlm.engine.llm import LLM
    from optlm.tokenizer import Tokenizer

FAILURE = 1
BAD_INPUT = 2  # argparse's own code for bad usage too
INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 141  # 128 + SIGPIPE

_MAX_INPUT = 2**30  # bytes of one input; beyond it something else than a text was meant

_BAD_INPUT = (CheckpointError, ConfigError, RequestError, TokenizerError)
_NO_SUCH_INPUT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def add_engine_options(parser: ArgumentParser) -> None:
    """--model, --dtype, --kv-dtype, --threads and --backend."""
    group = parser.add_argument_group("engine")
    group.add_argument("-m", "--model", help="folder or hub name (default: the bundled model)")
    group.add_argument("--dtype", help="weights in memory: auto, f32, f16, bf16 or int8 (auto)")
    group.add_argument(
        "--kv-dtype",
        metavar="DTYPE",
        help="keys and values in memory: auto, f32, f16 or int8 (auto: f32 beside f32, else f16)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (all cores)")
    group.add_argument("--backend", help="auto, native or torch (auto: native where it runs)")


def add_device_option(parser: Any) -> None:
    """--device, of training."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu or cuda (auto: a GPU if PyTorch finds one)",
    )


def add_adapter_options(parser: ArgumentParser) -> None:
    """--adapter and --force."""
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--adapter", metavar="DIR", help="folder of a LoRA, prefix or prompt (optlm finetune, peft)"
    )
    group.add_argument(
        "--force", action="store_true", help="use an adapter that was made for another base"
    )


def adapter_options(options: Namespace) -> dict[str, Any]:
    """What `add_adapter_options` read, as `LLM` takes it."""
    if options.force and options.adapter is None:
        raise usage_error("--force goes with --adapter")
    return {"adapter": options.adapter, "force": options.force}


def engine_options(options: Namespace) -> dict[str, Any]:
    """What was given of them, but the model; the engine has the defaults."""
    names = ("dtype", "kv_dtype", "threads", "backend")
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def add_json_option(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write JSON, one object a line")


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM or SIGHUP; what Ctrl-C tidies is tidied."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def end_politely() -> None:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does, unless they are ignored (nohup)."""

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    for kind in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) is signal.SIG_DFL:
            signal.signal(kind, end)


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP: 128 + the signal, as shells have it."""
    return interrupt.exit_code if isinstance(interrupt, Terminated) else INTERRUPTED


def text_argument(word: str) -> str:
    """A text from the command line: UTF-8, whatever encoding the locale made Python assume.

    Raises:
        ArgumentTypeError: it is not UTF-8.
    """
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        raise ArgumentTypeError("is not UTF-8; give the text in a file, as UTF-8") from None


def run_guarded(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code: errors become one message, never a traceback."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        return exit_code_of(interrupt)
    except BrokenPipeError:
        _leave_stdout()
        return PIPE_CLOSED
    except Exception as error:
        if debugging():
            raise
        return _report(error)


def _report(error: Exception) -> int:
    if isinstance(error, OptlmError):
        say(f"error: {error}")
        return BAD_INPUT if isinstance(error, _BAD_INPUT) else FAILURE
    if isinstance(error, OSError):
        name = os.fsdecode(error.filename) if error.filename else "input/output"
        say(f"error: {name}: {error.strerror or error}")
        return BAD_INPUT if isinstance(error, _NO_SUCH_INPUT) else FAILURE
    if isinstance(error, MemoryError):
        say("error: not enough memory")
        return FAILURE
    say(f"error: {type(error).__name__}: {error}")
    say("this is a fault of optlm; `optlm --debug ...` shows where it happened")
    return FAILURE


def _leave_stdout() -> None:
    """The reader is gone: keep the interpreter from writing to the pipe once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def debugging() -> bool:
    """Whether errors should show their traceback."""
    return bool(os.environ.get("OPTLM_DEBUG"))


def say(message: str) -> None:
    """Tell the user something on stderr; where nobody listens, the work goes on all the same."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"optlm: {visible(message)}", file=sys.stderr, flush=True)


def usage_error(message: str) -> RequestError:
    """An error about options that do not go together; exit code 2."""
    return RequestError(message)


def load_model(options: Namespace) -> LLM:
    """Load the engine as asked for by `add_engine_options` and `add_adapter_options`."""
    from optlm.engine.llm import LLM

    return LLM(options.model, **engine_options(options), **adapter_options(options))


def model_name(model: str | None) -> str:
    """What clients call a model: its folder's own name; a hub name as it is."""
    from optlm.assets import bundled_model

    if model is None:
        return bundled_model().name
    folder = Path(model)
    return folder.resolve().name if folder.exists() else model


def tokenizer_of(llm: LLM) -> Tokenizer:
    """Return the tokenizer that `load_model` found beside the weights."""
    from optlm.tokenizer import Tokenizer

    assert isinstance(llm.tokenizer, Tokenizer)
    return llm.tokenizer


def read_text(source: str) -> str:
    """Read a file, or standard input for ``-``. A byte order mark and one last newline are dropped.

    Raises:
        RequestError: not UTF-8, larger than 1 GiB, or standard input is closed.
        OSError: it cannot be read.
    """
    name = "standard input" if source == "-" else source
    if source == "-":
        if sys.stdin is None:
            raise RequestError("standard input is closed; give the text in another way")
        if sys.stdin.isatty():
            say("reading from the terminal; end with Ctrl-D")
        raw = sys.stdin.buffer.read(_MAX_INPUT + 1)
    else:
        with Path(source).open("rb") as file:
            raw = file.read(_MAX_INPUT + 1)
    if len(raw) > _MAX_INPUT:
        raise RequestError(f"{name} has more than {_MAX_INPUT} bytes, the limit; split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def printable(text: str) -> str:
    """Return `text` with control characters made visible when stdout is a terminal."""
    return visible(text) if sys.stdout.isatty() else text


def visible(text: str) -> str:
    """Return `text` with control characters as escapes."""
    return text.translate(_VISIBLE)


# A model can produce any byte, and some drive the terminal.
_VISIBLE = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}
