"""Labels as the model writes them, and the template around texts and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optlm.errors import RequestError

__all__ = ["Example", "Template", "verbalized"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text with its label: a shot, or an item whose answer is known."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Template:
    r"""How a text becomes a prompt that a label continues.

    Attributes:
        prompt: with ``{text}`` once; it does not end in white space, labels begin with it.
        instruction: before everything.
        between: between shots, and between the last and the query.

    Raises:
        RequestError: no or several places for the text, or white space at the end.
    """

    prompt: str = "{text}\nLabel:"
    instruction: str = ""
    between: str = "\n\n"

    def __post_init__(self) -> None:
        if self.prompt.count("{text}") != 1:
            raise RequestError(
                f"the template {self.prompt!r} must have one place for the text, written {{text}}"
            )
        if self.prompt != self.prompt.rstrip():
            raise RequestError(
                f"the template {self.prompt!r} ends in white space, which tokens keep with the "
                "word that follows; leave it out, labels begin with a space"
            )

    def query(self, text: str) -> str:
        return self.prompt.replace("{text}", text)

    @property
    def domain(self) -> str:
        """What follows the text: the label's context when there is no text (PMI)."""
        return self.prompt.split("{text}")[1].strip()


def verbalized(labels: Sequence[str] | Mapping[str, str], terminator: str = "") -> dict[str, str]:
    """Labels by name, as the model is to write them: a space, the name, the terminator.

    Args:
        labels: names; or names with what stands for each, taken as it is.
        terminator: put after each, such as a line break, so that no label begins another.

    Raises:
        RequestError: fewer than two, an empty or repeated one, or one that begins another.
    """
    if isinstance(labels, str):
        raise RequestError(f"labels are a list of names, not the text {labels!r:.80}")
    if isinstance(labels, Mapping):
        named = {str(name): f"{text}{terminator}" for name, text in labels.items()}
    else:
        if len(set(labels)) < len(labels):
            raise RequestError(f"a label is given twice: {', '.join(map(repr, labels))}")
        named = {name: f" {name}{terminator}" if name.strip() else "" for name in labels}
    if len(named) < 2:
        raise RequestError(f"there must be at least two labels to choose from, not {len(named)}")
    for name, text in named.items():
        if not text.strip():
            raise RequestError(f"the label {name!r} is empty; every label needs text to score")
    for name, text in named.items():
        for other, longer in named.items():
            if name != other and longer.startswith(text):
                raise RequestError(
                    f"the label {name!r} begins the label {other!r}, so it is likelier whatever "
                    r"the text; set a terminator such as '\n', or choose other words"
                )
    return named
