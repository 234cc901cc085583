"""The small part of YAML that files like data.yaml use: keys with a text, a list or a mapping of texts.

A library for all of YAML would be a dependency for five lines, and could do more than a file of unknown origin should
ask for. What isn't understood below a key that is asked for is refused, with its line; other keys are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TypeAlias

from suanli.data.annotated import Files

Value: TypeAlias = "str | list[str] | dict[str, str]"
MAX_BYTES = 1 << 20
_KEY = re.compile(r"""(?P<key>[\w.-]+|'[^']*'|"[^"]*")\s*:(?:\s+(?P<value>.*)|$)""")
_REFUSED = ("&", "*", "!", "|", ">", "%", "@", "`", "? ")


def read_yaml(files: Files, path: str, keys: Collection[str]) -> dict[str, Value]:
    """The values of these keys at the top of the file, as far as they are there. Raises DataError."""
    if files.all_others[path].size_bytes > MAX_BYTES:
        raise files.error(path, "is too large for a description of a data set")
    values: dict[str, Value] = {}
    lines = list(_lines(files.text(path)))
    position = 0
    while position < len(lines):
        number, indent, text = lines[position]
        match = _KEY.fullmatch(text)
        if indent or match is None:
            raise files.error(path, f"has {text[:60]!r} where a key belongs", line=number)
        start = position = position + 1
        inline, key = (match["value"] or "").strip(), match["key"].strip("'\"")
        is_open = inline[:1] in ("[", "{")
        while position < len(lines) and (lines[position][1] or lines[position][2][:1] in ("-", "]", "}")):
            position += 1
        if key not in keys:
            continue
        if key in values:
            raise files.error(path, f"has the key {key!r} twice", line=number)
        block = lines[start:position]
        try:
            if is_open:
                values[key] = _parse_inline(" ".join([inline, *(text for _, _, text in block)]))
            elif inline and not block:
                values[key] = _scalar(inline)
            else:
                values[key] = _parse_block([text for _, _, text in block] if not inline else [inline])
        except ValueError as error:
            raise files.error(path, f"has a value of {key!r} that can't be read: {error}", line=number) from error
    return values


def _lines(text: str) -> Iterator[tuple[int, int, str]]:
    """Number, indentation and content of each line that has some."""
    for number, line in enumerate(text.splitlines(), start=1):
        content = _strip_comment(line.expandtabs(4)).rstrip()
        if content.strip() and content.strip() not in ("---", "..."):
            yield number, len(content) - len(content.lstrip()), content.strip()


def _strip_comment(line: str) -> str:
    quote = ""
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (i == 0 or line[i - 1] in " [{,:-"):
            quote = character
        elif character == "#" and (i == 0 or line[i - 1] == " "):
            return line[:i]
    return line


def _parse_block(lines: list[str]) -> Value:
    if not lines:
        return ""
    if all(line.startswith("- ") or line == "-" for line in lines):
        return [_scalar(line[1:].strip()) for line in lines]
    pairs: dict[str, str] = {}
    for line in lines:
        match = _KEY.fullmatch(line)
        if match is None:
            raise ValueError(f"{line[:60]!r} is neither an entry of a list nor a key with a value")
        _add(pairs, match["key"], (match["value"] or "").strip())
    return pairs


def _parse_inline(text: str) -> Value:
    closing = {"[": "]", "{": "}"}[text[0]]
    if not text.endswith(closing):
        raise ValueError(f"a {closing!r} is missing")
    parts = _split(text[1:-1])
    if text[0] == "[":
        return [_scalar(part) for part in parts]
    pairs: dict[str, str] = {}
    for part in parts:
        key, colon, value = part.partition(":")
        if not colon:
            raise ValueError(f"{part[:60]!r} is no key with a value")
        _add(pairs, key.strip(), value.strip())
    return pairs


def _add(pairs: dict[str, str], key: str, value: str) -> None:
    key = _scalar(key)
    if key in pairs:
        raise ValueError(f"the key {key!r} is there twice")
    pairs[key] = _scalar(value)


def _split(text: str) -> list[str]:
    """At the commas outside of quotes."""
    parts, quote = [""], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not parts[-1].strip():
            quote = character
        elif character == ",":
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _scalar(text: str) -> str:
    if text[:1] in ("'", '"'):
        if len(text) < 2 or text[-1] != text[0]:
            raise ValueError(f"the quote of {text[:60]} isn't closed")
        inner = text[1:-1]
        return inner.replace("''", "'") if text[0] == "'" else inner.replace('\\"', '"').replace("\\\\", "\\")
    if text.startswith(_REFUSED) or text[:1] in ("[", "{"):
        raise ValueError(f"{text[:60]!r} isn't a plain text, list or mapping")
    return text
