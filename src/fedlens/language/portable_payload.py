"""The bytes of a portable payload: exported programs behind a small header, with a checksum over both.

    16 bytes     BLAKE2b of everything that follows
    4 bytes      length of the header, little endian
    header       JSON: format, name, wide, the JAX that wrote it, and [form, number of bytes] of each program
    programs     as `jax.export` serialises them, one after the other

Nothing in it is unpickled or names Python code to import. A checksum tells damage from a newer format; it is no
signature, and says nothing about who made the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from fedlens.errors import UnsupportedError

PORTABLE = "fedlens.portable_computation"  # the type URL of such a payload

_FORMAT = 1
_CHECKSUM = 16
_LENGTH = 4


@dataclass(frozen=True)
class Payload:
    """A local computation as it travels.

    Attributes:
      name: what the function was called.
      wide: whether it runs with 64-bit types.
      programs: the forms of the argument's sequences, joined by ", " -> an exported program.
      jax_version: of the process that exported it.
      unchanged: pairs of paths, as `LocalComputation` has them; a header without any has none.
      mechanism: what the function does to privacy, as `LocalComputation` has it.
    """

    name: str
    wide: bool
    programs: Mapping[str, bytes]
    jax_version: str = jax.__version__
    unchanged: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    mechanism: str = ""


def encode(payload: Payload) -> bytes:
    """The bytes of a payload.

    Example:
      >>> decode(encode(Payload("double", False, {"": b"..."}))).name
      'double'
    """
    header = json.dumps(
        {
            "format": _FORMAT,
            "name": payload.name,
            "wide": payload.wide,
            "jax": payload.jax_version,
            "unchanged": payload.unchanged,
            "mechanism": payload.mechanism,
            "programs": [[form, len(program)] for form, program in payload.programs.items()],
        }
    ).encode()
    body = len(header).to_bytes(_LENGTH, "little") + header + b"".join(payload.programs.values())
    return _checksum(body) + body


def decode(value: bytes) -> Payload:
    """The payload that these bytes are.

    Raises:
      UnsupportedError: the bytes are damaged, or of a newer format.
    """
    body = value[_CHECKSUM:]
    if _checksum(body) != value[:_CHECKSUM]:
        raise UnsupportedError(
            "Expected the bytes of a portable computation as fed.to_portable made them, found a payload of "
            f"{len(value)} bytes whose checksum differs: it was cut or changed on its way. Send it again."
        )
    start = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    try:
        header = json.loads(body[_LENGTH:start])
        found = header["format"]
        if found == _FORMAT:
            programs = {}
            for form, length in header["programs"]:
                programs[str(form)] = body[start : start + length]
                start += length
            if start == len(body):
                unchanged = tuple((tuple(result), tuple(given)) for result, given in header.get("unchanged", ()))
                mechanism = str(header.get("mechanism", ""))
                name, wide, version = str(header["name"]), bool(header["wide"]), str(header["jax"])
                return Payload(name, wide, programs, version, unchanged, mechanism)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedError(
            f"Expected the header of a portable computation, found {bytes(body[_LENGTH:start][:40])!r}. "
            "Make the computation portable again with fed.to_portable."
        ) from error
    raise UnsupportedError(
        f"Expected a portable computation of format {_FORMAT}, found format {found!r}. "
        "Update fedlens here, or make the computation portable with the fedlens that is here."
    )


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM).digest()
