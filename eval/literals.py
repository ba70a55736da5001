"""Values as people type them on a command line."""

from __future__ import annotations

import ast

CONSTANTS = {"true": "True", "false": "False", "none": "None"}


def parse_settings(items: list[str], flag: str) -> dict[str, object]:
    """`NAME=VALUE` items; values are Python literals, true, false and none in any case, otherwise text.

    Raises:
        ValueError: an item without `=`; the message names the `flag`.
    """
    found = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign:
            raise ValueError(f"{flag} takes NAME=VALUE, got {item!r}")
        found[name.strip().replace("-", "_")] = parse_value(text)
    return found


def parse_value(text: str) -> object:
    """A Python literal, or the text itself."""
    text = CONSTANTS.get(text.strip().lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_outside_brackets(text: str) -> list[str]:
    """At commas that are in no bracket: `windows=((1, 8, 8), 'HWF'),threshold=-1` has two parts."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]
