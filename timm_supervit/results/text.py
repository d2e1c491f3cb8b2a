"""Text from files (names of classes and files, results) shown as text, wherever it would mean something else.

Terminals obey escape sequences, Markdown its marks and HTML, spreadsheets formulas. For pictures see ``plain_text``.
"""
import re
import unicodedata


def visible(text: str, keep: str = '') -> str:
    r"""Return text with what is not seen (control, bidirectional and broken characters) as escapes, such as ``\x1b``.

    Args:
        text: The text.
        keep: Characters to leave, such as the line breaks of a message.
    """
    return ''.join(
        char.encode('unicode_escape').decode() if char not in keep and _is_unseen(char) else char for char in text)


def _is_unseen(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] == 'C' or category in ('Zl', 'Zp')  # control, format, surrogate, ...; line separators


def markdown(text: str) -> str:
    """Return text for a line or table cell of Markdown, without links, HTML, mathematics or any other mark."""
    return re.sub(r'([\\`*_{}\[\]<>#|~$&!:@^"])', r'\\\1', visible(text))


def spreadsheet(text: str) -> str:
    """Return text for a cell of CSV; what a spreadsheet would take for a formula gets an apostrophe before it."""
    text = visible(text)
    return f"'{text}" if text.lstrip().startswith(('=', '+', '-', '@')) else text
