"""The tokens of a model's folder, read without the libraries that tokenize."""

import hashlib
import json
from pathlib import Path

from lfm.errors import LfmError


class UnreadableTokenizer(LfmError, ValueError):
    """A `tokenizer.json` that does not say what its tokens are."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: no vocabulary in it, expected what save_pretrained writes. Save the tokenizer again."


def tokens(folder: Path, *, added: bool = True) -> dict[int, str] | None:
    """The tokens by number, as `tokenizer.json` has them; None without one.

    Args:
        folder: A model's.
        added: With those that were added to the vocabulary, which a fine-tuned model may have named anew.

    Raises:
        UnreadableTokenizer: The file has no tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_bytes())
        vocabulary = stored["model"].get("vocab", {})
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
        found = {number: token for token, number in pairs}
        return found | {t["id"]: t["content"] for t in stored.get("added_tokens") or () if added}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UnreadableTokenizer(str(path)) from error


def digest(folder: Path) -> str:
    """Of a folder's tokens and their numbers; empty where there is no `tokenizer.json` to read them from."""
    found = tokens(folder)
    return "" if found is None else hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
