"""A lesson as text, and as a page on which each number tells what made it.

    print(f"V = {number(0.75, '.4f', 'V')}")        a marked number, inside of any text
    with marked() as lesson: ..                     it is printed plainly, and kept with its marks
    write_page(path, title, lesson.text, made)      made: {"V": Made(formula, module, line)}
"""
import contextlib
import html
import io
import re
import sys
import unicodedata
from pathlib import Path
from string import Template
from typing import NamedTuple

PAGE = Path(__file__).with_name("lesson.html")
# A mark: where it begins, its name, the text, where it ends. The signs stand in no text.
BEGIN, MIDDLE, END = "\x02", "\x03", "\x04"
MARK = re.compile(f"{BEGIN}([^{MIDDLE}]*){MIDDLE}([^{END}]*){END}")


class Made(NamedTuple):
    """What made a number: its formula, and the line of the code that computes it."""
    formula: str
    module: object
    line: str  # or a part of it, that stands in no other line of the module

    def place(self):
        """(file:line, the whole line). Raises ValueError where no line, or several, are found."""
        path = Path(self.module.__file__)
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(lines, 1) if self.line in line]
        if len(found) != 1:
            raise ValueError(f"{path.name} has {len(found)} lines with {self.line!r}")
        return f"{path.name}:{found[0]}", lines[found[0] - 1].strip()


def number(value, form, name):
    """A number in a format such as "9.3f", marked with the name of what made it."""
    text = f"{value:{form}}"
    room = len(text) - len(text.lstrip())
    return " " * room + f"{BEGIN}{name}{MIDDLE}{text[room:]}{END}"


def plain(text):
    """A text without its marks."""
    return MARK.sub(r"\2", text)


def fit(text, width):
    """The beginning of a text on one line, filled up with spaces to `width` columns.

    Letters of East Asia take two columns.
    """
    text = repr(text)[1:-1] or "(nothing)"
    while columns(text) > width:
        text = text[:-1]
    return text + " " * (width - columns(text))


def columns(text):
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Printed(io.TextIOBase):
    """A stdout that prints texts without their marks. `text` is all of it, with them."""

    def __init__(self, out):
        self.out, self.text = out, ""

    def write(self, text):
        """Print a text that holds whole marks."""
        self.text += text
        return self.out.write(plain(text))

    def flush(self):
        """Flush what lies behind it."""
        self.out.flush()


@contextlib.contextmanager
def marked():
    """For the length of a `with`, prints marked texts plainly. Gives the Printed."""
    printed = Printed(sys.stdout)
    with contextlib.redirect_stdout(printed):
        yield printed


def write_page(path, title, text, made):
    """Write a marked text as one HTML file. made: {name of a mark: its Made}."""
    def explained(mark):
        name, shown = mark.groups()
        place, line = made[name].place()
        what = [html.escape(part) for part in (made[name].formula, f"{place}    {line}")]
        return (f'<span tabindex="0" data-formula="{what[0]}" data-place="{what[1]}">'
                f"{shown}</span>")
    body = MARK.sub(explained, html.escape(text, quote=False))
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(title=html.escape(title),
                                                                 lesson=body)
    Path(path).write_text(page, encoding="utf-8")
