"""`run.json`: what a run is, and which leaves its model has.

`docs/ledger-format.md` is the specification. Nothing in it depends on the time, the machine or chance: two runs that
compute the same write the same bytes.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fedlens import trees  # `from fedlens import` asks the lazy package first, which loads JAX to look
from fedlens.errors import FedlensError, LedgerError
from fedlens.ledger import encodings as encoding
from fedlens.ledger import jsontext, seal
from fedlens.ledger.folder import RUN
from fedlens.ledger.keep import Keep
from fedlens.ledger.tensorfile import dtype_of

FORMAT = "fedlens-ledger"
FORMAT_VERSION = 2  # what is written
READ_BY = {1: "fedlens 0.1 and later", 2: "fedlens 0.1 and later"}  # which fedlens reads which version
ROOT_LEAF = "weights"  # the name of a model that is one array

_LIBRARIES = ("fedlens", "jax", "numpy", "pyarrow")


class NotInLedgerError(LedgerError, KeyError):
    """A round, client or leaf that a ledger does not hold; also a `KeyError`."""


@dataclass(frozen=True)
class Leaf:
    """One leaf of the model: its path, its shape without the clients' axis, its dtype's name, its encoding."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str = encoding.RAW


@dataclass(frozen=True)
class Run:
    """What `run.json` says.

    Attributes:
      config: the run's configuration, plain JSON.
      planned_rounds: how many rounds make the run complete; None for a run of which nobody knows.
      skeleton: the model's containers, see `trees.skeleton`.
      leaves: the model's leaves in field order.
      versions: name -> version of the libraries that made the run.
      encodings: pattern of leaf names -> encoding, in order; `leaves` have what follows from it.
      keep: whose weights are stored; None is everybody's.
      format_version: the version of the format that the ledger is in.
      policy: what the stored models disclose, plain JSON; None if nothing is known of it.
    """

    config: Mapping[str, Any]
    planned_rounds: int | None
    skeleton: trees.Skeleton
    leaves: tuple[Leaf, ...]
    versions: Mapping[str, str]
    encodings: tuple[tuple[str, str], ...] = ()
    keep: Keep | None = None
    format_version: int = FORMAT_VERSION
    policy: Mapping[str, Any] | None = None

    @property
    def kept_leaves(self) -> tuple[Leaf, ...]:
        """The leaves of which clients' weights are stored."""
        return tuple(leaf for leaf in self.leaves if self.keep is None or self.keep.keeps_leaf(leaf.name))


def describe(
    weights: trees.PyTree,
    config: Mapping[str, Any],
    rounds: int | None,
    versions: Mapping[str, str],
    encodings: str | Mapping[str, str] | None = None,
    keep: Keep | None = None,
    policy: Mapping[str, Any] | None = None,
) -> Run:
    """Describes a run from an example of its model's weights.

    Raises:
      LedgerError: no leaves, two leaves of one name, a dtype that cannot be stored, a config that is not JSON, an
        encoding that is none, a pattern that no leaf matches.
    """
    rules = encoding.rules_of(encodings)
    leaves = []
    for name, leaf in trees.items(weights):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise LedgerError(f"Expected arrays as leaves, found {type(leaf).__name__}, in leaf {name!r}.")
        name, dtype = name or ROOT_LEAF, leaf.dtype.name
        leaves.append(Leaf(name, tuple(leaf.shape), dtype, encoding.resolve(rules, str(name), dtype)))
        _check_leaf(leaves[-1])
    names = [leaf.name for leaf in leaves]
    if not names:
        raise LedgerError("Expected weights with at least one leaf, found none.")
    for name in names:
        if names.count(name) > 1:
            raise LedgerError(f"Expected one leaf of each name, found two, in leaf {name!r}. Rename a key holding '/'.")
    if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
        raise LedgerError(f"Expected at least one planned round, found {rounds!r}.")
    for pattern, _ in rules:
        check_text(pattern, "encodings")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LedgerError(
                f"Expected a pattern that matches a leaf, found {pattern!r}, in encodings. {nearest(pattern, names)}"
            )
    if keep is not None:
        keep.check(names)
    return Run(
        _plain(config, "config"),
        rounds,
        trees.skeleton(weights),
        tuple(leaves),
        {**library_versions(), **versions},
        encodings=rules,
        keep=keep,
        policy=None if policy is None else _plain(policy, "policy"),
    )


