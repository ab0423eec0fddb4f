"""Bytes as hostile or broken files hold them, with what has to be said of them."""

from __future__ import annotations

MARK = b"\xef\xbb\xbf"
OBJECTS = {
    "cut": (b'{"a": "', "not JSON"),
    "a list": (b"[1]", "a list, but an object with named fields is expected"),
    "null": (b"null", "a NoneType, but an object with named fields is expected"),
    "a text": (b'"a"', "a str, but an object with named fields is expected"),
    "a field twice": (b'{"a": 1, "b": {"c": 1, "c": 1}}', "refused (the field 'c' stands twice)"),
    "NaN": (b'{"a": [NaN]}', "refused (NaN is no number of JSON)"),
    "infinity": (b'{"a": -Infinity}', "refused (-Infinity is no number of JSON)"),
    "a number beyond floats": (b'{"a": 1e999}', "refused (a number too large)"),
    "5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "refused (a whole number of 5000 digits)"),
    "41 digits": (b'{"a": ' + b"9" * 41 + b"}", "refused (a whole number of 41 digits)"),
    "a deep nest": (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "refused (nested more than 32 levels deep)"),
    "a bottomless nest": (b'{"a": ' + b"[" * 200_000, "refused (nested more than 32 levels deep)"),
    "half a character": (b'{"a": [{"b": "x \\ud83d"}]}', r"refused (half a character, \ud83d: write the whole one)"),
    "the other half": (b'{"a": "\\ude00 x"}', r"refused (half a character, \ude00: write the whole one)"),
    "half a character as a field": (b'{"\\ud83d": 1}', r"refused (half a character, \ud83d: write the whole one)"),
    "a raw NUL": (b'{"a": "x\0y"}', "not JSON (Invalid control character at)"),
    "a second mark": (MARK + MARK + b"{}", "not JSON (Unexpected UTF-8 BOM"),
}
"""Bytes that are no object of ours, and the words for it behind the name of the file or the line."""
BYTES = {
    "latin-1": (b'{"a": "caf\xe9"}', "invalid continuation byte"),
    "half a character in bytes": (b'{"a": "\xed\xa0\xbd"}', "invalid continuation byte"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "invalid start byte"),
}
"""Bytes that are no text, and the reason."""
