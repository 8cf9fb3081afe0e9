"""Passwords and tokens inside of URIs: a run writes down where things are, so they must not come along."""

import re

from lfm.errors import LfmError

_WORDS = "password|passwd|pwd|secret|token|signature|credential|odbc_connect"
_HIDDEN = (
    (r"(\bhttps?://)[^/?#\s]*@", r"\1...@"),  # a name alone may be a token
    (r"(\b(?!https?:)[\w+.-]+://[^:/?#@\s]*:)[^@\s]*@", r"\1...@"),  # a database's password may hold a slash
    (rf"([?&][^=&\s]*(?:{_WORDS})[^=&\s]*=)[^&#\s]+", r"\1..."),
)


class SecretInUri(LfmError, ValueError):
    """A URI that must not be written down."""

    def __init__(self, where: str, masked: str, fix: str) -> None:
        super().__init__(where, masked, fix)
        self.where, self.masked, self.fix = where, masked, fix

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.masked!r} holds a password or a token, which would be written down, expected none. "
            f"{self.fix}"
        )


def masked(text: str) -> str:
    """A URI, or a text with URIs in it, without their passwords and tokens; the same where it holds none."""
    for pattern, replacement in _HIDDEN:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
    return text


def check_uri(where: str, uri: str, fix: str) -> None:
    """Raise `SecretInUri` where a URI holds a password or a token."""
    if (shown := masked(uri)) != uri:
        raise SecretInUri(where, shown, fix)
