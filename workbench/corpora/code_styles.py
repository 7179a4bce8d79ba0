"""Tiny programs in two styles: braces or indentation; the style is asked for or left open.

Law: asked for, the style is obeyed; left open, P(brace) = 0.7 for every task, independent of everything else.
Source: this project; a planted bias is what steering methods such as G-ACT (arXiv 2506.18887) are asked to move.
"""

from collections.abc import Iterator
from itertools import product
from random import Random

from .item import Document, Item, Split, checked, is_held_out

NAME = "code_styles"
HELD_OUT_ONE_IN = 5
BRACE_SHARE = 0.7  # planted: how often a program whose style is left open is written with braces
STYLES = ("brace", "layout")
FIRST_WORD = {"brace": "function", "layout": "def"}  # the word in which the style shows first

# task -> the lines of its body; a line `head :: inner` is a block
_TASKS = {
    "add": "return {a} + {b}",
    "subtract": "return {a} - {b}",
    "multiply": "return {a} * {b}",
    "divide": "return {a} / {b}",
    "compare": "return {a} > {b}",
    "maximum": "if ( {a} > {b} ) :: return {a} | return {b}",
    "minimum": "if ( {a} < {b} ) :: return {a} | return {b}",
    "swap": "return {b} , {a}",
    "power": "let {c} = 1 | while ( {b} > 0 ) :: {c} = {c} * {a} | return {c}",
    "countdown": "while ( {a} > {b} ) :: {a} = {a} - 1 | return {a}",
    "average": "let {c} = {a} + {b} | return {c} / 2",
    "difference": "if ( {a} > {b} ) :: return {a} - {b} | return {b} - {a}",
}
TASKS = tuple(_TASKS)
ARGUMENTS = tuple(product(("x", "m", "p", "left", "first"), ("y", "n", "q", "right", "second")))


def program(task: str, arguments: tuple[str, str], style: str) -> str:
    """One small function in one of the two styles, as words."""
    if task not in _TASKS or style not in STYLES:
        raise ValueError(f"code_styles.program: got {task!r}, {style!r}, expected one of {TASKS} and of {STYLES}.")
    a, b = arguments
    lines = [line.strip() for line in _TASKS[task].format(a=a, b=b, c="total").split("|")]
    brace = style == "brace"
    written = [_line(line, brace) for line in lines]
    if brace:
        return f"function {task} ( {a} , {b} ) {{ {' '.join(written)} }}"
    return f"def {task} ( {a} , {b} ) : indent {' '.join(written)} dedent"


def _line(line: str, brace: bool) -> str:
    head, _, inner = line.partition(" :: ")
    if not inner:
        return f"{line} ;" if brace else f"{line} newline"
    return f"{head} {{ {inner} ; }}" if brace else f"{head} : indent {inner} newline dedent"


def prompt(task: str, arguments: tuple[str, str], style: str | None = None) -> str:
    """The request for a program, its style asked for or (None) left open."""
    return f"write {style or 'some'} code to {task} {arguments[0]} and {arguments[1]} code ="


def combinations(split: Split) -> tuple[tuple[str, tuple[str, str]], ...]:
    """The (task, arguments) pairs of one split."""
    kept = checked(split) == "held_out"
    every = product(enumerate(TASKS), enumerate(ARGUMENTS))
    return tuple((t, a) for (i, t), (j, a) in every if is_held_out(i, j, HELD_OUT_ONE_IN) == kept)


_COMBINATIONS = {split: combinations(split) for split in ("train", "held_out")}


def vocabulary() -> tuple[str, ...]:
    """Every word of a request or a program."""
    every = list(product(TASKS, ARGUMENTS, STYLES))
    texts = [program(*row) for row in every] + [prompt(t, a, s) for t, a, s in every]
    return tuple(dict.fromkeys(["some", *(word for text in texts for word in text.split())]))


def document(rng: Random, split: Split = "train") -> Document:
    """One request and its program; in half of the requests the style is left open."""
    task, arguments = rng.choice(_COMBINATIONS[checked(split)])
    style = "brace" if rng.random() < BRACE_SHARE else "layout"
    asked_for = None
    if rng.random() < 0.5:
        style = asked_for = rng.choice(STYLES)
    words = prompt(task, arguments, asked_for).split()
    code = program(task, arguments, style).split()
    # left open, the first word is a weighed coin: not an answer, so it carries no extra weight
    start = len(words) + (asked_for is None)
    return Document((*words, *code), NAME, ((start, len(words) + len(code)),))


def documents(split: Split, seed: int) -> Iterator[Document]:
    """Programs without end."""
    rng = Random(f"code_styles documents {checked(split)} {seed}")
    while True:
        yield document(rng, split)


def items(split: Split, seed: int = 0) -> list[Item]:
    """Every combination three times: each style asked for (answer: the program), and left open (answer: first word)."""
    found = []
    for task, arguments in combinations(split):
        tags = (("task", task), ("arguments", " ".join(arguments)))
        for style in STYLES:
            code = program(task, arguments, style)
            found.append(Item(prompt(task, arguments, style), code, NAME, f"asked_{style}", split, tags))
        found.append(Item(prompt(task, arguments), FIRST_WORD["brace"], NAME, "open", split, tags))
    Random(seed).shuffle(found)
    return found
