"""The section [ledger] of a configuration: what the ledger of a run keeps of the local models."""

from __future__ import annotations

import pytest

import fedlens as fed
from fedlens.cli import config
from fedlens.errors import ConfigError


@pytest.fixture
def run(fedlens, tiny_text, tmp_path):
    """Runs the tiny experiment with a section [ledger]: the result of the command, and the ledger's folder."""

    def started(section):
        path = tmp_path / "kept.toml"
        path.write_text(f"{tiny_text}\n[ledger]\n{section}\n")
        return fedlens("run", path, "--ledger", tmp_path / "run"), tmp_path / "run"

    return started


def test_left_out_it_keeps_every_model_bit_for_bit(tiny_text, ledger):
    read = config.parse(tiny_text, "x.toml").ledger
    assert read.encoding == "raw"
    assert read.keep is None
    stored = fed.Ledger(ledger).run
    assert stored.keep is None
    assert {leaf.encoding for leaf in stored.leaves} == {"raw"}


def test_clients_rounds_and_leaves_are_those_named(run):
    done, folder = run('keep_every = 2\nkeep_clients = ["form-03", "form-11"]\nencoding = "bf16-delta"')
    assert done.exit_code == 0, done.stderr
    ledger = fed.Ledger(folder)
    assert {number: set(ledger.round(number).kept_ids) for number in ledger.rounds} == {
        0: {"form-03", "form-11"},
        1: set(),
        2: {"form-03", "form-11"},
    }
    assert all(len(ledger.round(number)) == 14 for number in ledger.rounds)
    assert {leaf.encoding for leaf in ledger.run.leaves} == {"bf16-delta"}
    assert "2 of 14 clients, by their last stored models." in " ".join(done.stdout.split())


@pytest.mark.parametrize("section", ["statistics_only = true", 'keep_leaves = ["*bias"]'])
def test_without_whole_models_no_client_is_compared(run, section):
    done, folder = run(section)
    assert done.exit_code == 0, done.stderr
    assert "No client is compared: the ledger keeps no whole local model." in " ".join(done.stdout.split())
    assert fed.Ledger(folder).round(2)["form-03"].update_norm > 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('encoding = "fp4"', "Expected a known encoding, found 'fp4', in .*line 16. Did you mean|Known are raw"),
        ("keep_every = 0", "Expected keep_every to be greater than or equal to 1, found 0"),
        ("keep_leaves = []", "Expected keep_leaves to have at least 1 item"),
        ("keep = 3", r"Expected a known key in \[ledger\], found 'keep', in x.toml, line"),
    ],
)
def test_mistakes_are_named(tiny_text, section, message):
    with pytest.raises(ConfigError, match=message):
        config.parse(f"{tiny_text}\n[ledger]\n{section}\n", "x.toml")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('keep_clients = ["form-99"]', "Expected clients of the data to be kept, found 'form-99'."),
        ('keep_leaves = ["conv*"]', "Expected a pattern that matches a leaf, found 'conv*'"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_its_first_round(run, section, message):
    done, folder = run(section)
    assert done.exit_code != 0
    assert message in " ".join(done.stderr.split())
    assert not folder.exists()
