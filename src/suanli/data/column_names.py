"""The names that the columns of tables and data frames usually have."""

from __future__ import annotations

LABEL_NAMES = ("label", "labels", "class", "target", "category", "y", "sentiment", "class_name", "label_name")
PATH_NAMES = ("path", "file", "filename", "file_name", "image", "filepath", "file_path", "image_path")
TEXT_NAMES = (
    *("text", "sentence", "content", "review", "comment", "title", "question", "body", "document"),
    *("message", "tweet", "utterance", "query"),
)
