"""From the lines that contestants print to ratios, targets and a table."""

from __future__ import annotations

import json
import sys


def line(workload, contestant, median, clients=10):
    return {
        "workload": workload,
        "contestant": contestant,
        "clients": clients,
        "median_s_per_round": median,
        "peak_rss_mb": 100,
    }


def test_a_contestant_counts_by_the_median_of_its_processes():
    from verdict import summarize

    slow_once = [line("W1", "fedlens", seconds) for seconds in (0.4, 9.0, 0.5)]
    (row,) = summarize(slow_once)
    assert (row.seconds, row.least, row.most, row.processes) == (0.5, 0.4, 9.0, 3)


def test_contestants_with_fewer_clients_are_compared_client_for_client():
    from verdict import Target, judge, summarize, table

    rows = summarize([line("W4", "fedlens", 1.0, clients=100_000), line("W4", "pfl", 0.5, clients=1000)])
    met, missed = judge(rows, [Target("W4", "fedlens", 0.02, "pfl"), Target("W4", "fedlens", 9e-6)])
    assert (round(met.found, 9), met.met) == (0.02, True)  # 10 us against 500 us
    assert (round(missed.found, 9), missed.met) == (1e-5, False)
    assert "10 us a client" in missed.describe()
    assert "NOT MET" in missed.describe()
    assert table(rows).splitlines()[2].split()[-2:] == ["0.02", "100"]


def test_targets_of_absent_contestants_are_left_out():
    from verdict import judge, summarize

    verdicts = judge(summarize([line("W2", "fedlens", 0.03), line("W2", "reference", 0.03)]))
    assert [verdict.target.over for verdict in verdicts] == ["reference"]


def test_peers_run_where_there_is_an_environment_for_them():
    from contestants import contestants

    alone = contestants("W1", {})
    assert [contestant.name for contestant in alone] == ["fedlens", "reference"]
    with_pfl = contestants("W2", {"pfl": "/some/python"}, ("--rounds", "3"))
    assert [contestant.name for contestant in with_pfl] == ["fedlens", "reference", "torch loop", "pfl"]
    assert with_pfl[-1].command[0] == "/some/python"
    assert all("--rounds" in contestant.command for contestant in with_pfl)


def test_a_contestant_that_fails_is_named_and_left_out(capsys):
    from compare import run
    from contestants import Contestant

    printed = json.dumps(line("W1", "", 0.5))
    ends_well = Contestant("well", "W1", (sys.executable, "-c", f"print('noise'); print({printed!r})"))
    fails = Contestant("broken", "W1", (sys.executable, "-c", "raise SystemExit('no such module')"))
    assert run(ends_well)["median_s_per_round"] == 0.5
    assert run(fails) is None
    assert "W1 broken failed: no such module" in capsys.readouterr().err


def test_a_peer_without_a_suitable_python_is_said_to_be_left_out(capsys, monkeypatch, tmp_path):
    import environments

    monkeypatch.setattr(environments, "SCRATCH", tmp_path)
    monkeypatch.setattr(environments, "find_python", lambda: None)
    assert environments.build(["pfl"]) == {}
    assert "pfl: left out. Expected Python 3.11" in capsys.readouterr().err


def test_a_cohort_that_takes_more_a_batch_is_off_by_that():
    from ragged import Measured, deviations

    exact = [Measured(5, batches, 0.01 * batches) for batches in (10, 40, 90)]
    assert max(map(abs, deviations(exact))) < 1e-12
    low, high = deviations([*exact, Measured(5, 10, 0.12)])[-2:]
    assert (round(low, 6), round(high, 6)) == (-round(0.1 / 1.1, 6), round(0.1 / 1.1, 6))