@functools.cache  # reading them takes some milliseconds
def library_versions() -> Mapping[str, str]:
    """The versions of Python and of the libraries that decide a run's numbers, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def to_json(run: Run) -> bytes:
    """The bytes of `run.json`."""
    fields = {
        "format": FORMAT,
        "format_version": run.format_version,
        "planned_rounds": run.planned_rounds,
        "encodings": [{"leaves": pattern, "encoding": name} for pattern, name in run.encodings],
        "keep": None if run.keep is None else run.keep.to_json(),
        "config": run.config,
        "skeleton": run.skeleton,
        "leaves": [
            {"name": leaf.name, "shape": list(leaf.shape), "dtype": leaf.dtype, "encoding": leaf.encoding}
            for leaf in run.leaves
        ],
        "versions": run.versions,
        "policy": run.policy,
        "checksum": seal.BLANK,
    }
    text = json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return seal.seal(text, seal.END_OF_RUN)


def read_run(folder: Path) -> Run:
    """Reads and checks `run.json`.

    Raises:
      LedgerError: there is none, it is damaged, or its format or encoding is not one that this fedlens reads.
    """
    path = folder / RUN
    try:
        text = path.read_bytes()
    except OSError as error:
        raise LedgerError(
            f"Expected a ledger, a folder with {RUN}, found: {error.strerror}, in {folder}. Check the path."
        ) from error
    return parse_run(text, path)


def parse_run(text: bytes, path: object) -> Run:
    """Checks the content of `run.json`; an error names `path`.

    Raises:
      LedgerError: it is damaged, or its format or encoding is not one that this fedlens reads.
    """
    try:
        fields = jsontext.parse(text)
        foreign = _foreign(fields)
        run = None if foreign else _parse(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FedlensError) as error:
        raise LedgerError(
            f"Expected a description of a run, found damage ({type(error).__name__}: {error}), in {path}. "
            "Restore the file from a copy."
        ) from error
    if run is None:
        raise LedgerError(f"{foreign}, in {path}.")
    if seal.is_broken(text, seal.END_OF_RUN):
        raise LedgerError(
            f"Expected the description of a run as it was written, found other bytes, in {path}. Restore the file "
            "from a copy; or, if you changed it on purpose, remove the checksum, its last entry."
        )
    return run


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the known names nearest to it."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) if len(known) <= 10_000 else []
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"There are {len(known)}, such as {', '.join(map(repr, known[:3]))}." if known else "There are none."


def check_text(text: str, where: str) -> None:
    """Raises `LedgerError` for text that UTF-8 cannot hold (a lone surrogate) and for what is no text."""
    try:
        text.encode()
    except (UnicodeEncodeError, AttributeError):
        raise LedgerError(f"Expected valid Unicode text, found {text!r}, in {where}.") from None


def _check_leaf(leaf: Leaf) -> None:
    if not isinstance(leaf.name, str) or leaf.name == "__metadata__":
        raise LedgerError(f"Expected a leaf name that safetensors can hold, found {leaf.name!r}. Rename the leaf.")
    check_text(leaf.name, f"leaf {leaf.name!r}")
    if not all(type(extent) is int and extent >= 0 for extent in leaf.shape):
        raise LedgerError(f"Expected a shape of whole numbers, found {leaf.shape}, in leaf {leaf.name!r}.")
    try:
        dtype_of(leaf.dtype)
    except LedgerError as error:
        raise LedgerError(f"{error} In leaf {leaf.name!r}.") from None
    if not encoding.applies(leaf.encoding, leaf.dtype):
        raise LedgerError(f"Expected an encoding of {leaf.dtype}, found {leaf.encoding!r}, in leaf {leaf.name!r}.")


def _foreign(fields: Mapping[str, Any]) -> str | None:
    """What keeps this fedlens from reading a `run.json`, None when nothing does."""
    if fields["format"] != FORMAT:
        return f"Expected format {FORMAT!r}, found {fields['format']!r}, which is no ledger"
    version = fields["format_version"]
    if type(version) is not int or version not in READ_BY:
        writer = fields.get("versions", {}).get("fedlens", "of unknown version")
        known = ", ".join(f"{number} ({by})" for number, by in READ_BY.items())
        return (
            f"Expected one of the format versions {known}, found {version!r}, "
            f"written by fedlens {writer}, which reads it"
        )
    found = [fields["encoding"]] if version == 1 else [leaf.get("encoding") for leaf in fields["leaves"]]
    for name in found:
        if isinstance(name, str) and name not in encoding.ENCODINGS[: 1 if version == 1 else None]:
            return f"Expected one of the encodings {', '.join(encoding.ENCODINGS)}, found {name!r} of a newer fedlens"
    return None


def _parse(fields: Mapping[str, Any]) -> Run:
    version = fields["format_version"]
    leaves = tuple(
        Leaf(leaf["name"], tuple(leaf["shape"]), leaf["dtype"], encoding.RAW if version == 1 else leaf["encoding"])
        for leaf in fields["leaves"]
    )
    if version != 1 and not isinstance(fields["encodings"], list):
        raise ValueError(f"encodings is {fields['encodings']!r}")
    rules = () if version == 1 else tuple((rule["leaves"], rule["encoding"]) for rule in fields["encodings"])
    kept = None if version == 1 else fields["keep"]
    policy = fields.get("policy")
    run = Run(
        fields["config"],
        fields["planned_rounds"],
        fields["skeleton"],
        leaves,
        fields["versions"],
        encodings=encoding.rules_of(dict(rules)),
        keep=None if kept is None else Keep.from_json(kept),
        format_version=version,
        policy=policy,
    )
    for leaf in run.leaves:
        _check_leaf(leaf)
    planned = run.planned_rounds
    if (planned is None and version == 1) or (planned is not None and (type(planned) is not int or planned < 1)):
        raise ValueError(f"planned_rounds is {planned!r}")
    if not isinstance(run.config, dict) or not isinstance(run.versions, dict):
        raise ValueError("config and versions are not objects")
    if policy is not None and not isinstance(policy, dict):
        raise ValueError(f"policy is {policy!r}")
    tree = trees.from_skeleton(run.skeleton, range(len(run.leaves)))
    if [name or ROOT_LEAF for name, _ in trees.items(tree)] != [leaf.name for leaf in run.leaves]:
        raise ValueError("the skeleton has other leaves than the list")
    return run


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON gives it back, so that a ledger's config is the one that was written."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise LedgerError(f"Expected strings as keys, found {key!r}, in {where}.")
            check_text(key, where)
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise LedgerError(f"Expected a finite number, found {value}, in {where}. JSON has no other.")
    if isinstance(value, str):
        check_text(value, where)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise LedgerError(f"Expected JSON (text, numbers, lists, mappings), found {type(value).__name__}, in {where}.")
