"""Which files make a model, an adapter or what else is kept in safetensors, wherever they come from."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from operators.artifact import (
    CARRIED,
    REWRITES,
    Adapter,
    Artifact,
    Datastore,
    Delta,
    Editor,
    Memory,
    Model,
    Statistics,
    kind_of,
)
from operators.data.row_files import may_hold_rows
from operators.models.ensemble_files import EXPERTS, LEARNT, MEMBERS, is_ensemble, members_in
from operators.models.foreign_code import PICKLES, foreign_code, only_pickles

OURS = (Delta, Statistics, Editor, Memory, Datastore)  # each `kind.safetensors` with `kind.json` beside it
STEMS: dict[type[Artifact], str] = {Model: "model", Adapter: "adapter_model", **{kind: kind_of(kind) for kind in OURS}}
CONFIGS: dict[type[Artifact], tuple[str, ...]] = {
    Model: ("config.json", REWRITES),
    Adapter: ("adapter_config.json", REWRITES),
    **{kind: (f"{kind_of(kind)}.json",) for kind in OURS},
}
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".faiss", CARRIED)  # configs, tokenizers, indexes, facts


def lacking(kind: type[Artifact], names: Sequence[str]) -> tuple[str, str] | None:
    """What keeps a folder with these files from being of a kind, as a clause, and what to do about it."""
    if kind not in STEMS:
        return None
    if not set(CONFIGS[kind]) & set(names):
        writer = "lfm" if kind in OURS else "save_pretrained"
        return f"has no {CONFIGS[kind][0]}", f"Give a folder as {writer} writes it ({kind_of(kind)})."
    if weights(kind, names):
        return None
    wanted = f"{STEMS[kind]}.safetensors"
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        return only_pickles(pickles[0], wanted)
    return f"holds no weights, expected {wanted}", "Check what the folder is."


def damaged(kind: type[Artifact], folder: Path) -> tuple[str, str] | None:
    """What keeps a folder from being loaded, by its configs, as `lacking` says it."""
    if kind not in STEMS:
        return None
    for name in (*CONFIGS[kind], "tokenizer_config.json", f"{STEMS[kind]}.safetensors.index.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            holds = isinstance(json.loads(path.read_bytes()), dict)
        except ValueError:
            holds = False
        if not holds:
            return f"holds a {name} that is no JSON object", "Save the folder again, or fetch it anew."
    if kind is Adapter and (folder / REWRITES).is_file():
        from operators.models.rewrites import unreadable  # with torch, which few plans need

        return unreadable(folder) or foreign_code(folder)
    if kind is Model and is_ensemble(folder):
        from operators.models import ensembles  # the same

        inside = sorted((folder / MEMBERS).glob("*"))
        return ensembles.unreadable(folder) or next(filter(None, (damaged(kind, one) for one in inside)), None)
    return foreign_code(folder)


def leading_out(kind: type[Artifact], folder: Path, files: Iterable[Path]) -> tuple[str, str] | None:
    """A file that is a link to somewhere else, as `lacking` says it.

    The hub's own cache is made of links: a snapshot's lead to the ``blobs`` beside all snapshots.
    """
    if kind not in STEMS:
        return None
    root = folder.resolve()
    inside = [root, *(p.parent / "blobs" for p in (root, *root.parents) if p.name == "snapshots")]
    for file in files:
        target = file.resolve()
        if not any(target.is_relative_to(one) for one in inside):
            name = file.relative_to(folder).as_posix()
            what = f"holds {name!r}, a link that leads out of it (to {str(target)!r}), expected files of its own"
            return what, "Copy the file to where the link is."
    return None


def weights(kind: type[Artifact], names: Sequence[str]) -> list[str]:
    """The files that hold the tensors of a kind: one file, or an index and what it names; of each of several models."""
    found = _weights(STEMS[kind], names)
    members = members_in(names)
    if found or kind is not Model or not members or REWRITES not in names:
        return found
    each = {inside: weights(kind, files) for inside, files in members.items()}
    apart = [*_weights(EXPERTS, names), *_weights(LEARNT, names)]
    return [*(f"{inside}{n}" for inside, found in each.items() for n in found), *apart] if all(each.values()) else []


def _weights(stem: str, names: Sequence[str]) -> list[str]:
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if single in names:
        return [single]
    shards = [n for n in names if re.fullmatch(rf"{stem}-[^/]*\.safetensors", n)]
    return [index, *shards] if index in names and shards else []


def headed(kind: type[Artifact], names: Sequence[str]) -> list[str]:
    """Those of the files worth fetching whose headers say something."""
    return needed(kind, names) if kind in STEMS else [n for n in names if may_hold_rows(PurePath(n))]


def needed(kind: type[Artifact], names: Sequence[str]) -> list[str]:
    """The files worth fetching: of a model no second copy of its weights in another format, of data no pickles."""
    if kind not in STEMS:
        return [n for n in names if not n.endswith(PICKLES)]
    chosen = weights(kind, names)
    own = {n.rpartition("/")[0] for n in chosen} | {""}  # of a model that is made of several those of each
    beside = [n for n in names if n.rpartition("/")[0] in own and n.endswith(BESIDE) and not n.endswith(".index.json")]
    return [*chosen, *beside]
