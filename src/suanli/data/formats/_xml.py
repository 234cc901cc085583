"""Reads XML within limits: no document type, so no entities, which could read files or fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from suanli.data.annotated import Files

MAX_DEPTH = 64


@dataclass(slots=True)
class Element:
    tag: str
    attributes: dict[str, str]
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, tag: str) -> Element | None:
        """The first child of this tag."""
        return next((child for child in self.children if child.tag == tag), None)

    def find_all(self, *tags: str) -> Iterator[Element]:
        return (child for child in self.children if child.tag in tags)

    def get(self, tag: str) -> str:
        """The text of the first child of this tag; empty where there is none."""
        child = self.find(tag)
        return "" if child is None else child.text.strip()


def read_xml(files: Files, path: str) -> Element:
    """The root of a file. Raises DataError, with the line."""
    parser = expat.ParserCreate()
    open_elements: list[Element] = []
    roots: list[Element] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(open_elements) >= MAX_DEPTH:
            raise ValueError(f"has more than {MAX_DEPTH} elements inside of each other")
        element = Element(tag, attributes, parser.CurrentLineNumber)
        (open_elements[-1].children if open_elements else roots).append(element)
        open_elements.append(element)

    def end(tag: str) -> None:  # noqa: ARG001
        open_elements.pop()

    def add_text(text: str) -> None:
        if open_elements:
            open_elements[-1].text += text

    def refuse(*_: object) -> None:
        raise ValueError("has a document type (DOCTYPE), which could hold entities: suanli reads none")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, add_text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(files.read(path), True)
    except expat.ExpatError as error:
        raise files.error(path, f"is no XML that can be read: {error}", line=error.lineno) from error
    except (ValueError, LookupError) as error:  # LookupError: an encoding that doesn't exist
        raise files.error(path, str(error), line=parser.CurrentLineNumber) from error
    return roots[0]
