"""The configuration of an experiment: a TOML file, checked key by key, and kept in the ledger of its run.

A configuration chooses among what fedlens has, by name; it never names code to run, so that a file or a ledger from
somebody else can do no more than train a model.
"""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlens.cli.locate import line_of
from fedlens.errors import ConfigError
from fedlens.ledger import Keep

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # it becomes the name of a folder


class Section(BaseModel):
    """A part of a configuration: unknown keys and numbers written as text are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class HeldOut(Section):
    """Which share of every client's examples is kept for evaluation."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    held_out_seed: Seed = 0


class Digits(HeldOut):
    """Handwritten digits by form."""

    set: Literal["digits"]


class Shakespeare(HeldOut):
    """Shakespeare's plays by role."""

    set: Literal["shakespeare"]
    min_characters: Annotated[int, Field(ge=0)] = 1000
    max_sequences: Count | None = None


class CNN(Section):
    """`architectures.DigitsCNN`."""

    architecture: Literal["cnn"]
    channels: Annotated[list[Count], Field(min_length=1)] = [16, 32]
    dense: Count = 64


class Perceptron(Section):
    """`architectures.MLP`."""

    architecture: Literal["mlp"]
    hidden: list[Count] = [200, 200]


class LSTM(Section):
    """`architectures.CharacterLSTM`."""

    architecture: Literal["lstm"]
    embedding: Count = 8
    units: Count = 256
    layers: Count = 2


class Training(Section):
    """The algorithm, and what a client does in a round."""

    algorithm: Literal["weighted_fed_avg", "unweighted_fed_avg"] = "weighted_fed_avg"
    client_optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    client_learning_rate: Rate
    server_learning_rate: Rate = 1.0
    batch_size: Count = 20
    epochs: Count = 1
    on_nonfinite: Literal["raise", "drop", "ignore"] = "raise"


class Evaluation(Section):
    """On how many clients' held-out examples the global model is evaluated after every round; None: all."""

    clients: Count | None = None


class Kept(Section):
    """What the ledger keeps of the local models, as `fed.run` takes it: `encodings`, and the fields of `fed.Keep`."""

    encoding: Literal["raw", "bf16-delta", "int8-delta"] = "raw"
    keep_leaves: Annotated[list[str], Field(min_length=1)] = ["*"]
    keep_every: Count = 1
    keep_clients: list[str] | None = None
    statistics_only: bool = False

    @property
    def keep(self) -> Keep | None:
        """Whose weights are stored; None is everybody's."""
        found = Keep(self.keep_leaves, self.keep_every, self.keep_clients, self.statistics_only)
        return None if found == Keep(["*"]) else found


class Config(Section):
    """Everything that a run follows from."""

    name: Name
    rounds: Count
    seed: Seed = 0
    clients_per_round: Count | None = None
    min_clients: Count = 1
    data: Annotated[Digits | Shakespeare, Field(discriminator="set")]
    model: Annotated[CNN | Perceptron | LSTM, Field(discriminator="architecture")]
    training: Training
    evaluation: Evaluation = Evaluation()
    ledger: Kept = Kept()


_SECTIONS: Mapping[str, Mapping[str, type[Section]]] = {  # section -> the value that tells its kind, if any -> its keys
    "data": {"digits": Digits, "shakespeare": Shakespeare},
    "model": {"cnn": CNN, "mlp": Perceptron, "lstm": LSTM},
    "training": {"": Training},
    "evaluation": {"": Evaluation},
    "ledger": {"": Kept},
}
_FITTING = {"digits": ("cnn", "mlp"), "shakespeare": ("lstm",)}


def builtin_names() -> list[str]:
    """The names of the configurations that come with fedlens."""
    files = importlib.resources.files("fedlens.cli").joinpath("configs").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def builtin_text(name: str) -> str:
    """The TOML text of a configuration that comes with fedlens.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in builtin_names():
        raise ConfigError(
            f"Expected a configuration that comes with fedlens, or a file ending in .toml, found {name!r}. "
            + _nearest(name, builtin_names())
        )
    return importlib.resources.files("fedlens.cli").joinpath("configs", f"{name}.toml").read_text(encoding="utf-8")


def load(name: str) -> Config:
    """Loads a configuration by the name of one that comes with fedlens, or from a file whose name ends in .toml.

    Raises:
      ConfigError: there is none, or it has an unknown key or value.
    """
    if not name.endswith(".toml"):
        return parse(builtin_text(name), f"{name}.toml of fedlens")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Expected a text file in UTF-8, found byte {error.start} to be none, in {name}.") from None
    except OSError as error:
        raise ConfigError(f"Expected a readable configuration, found: {error.strerror}, in {name}.") from None
    return parse(text, name)


def parse(text: str, where: str) -> Config:
    """Reads and checks the TOML text of a configuration.

    Example:
      >>> parse("rounds = 0", "mine.toml")
      fedlens.errors.ConfigError: Expected rounds to be greater than or equal to 1, found 0, in mine.toml, line 1.

    Args:
      text: the TOML text.
      where: what errors call it.

    Raises:
      ConfigError: naming the key, file and line, and the nearest valid names.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"Expected a file in the format TOML, found: {error}, in {where}.") from None
    return check(values, where, text)


