"""The soak: a few seconds against a real service, and proof that it can fail."""

import pytest

from deploy.verify import soak
from deploy.verify.check import Report


def samples(*, mib=0.0, files=0, threads=0):
    """Thirty seconds of a service that grows by these amounts per second."""
    return [soak.Sample(t, 400.0 + mib * t, 10 + files * t, 20 + threads * t) for t in range(30)]


class Finished(soak.MixedKinds):
    """Traffic that has ended, with the given statuses by kind."""

    def __init__(self, **changed):
        super().__init__(port=0, per_second=1.0, seconds=0.0)
        for kind, (_, statuses) in soak.KINDS.items():
            status = changed.get(kind.__name__, min(statuses))
            if status is not None:
                self.outcomes[kind.__name__, status] += 1


@pytest.mark.parametrize(
    ("growing", "changed", "failed"),
    [
        ({}, {}, []),
        ({"mib": 1.0}, {}, ["memory grows by at most 8 MiB"]),
        ({"files": 1}, {}, ["open files grow by at most 4"]),
        ({"threads": 1}, {}, ["threads grow by at most 4"]),
        ({}, {"malformed": 500}, ["every request had a status that it may have"]),
        ({}, {"new": 503}, ["every request had a status that it may have"]),
        ({}, {"reload": None}, ["every kind of request was sent"]),
    ],
    ids=["flat", "memory", "files", "threads", "a 500", "a good one lost", "a kind missing"],
)
def test_it_fails_where_something_grows_or_goes_wrong(growing, changed, failed):
    report = Report("soak")
    soak.judge(report, samples(**growing), Finished(**changed), 8.0)
    assert report.failed == failed
    assert report.finish() == (1 if failed else 0)


def test_a_few_seconds_of_it(tmp_path, capsys, monkeypatch):
    # A few seconds are all warm-up: pools of threads still fill. Five minutes are held to 4.
    monkeypatch.setattr(soak, "MOST_MORE", 32)
    report = Report("soak")
    taken = soak.soak(tmp_path, report, seconds=4.0, per_second=50.0, bound_mib=64.0)
    assert report.failed == [], capsys.readouterr().out
    assert report.passed == 9
    assert len(taken) > 3
    assert "seconds  requests  memory MiB  files  threads" in capsys.readouterr().out
