"""How each set becomes text, in the style of GPT-3 (Brown et al. 2020, arXiv 2005.14165, app. G).

The OPT paper (Zhang et al. 2022, arXiv 2205.01068, section 3.1 and appendix A) follows "the prompts
and overall experimental setup" of GPT-3. A prompt never ends in a space; an answer begins with one.
"""

from __future__ import annotations

import re

from optlm.evaluate.data import Item

__all__ = ["ENTITY", "choices_of", "mark", "yes_no"]

ENTITY = "@placeholder"
_SENTENCE_END = re.compile(r"(?<=[.!?] )(?=[a-z][^.!?]*$)")


def choices_of(item: Item) -> list[str]:
    return [f" {choice}" for choice in item["choices"]]


def yes_no(item: Item) -> list[str]:
    """The answers of class 0 and class 1."""
    return [" no", " yes"]


def hellaswag(item: Item) -> str:
    """As the harness has it: what begins after the last sentence begins with a capital."""
    context: str = item["context"]
    found = _SENTENCE_END.search(context)
    if found is None:
        return context
    place = found.start()
    return context[:place] + context[place].upper() + context[place + 1 :]


def bare_question(item: Item) -> str:
    return str(item["question"])


def question_answer(item: Item) -> str:
    return f"Question: {item['question']}\nAnswer:"


def copa(item: Item) -> str:
    """The premise as the beginning of a sentence that the choice ends."""
    word = {"cause": "because", "effect": "therefore"}[item["relation"]]
    return f"{item['premise'].rstrip().rstrip('.')} {word}"


def copa_choices(item: Item) -> list[str]:
    return [f" {choice[:1].lower()}{choice[1:]}" for choice in item["choices"]]


def boolq(item: Item) -> str:
    return f"{item['passage']}\nquestion: {item['question'].rstrip('?')}?\nanswer:"


def cb(item: Item) -> str:
    hypothesis = item["hypothesis"].rstrip(".")
    return f"{item['premise']}\nquestion: {hypothesis}. true, false, or neither?\nanswer:"


def cb_choices(item: Item) -> list[str]:
    """Entailment, contradiction, neutral: classes 0, 1 and 2."""
    return [" true", " false", " neither"]


def wic(item: Item) -> str:
    return (
        f"{item['sentence1']}\n{item['sentence2']}\n"
        f"question: Is the word '{item['word']}' used in the same way in the two sentences above?\n"
        "answer:"
    )


def wsc(item: Item) -> str:
    """As multiple choice (the OPT paper, section 3.1), in the harness's words."""
    text = mark(item["text"], item["span2_index"], item["span2"])
    return (
        f"Passage: {text}\n"
        f'Question: In the passage above, does the pronoun "*{item["span2"]}*" refer to '
        f'"*{item["span1"]}*"?\nAnswer:'
    )


def mark(text: str, word_index: int, span: str) -> str:
    """Put asterisks around the words of `span`, which begin at the word number `word_index`."""
    words = text.split(" ")
    last = word_index + len(span.split()) - 1
    if last >= len(words):
        return text
    words[word_index] = f"*{words[word_index]}"
    words[last] = f"{words[last]}*"
    return " ".join(words)


def winograd_contexts(item: Item) -> list[str]:
    """The sentence up to the pronoun, which each candidate replaces ("partial evaluation")."""
    return [str(option) for option in item["context_options"]]


def winograd_choices(item: Item) -> list[str]:
    return [f" {item['continuation']}"] * len(item["context_options"])


def record(item: Item) -> str:
    """The passage, its highlights as a list that the answer goes on with."""
    return str(item["passage"]).replace("\n@highlight\n", "\n- ").replace("@highlight\n", "- ")


def record_choices(item: Item) -> list[str]:
    return [f"\n- {item['query'].replace(ENTITY, entity)}" for entity in item["entities"]]


def ethos(item: Item) -> str:
    """A yes/no question after the text in quotes, as Chiu et al. 2021 (arXiv 2103.12407) ask."""
    return f'Is the following text in quotes hate speech?\n"{item["text"]}"\nanswer:'


def crows_pair(item: Item) -> list[str]:
    return [item["sent_more"], item["sent_less"]]


def blimp_pair(item: Item) -> list[str]:
    return [item["good"], item["bad"]]


def code(item: Item) -> str:
    return str(item["prompt"]).rstrip("\n")
