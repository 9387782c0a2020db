"""Text to token ids and back.

Decisions, each pinned by a test:

* The start token comes first exactly once, whatever the file's post-processor, truncation or
  padding would do. Whether it comes at all is `Tokenizer.adds_bos` (true for OPT, false for
  Galactica) unless the caller says.
* Special tokens written in the text ("</s>") are parsed as such, as transformers does;
  ``parse_special=False`` reads them as ordinary characters, which is what untrusted text wants.
* Special tokens that only frame a text (start, end, padding, mask, and those a file lists as
  additional) are left out of it. Others are part of it, such as Galactica's ``[START_REF]``.
* Decoding joins the bytes of all tokens and turns invalid ones into U+FFFD at the end, once.
  `IncrementalDecoder` gives the same characters as early as they are certain, in constant time a
  token.

The algorithm is the `tokenizers` library's; it is imported when the first vocabulary is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optlm.config import OPTConfig
from optlm.errors import RequestError, TokenizerError
from optlm.tokenizer.files import (
    added_token,
    byte_of_character,
    load_backend,
    load_tokenizer_json,
    read_settings,
)
from optlm.tokenizer.incremental import ByteDecoder, IncrementalDecoder, WindowDecoder

if TYPE_CHECKING:
    import tokenizers

__all__ = ["IncrementalDecoder", "Tokenizer"]

T = TypeVar("T")

MAX_VOCABULARY = 2**24  # as OPTConfig
MAX_TEXT = 2**23  # characters; the library takes about 140 bytes for each

_FRAMING = frozenset(("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>"))

# Classes that are all tokenizer.json: its post-processor tells whether a start token is added.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class Tokenizer:
    """The vocabulary of one checkpoint. Safe to share between threads.

    Attributes:
        bos_id, eos_id, pad_id: ids of the start, end and padding token.
        adds_bos: whether `encode` puts the start token first when the caller does not say.
        vocab_size: the largest id + 1. Models may have more embedding rows (OPT: 50265 of 50272).
    """

    bos_id: int
    eos_id: int
    pad_id: int
    adds_bos: bool
    vocab_size: int

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        settings: dict[str, Any] | None = None,
        config: OPTConfig | None = None,
        origin: str = "the tokenizer",
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`; most callers want `from_folder`.

        Args:
            settings: as `optlm.tokenizer.files.read_settings` gives them.
            config: gives the special ids that the settings do not, and the limit of all ids.
        """
        settings = settings or {}
        self._backend = backend
        self._literal: tokenizers.Tokenizer | None = None  # the twin that parses no special tokens
        self._bytes: dict[int, bytes] = {}
        self._longest: int | None = None  # bytes of the longest token, or more
        backend.no_truncation()
        backend.no_padding()
        self._choose_special_ids(settings, config, origin)
        self._register_special_tokens(settings)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._hidden = self._framing_ids(settings)
        self._swallows_space = any(token.lstrip or token.rstrip for token in added.values())
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        if config is not None and self.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"{origin} has ids up to {self.vocab_size - 1}, but the model has "
                f"{config.vocab_size} token embeddings; the tokenizer belongs to another model"
            )
        self.adds_bos = _adds_bos(backend, settings, self.bos_id)
        self._byte_level = type(backend.decoder).__name__ == "ByteLevel"

    # ---- loading -----------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str | Path, config: OPTConfig | None = None) -> Tokenizer:
        """Load ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt``.

        ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` are respected;
        the special tokens they name win over the ids in `config`.

        Raises:
            TokenizerError: files are missing, damaged, contradict each other, or have ids beyond
                `config.vocab_size`.
        """
        folder = Path(folder)
        settings = read_settings(folder)
        backend = load_backend(folder, settings)
        return cls(backend, settings=settings, config=config, origin=str(folder))

    @classmethod
    def from_file(cls, path: str | Path, config: OPTConfig | None = None) -> Tokenizer:
        """Load one ``tokenizer.json`` and nothing beside it. Raises as `from_folder`."""
        return cls(load_tokenizer_json(Path(path)), config=config, origin=str(path))

    def _choose_special_ids(
        self, settings: dict[str, Any], config: OPTConfig | None, origin: str
    ) -> None:
        def choose(role: str, fallbacks: Sequence[str]) -> int:
            name = settings.get(role)
            if name is not None and (found := self._backend.token_to_id(name)) is not None:
                return found
            if name is not None and role != "pad_token":  # a missing pad token harms nobody
                raise TokenizerError(f"{origin}: the {role} {name!r} is not in the vocabulary")
            if config is not None:
                return int(getattr(config, f"{role}_id"))
            for name in fallbacks:
                if (found := self._backend.token_to_id(name)) is not None:
                    return found
            raise TokenizerError(
                f"{origin} has no {role} (tried {', '.join(fallbacks)}); "
                f"name it in tokenizer_config.json"
            )

        self.bos_id = choose("bos_token", ("</s>", "<s>", "<|endoftext|>"))
        self.eos_id = choose("eos_token", ("</s>", "<|endoftext|>"))
        self.pad_id = choose("pad_token", ("<pad>", "</s>", "<|endoftext|>"))

    def _register_special_tokens(self, settings: dict[str, Any]) -> None:
        names = [self._backend.id_to_token(i) for i in (self.bos_id, self.eos_id, self.pad_id)]
        names.append(settings.get("unk_token"))
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        for name in dict.fromkeys(names):
            if name and name not in known and self._backend.token_to_id(name) is not None:
                self._backend.add_special_tokens([added_token({"content": name, "special": True})])

    def _framing_ids(self, settings: dict[str, Any]) -> set[int]:
        """Special tokens that are no part of a text."""
        names = _FRAMING.union(settings.get("framing_tokens", ()))
        ids = {self.bos_id, self.eos_id, self.pad_id}
        return self._special & (ids | {i for i, name in self._added.items() if name in names})

    # ---- text to ids -------------------------------------------------------------------------

    def encode(
        self, text: str, add_bos: bool | None = None, *, parse_special: bool = True
    ) -> list[int]:
        """Return the ids of `text`, the start token first if `add_bos` (default: `adds_bos`).

        Raises:
            RequestError: not a string, lone surrogates, or more than `MAX_TEXT` characters.
        """
        return self.encode_batch([text], add_bos, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], add_bos: bool | None = None, *, parse_special: bool = True
    ) -> list[list[int]]:
        """`encode` for each of `texts`."""
        for text in texts:
            _check_text(text)
        backend = self._backend if parse_special else self._literal_backend()
        start = [self.bos_id] if (self.adds_bos if add_bos is None else add_bos) else []
        # The library's own batch call starts threads, which costs more than a prompt is worth.
        return [start + _guard(partial(_ids, backend, text)) for text in texts]

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `encode` of this text cannot stay below, found without encoding.

        Byte-level tokens stand for the bytes of the text, so the longest token tells. 0 where the
        file rewrites texts first. Where added tokens swallow white space, none of it counts.
        """
        if not self._byte_level or self._backend.normalizer is not None:
            return 0
        if self._longest is None:
            tokens = [*self._backend.get_vocab(with_added_tokens=False), *self._added.values()]
            self._longest = max(len(token.encode()) for token in tokens)
        counted = "".join(text.split()) if self._swallows_space else text
        return -(-len(counted.encode("utf-8", "replace")) // self._longest)

    def _literal_backend(self) -> tokenizers.Tokenizer:
        if self._literal is None:
            twin = type(self._backend).from_str(self._backend.to_str())
            twin.encode_special_tokens = True
            self._literal = twin
        return self._literal

    # ---- ids to text -------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        An id without a token (OPT's padding rows of the embedding) stands for nothing.
        """
        ids = list(ids)
        if self._byte_level:
            return b"".join(self._shown(i, skip_special) for i in ids).decode("utf-8", "replace")
        for token_id in ids:
            _check_id(token_id)
        return str(_guard(lambda: self._backend.decode(ids, skip_special_tokens=skip_special)))

    def decoder(self, skip_special: bool = True) -> IncrementalDecoder:
        """Return a fresh decoder for one stream of ids."""
        if self._byte_level:
            return ByteDecoder(lambda token_id: self._shown(token_id, skip_special))
        return WindowDecoder(lambda ids: self.decode(ids, skip_special))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that `token_id` stands for; empty for an id without a token.

        Raises:
            RequestError: not a whole number from 0.
        """
        known = self._bytes.get(token_id)
        if known is None:
            _check_id(token_id)
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        r"""Return one token for display; bytes that are no UTF-8 alone appear as ``\xe2``."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def is_special(self, token_id: int) -> bool:
        """Return whether the token is markup (start, end, padding ...) and not text."""
        return token_id in self._special

    def _shown(self, token_id: int, skip_special: bool) -> bytes:
        return b"" if skip_special and token_id in self._hidden else self.token_bytes(token_id)

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id) if token_id < MAX_VOCABULARY else None
        if token is None:
            return b""
        if self._byte_level:
            table = byte_of_character()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()  # sentencepiece's visible space


# ---- checks -------------------------------------------------------------------------------------


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"the text must be a string, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise RequestError(
            f"the text has {len(text)} characters; the limit is {MAX_TEXT}, split it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}; it is no valid Unicode, decode its source with errors='replace'"
        ) from None


def _check_id(token_id: object) -> None:
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
        raise RequestError(f"a token id must be a whole number, not {token_id!r}")
    if token_id.__index__() < 0:
        raise RequestError(f"token id {token_id} is negative")


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _guard(call: Callable[[], T]) -> T:
    """Run a call of the library; its Rust panics (a runaway pattern) become a TokenizerError."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the tokenizer failed on this text: {error}") from None


def _adds_bos(backend: tokenizers.Tokenizer, settings: dict[str, Any], bos_id: int) -> bool:
    """Follow ``add_bos_token``; without it the post-processor, or OPT's custom."""
    said = settings.get("add_bos_token")
    if isinstance(said, bool):
        return said
    if settings.get("tokenizer_class") in _GENERIC_CLASSES:
        return bool(backend.encode("a").ids[:1] == [bos_id])
    return True
