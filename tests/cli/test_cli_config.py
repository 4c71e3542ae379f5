"""Configurations: what is accepted, and that every mistake is answered with key, file, line and the nearest names."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlens.cli import config
from fedlens.cli.locate import line_of
from fedlens.errors import ConfigError


def keys_of(section: type[config.Section]) -> set[str]:
    return set(section.model_fields)


def test_the_built_in_configurations_are_valid_and_named_like_their_files():
    assert config.builtin_names() == ["digits", "shakespeare"]
    for name in config.builtin_names():
        assert config.load(name).name == name


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("digits", (config.Digits, config.CNN)), ("shakespeare", (config.Shakespeare, config.LSTM))],
)
def test_a_built_in_configuration_shows_every_key_with_a_comment(name, kinds):
    text = config.builtin_text(name)
    every_line = [line for line in text.splitlines() if "=" in line and not line.startswith("# Change")]
    assert all(line.count("#") >= 1 and line.rsplit("#", 1)[1].strip() for line in every_line)
    written = {line.lstrip("# ").split("=")[0].strip() for line in every_line}
    sections = {"data", "model", "training", "evaluation", "ledger"}
    top = keys_of(config.Config) - sections
    others = keys_of(config.Training) | keys_of(config.Evaluation) | keys_of(config.Kept)
    assert written == top | keys_of(kinds[0]) | keys_of(kinds[1]) | others


def test_defaults_are_those_that_the_digits_file_states():
    assert config.load("digits").evaluation == config.Evaluation()
    assert config.load("digits").model == config.CNN(architecture="cnn")
    assert config.load("shakespeare").model == config.LSTM(architecture="lstm")


def test_a_configuration_survives_json(tiny_text):
    first = config.parse(tiny_text, "tiny.toml")
    assert config.check(first.model_dump(mode="json", exclude_none=True), "json") == first


MISTAKES = [
    ("rounds = 3", "rouns = 3", r"Expected a known key, found 'rouns', in x.toml, line 2. Did you mean 'rounds'\?"),
    ("rounds = 3", "rounds = 0", "Expected rounds to be greater than or equal to 1, found 0, in x.toml, line 2."),
    ("rounds = 3", 'rounds = "3"', "Expected rounds to be a valid integer, found '3', in x.toml, line 2."),
    ("rounds = 3", "rounds = true", "Expected rounds to be a valid integer, found True, in x.toml, line 2."),
    ("rounds = 3\n", "", "Expected the key 'rounds', found none, in x.toml. `fedlens configs digits` shows"),
    ("rounds = 3", "rounds = 3\nseed = -1", "Expected seed to be greater than .*found -1, in x.toml, line 3."),
    ("rounds = 3", "rounds = 3\nepochs = 2", r"found 'epochs', in x.toml, line 3. It belongs in \[training\]."),
    ('"tiny"', '"../tiny"', r"Expected name of letters, digits, .*found '../tiny', in x.toml, line 1."),
    ("hidden = [6]", "hidden = [6, 0]", "Expected hidden to be greater than .*found 0, in x.toml, line 10."),
    (
        "hidden = [6]",
        "hiden = [6]",
        r"known key in \[model\], found 'hiden', in x.toml, line 10. Did you mean 'hidden'",
    ),
    ("hidden = [6]", "name = 1", r"known key in \[model\], found 'name', in x.toml, line 10. It belongs at the top"),
    ('"mlp"', '"mpl"', r"Expected a known architecture, found 'mpl', in x.toml, line 9. Did you mean 'mlp'\?"),
    ('"mlp"\nhidden = [6]', '"lstm"', "architecture 'cnn' or 'mlp' for the data set 'digits', found 'lstm'.*line 9"),
    ('architecture = "mlp"\n', "", r"Expected the key 'architecture' in \[model\], found none, in x.toml, line 8."),
    ('"digits"', '"digit"', r"Expected a known set, found 'digit', in x.toml, line 5. Did you mean 'digits'\?"),
    ("held_out = 0.25", "held_out = 1.0", "Expected held_out to be less than 1, found 1.0, in x.toml, line 6."),
    ("held_out = 0.25", "max_sequences = 3", r"known key in \[data\], found 'max_sequences', in x.toml, line 6."),
    ("= 0.3", "= nan", "Expected client_learning_rate to be .*found nan, in x.toml, line 13."),
    ("batch_size", "batchsize", r"found 'batchsize', in x.toml, line 14. Did you mean 'batch_size'\?"),
    ("client_learning_rate = 0.3\n", "", r"the key 'client_learning_rate' in \[training\], found none, .*line 12."),
    (
        "batch_size = 20",
        'algorithm = "fedavg"',
        "a known algorithm, found 'fedavg', .*line 14. Did you mean 'weighted_",
    ),
    ("[training]", "[trainin]", r"Expected a known key, found 'trainin', in x.toml, line 12. Did you mean 'training'"),
    ("[model]", "[model", "Expected a file in the format TOML, found: .*line 8.*, in x.toml"),
    ("[data]\n", "", "Expected a known key, found 'set', in x.toml, line 4. It belongs in .data."),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISTAKES, ids=[f"{wrong}" for _, wrong, _ in MISTAKES])
def test_a_mistake_is_named_with_file_and_line(tiny_text, right, wrong, message):
    assert right in tiny_text
    with pytest.raises(ConfigError, match=message) as raised:
        config.parse(tiny_text.replace(right, wrong), "x.toml")
    assert "\n" not in str(raised.value)


def test_a_section_that_is_none(tiny_text):
    with pytest.raises(ConfigError, match=r"Expected \[evaluation\] to be a section, found 3, in x.toml, line 1\."):
        config.parse("evaluation = 3\n" + tiny_text, "x.toml")
    data = tiny_text[tiny_text.index("[data]") : tiny_text.index("[model]")]
    with pytest.raises(ConfigError, match=r"Expected \[data\] to be a section, found 3, in x.toml, line 1\."):
        config.parse("data = 3\n" + tiny_text.replace(data, ""), "x.toml")


def test_several_mistakes_are_counted():
    with pytest.raises(ConfigError, match=r"found 'x', in a.toml, line 1.*\(5 more to correct after that.\)"):
        config.parse("x = 1", "a.toml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digts", r"comes with fedlens, or a file ending in .toml, found 'digts'. Did you mean 'digits'\?"),
        ("imagenet", "found 'imagenet'. Known are digits, shakespeare."),
        (
            "nowhere/mine.toml",
            "Expected a readable configuration, found: No such file or directory, in nowhere/mine.toml",
        ),
    ],
)
def test_a_configuration_that_is_not_there(name, message):
    with pytest.raises(ConfigError, match=message):
        config.load(name)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match=r"Expected a text file in UTF-8, found byte 8 to be none, in .*mine.toml"):
        config.load(str(path))


def test_a_line_is_found_behind_comments_dots_and_quotes():
    text = '# a = 1\ndata.set = "x"\n[ model ] # the model\n"dense" = 3\n  channels = [1,\n  2]\n'
    assert line_of(text, ["data", "set"]) == 2
    assert line_of(text, ["model"]) == 3
    assert line_of(text, ["model", "dense"]) == 4
    assert line_of(text, ["model", "channels"]) == 5
    assert line_of(text, ["model", "missing"]) == 3
    assert line_of(text, ["missing"]) is None


NAMES = st.text("abcdefg_-", min_size=1, max_size=6)


@given(st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(0, 99), min_size=1), min_size=1))
def test_every_key_is_found_on_its_own_line(sections):
    lines, where = [], {}
    for section, values in sections.items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            lines.append(f"{key} = {value}")
            where[section, key] = len(lines)
    text = "\n".join(lines)
    assert tomllib.loads(text) == sections
    assert {path: line_of(text, path) for path in where} == where
