import pytest

from aligntok import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_at_the_end(clock, capsys):
    line = progress.Progress("samples", 1000)
    for _ in range(10):
        clock[0] += 6
        line.add(100)
    assert capsys.readouterr().out.splitlines() == [
        "  samples 200/1,000  images/s 17  left 0:00:48",
        "  samples 400/1,000  images/s 17  left 0:00:36",
        "  samples 600/1,000  images/s 17  left 0:00:24",
        "  samples 800/1,000  images/s 17  left 0:00:12",
        "  samples 1,000/1,000  images/s 17  left 0:00:00",
    ]


def test_the_first_rank_speaks_for_all_and_ends_once(clock, capsys):
    line, other = progress.Progress("images", 7, ranks=2), progress.Progress("images", 7, ranks=2, silent=True)
    for _ in range(5):  # the first rank has one image more than its share
        clock[0] += 1
        line.add(1)
        other.add(1)
    assert capsys.readouterr().out == "  images 7/7  images/s 1.8  left 0:00:00\n"


def test_without_an_end_no_time_is_left():
    assert progress.pace(87.4, None) == {"images/s": "87"}
