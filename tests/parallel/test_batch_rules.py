"""What rules that look at a batch promise where each device sees its share: docs/scaling.md's table."""

from __future__ import annotations

import numpy as np

from tests.parallel import host_devices


def test_rules_of_a_batch_hold_on_each_devices_share():
    measured = host_devices.run_script("batch_rules.py", devices=4)
    for name, one in measured.items():
        assert one["as each share"], name
        assert one["as one device"] == (name == "SeqTopK"), (name, one)
    # Balance of the shares is balance of the batch.
    for name in ("Sinkhorn", "BalancedAssignment"):
        assert np.std(measured[name]["load"]) < np.std(measured[name]["plain load"])
    # A budget of distinct experts is one of each device.
    budget = measured["SharedBudget"]
    assert budget["most distinct of a device"] < budget["distinct on devices"]
    for name in ("Piggyback", "Reroute"):
        assert measured[name]["distinct on devices"] >= measured[name]["distinct on one device"]
