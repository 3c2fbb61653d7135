"""What a text must be before a tokenizer sees it."""

from __future__ import annotations

from kvcompile.ir.errors import Problem


def surrogate_problem(text: str, where: str) -> Problem | None:
    """What stands against a text that holds half of a character: JSON may name one, and so may arguments in another encoding than UTF-8.

    None for every text that has a UTF-8 form; the empty one does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is half of a character (a surrogate, U+{ord(text[error.start]):04X})."
        return Problem(where, found, "Write the whole character, or leave it out.")
    return None