def check(values: Mapping[str, Any], where: str, text: str = "") -> Config:
    """Checks a configuration given as nested mappings; `text` is what it was read from, to name lines.

    Raises:
      ConfigError: see `parse`.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        # What is unknown comes first: a misspelt key is also a missing one.
        first, *rest = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        more = f" ({len(rest)} more to correct after that.)" if rest else ""
        raise ConfigError(_explain(dict(first), where, text) + more) from None
    counts = {("clients_per_round",): config.clients_per_round, ("evaluation", "clients"): config.evaluation.clients}
    for path, count in counts.items():
        if count is not None and count < config.min_clients:
            raise ConfigError(
                f"Expected {' '.join(path)} of at least {config.min_clients}, the min_clients of every aggregate, "
                f"found {count}, {_place(where, text, list(path))}."
            )
    fitting = _FITTING[config.data.set]
    if config.model.architecture not in fitting:
        place = _place(where, text, ["model", "architecture"])
        raise ConfigError(
            f"Expected architecture {' or '.join(map(repr, fitting))} for the data set {config.data.set!r}, "
            f"found {config.model.architecture!r}, {place}."
        )
    return config


def _explain(error: Mapping[str, Any], where: str, text: str) -> str:
    """One of pydantic's findings as a sentence."""
    steps = [str(step) for step in error["loc"]]
    kinds = _SECTIONS.get(steps[0], {}) if steps else {}
    kind = steps.pop(1) if len(steps) > 1 and steps[1] in kinds else ""  # pydantic puts the kind into the path
    path = [step for step in steps if not step.isdigit()]  # positions in a list stand on the line of their key
    key = path[-1] if path else where
    what, found = error["type"], error["input"]
    place = _place(where, text, path)
    if what == "extra_forbidden":
        known = kinds[kind].model_fields if kinds else Config.model_fields
        section = f" in [{path[0]}]" if len(path) > 1 else ""
        return f"Expected a known key{section}, found {key!r}, {place}. {_homes(key) or _nearest(key, known)}"
    if what in ("missing", "union_tag_not_found"):
        key = error["ctx"]["discriminator"].strip("'") if what == "union_tag_not_found" else key
        section = f" in [{path[0]}]" if kinds and key != path[0] else ""
        return f"Expected the key {key!r}{section}, found none, {place}. `fedlens configs digits` shows a whole file."
    if what == "union_tag_invalid":
        key, found = error["ctx"]["discriminator"].strip("'"), error["ctx"]["tag"]
        place = _place(where, text, [*path, key])
        return f"Expected a known {key}, found {found!r}, {place}. {_nearest(str(found), kinds)}"
    if what == "literal_error":
        known = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"Expected a known {key}, found {found!r}, {place}. {_nearest(str(found), known)}"
    if what in ("model_type", "model_attributes_type"):
        return f"Expected [{key}] to be a section, found {found!r}, {place}."
    if what == "string_pattern_mismatch":
        return f"Expected {key} of letters, digits, '.', '_' and '-', found {found!r}, {place}."
    if what == "too_short":
        return f"Expected {key} to have at least {error['ctx']['min_length']} item, found {found!r}, {place}."
    wanted = error["msg"].replace("Input should be", "to be").replace("Input should have", "to have")
    return f"Expected {key} {wanted[0].lower() + wanted[1:]}, found {found!r}, {place}."


def _place(where: str, text: str, path: list[str]) -> str:
    line = line_of(text, path)
    return f"in {where}" + (f", line {line}" if line else "")


def _homes(key: str) -> str:
    """Where a key that is known elsewhere belongs."""
    homes = [name for name, kinds in _SECTIONS.items() if any(key in kind.model_fields for kind in kinds.values())]
    if homes:
        return f"It belongs in [{homes[0]}]."
    return "It belongs at the top, before the first section." if key in Config.model_fields else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {', '.join(known)}."
