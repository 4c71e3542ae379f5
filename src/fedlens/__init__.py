"""fedlens runs federated computations and keeps what every client learned.

    import fedlens as fed

Every public name of `federated_language` is here too, with fedlens's own in front. Names are loaded when they are first
used: importing this package takes milliseconds, JAX and the language load with the first computation.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {  # module -> the names that it gives to this one
    "fedlens.errors": (
        "BoundError",
        "CohortError",
        "ConfigError",
        "DataError",
        "DisclosureError",
        "FedlensError",
        "LanguageError",
        "LedgerError",
        "NonFiniteError",
        "PerformanceWarning",
        "StructureError",
        "UnsupportedError",
    ),
    "fedlens.language": (
        "Sequence",
        "batch_type",
        "federated_map",
        "federated_zip",
        "jax_computation",
        "python_computation",
        "tensorflow_computation",
        "to_portable",
        "type_of",
    ),
    "fedlens.runtime": ("ClientValues", "Cohort", "ProgramCall", "async_context", "program_context", "use"),
    "fedlens.data.program_source": ("CohortSource",),
    "fedlens.learning.models": ("Model",),
    "fedlens.compiler.disclosure": ("disclosure",),
    "fedlens.compiler.levels": ("Level",),
    "fedlens.ledger": ("Keep", "Ledger"),
    "fedlens.report.plans": ("explain",),
    "fedlens.compiler.tap": ("tap",),
    "fedlens.compiler.taps": ("Tap", "taps"),
    "fedlens.study": ("resume", "run"),
}
_SUBMODULES = {
    "compiler": "fedlens.compiler",
    "data": "fedlens.data",
    "errors": "fedlens.errors",
    "learning": "fedlens.learning",
    "ledger": "fedlens.ledger",
    "losses": "fedlens.learning.losses",
    "metrics": "fedlens.learning.metrics",
    "models": "fedlens.learning.models",
    "privacy": "fedlens.privacy",
    "report": "fedlens.report",
    "runtime": "fedlens.runtime",
    "trees": "fedlens.trees",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_WITHOUT_JAX = {"fedlens.data", "fedlens.errors", "fedlens.ledger", "fedlens.report", "fedlens.trees"}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    home = _SUBMODULES.get(name) or _HOMES.get(name)
    if home not in _WITHOUT_JAX:
        importlib.import_module("fedlens.runtime")  # asks for the devices, and becomes the language's default context
    if name in _SUBMODULES:
        value = importlib.import_module(_SUBMODULES[name])
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        language = importlib.import_module("federated_language")
        if name.startswith("_") or not hasattr(language, name):
            raise AttributeError(f"module 'fedlens' has no attribute {name!r}")
        value = getattr(language, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    language = importlib.import_module("federated_language")
    public = {name for name in dir(language) if not name.startswith("_")}
    return sorted(public | _HOMES.keys() | _SUBMODULES.keys() | {"__version__"})
