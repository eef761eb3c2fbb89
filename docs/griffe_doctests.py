"""Griffe extension of the documentation site: usage examples in docstrings are shown as code."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).*)*", re.MULTILINE)  # from a prompt to the next empty line


class Doctests(griffe.Extension):
    """Put a fence around each doctest."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the text of the docstring in place."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda example: f"```pycon\n{example[0]}\n```", obj.docstring.value)
