"""Several processes train as one: same loss, a killed one is noticed, and the run goes on from disk.

Real processes on the loopback interface, with the command that a person would type; the one that
is killed does it itself, at a known step.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import jax
import pytest

from deploy.verify.processes import free_port
from moe_jax.lab import model_files
from moe_jax.lab import training as lm
from moe_jax.parallel.distributed import EXIT_CODE, Group
from tests.parallel import host_devices

STEPS = 40
COMMAND = ("-m", "moe_jax.cli")
# The same command, killed as it begins its second checkpoint: the first one is on disk by then.
KILLED = (
    "-c",
    """
import os, signal
from moe_jax import cli
from moe_jax.lab import training as train

gathered, saves = train.gathered, []

def killed_at_the_second(state):
    saves.append(1)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return gathered(state)

train.gathered = killed_at_the_second
cli.main()
""",
)
MODEL = {
    "num_layers": 1,
    "d_model": 16,
    "num_heads": 2,
    "num_experts": 8,
    "k": 2,
    "d_ff": 16,
    "length": 16,
    "batch_size": 16,
    "learning_rate": 0.01,
    "balance_rate": 0.001,
    "implementation": "dense",
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model.json").write_text(json.dumps(MODEL))

    def start(name: str, *more: str, program: tuple[str, str] = COMMAND) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                *program,
                "train",
                "--out",
                str(folder / name),
                "--model",
                str(folder / "model.json"),
                "--steps",
                str(STEPS),
                "--save-every",
                "5",
                "--expert-devices",
                "4",
                "--json",
                *more,
            ],
            env=host_devices.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.folder = folder
    return start


def pair(
    command, name: str, *more: str, second: tuple[str, str] = COMMAND
) -> list[subprocess.Popen[str]]:
    address = f"127.0.0.1:{free_port()}"
    return [
        command(
            name,
            "--host-devices",
            "4",
            "--coordinator",
            address,
            "--processes",
            "2",
            "--process-id",
            str(i),
            *more,
            program=program,
        )
        for i, program in enumerate((COMMAND, second))
    ]


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


def test_two_processes_train_as_one_and_a_killed_run_resumes(command):
    alone = command("one", "--host-devices", "8")
    curve = [(h["step"], h["bits_per_byte"]) for h in json.loads(finished(alone))["history"]]
    assert [step for step, _ in curve] == list(range(1, STEPS + 1))
    assert curve[-1][1] < curve[0][1] - 1.0, "it did not learn"

    first, second = pair(command, "two", second=KILLED)
    second.communicate(timeout=240)
    out, printed = first.communicate(timeout=240)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == EXIT_CODE, (first.returncode, printed[-3000:])
    assert "process 0 of 2: stopped, since process 1 is gone" in printed
    assert "Start all again with --resume" in printed
    assert out == ""
    done = lm.checkpoint.load_metadata(command.folder / "two")["metadata"]["training"]["step"]
    assert done in (5, 10), "the one at which it was killed, or the one before"

    resume = ("--resume", str(command.folder / "two"), "--overwrite")
    first, second = pair(command, "two", *resume)
    result = json.loads(finished(first))
    assert finished(second) == ""
    assert len(result["history"]) == STEPS
    for (step, bits), entry in zip(curve, result["history"], strict=True):
        assert entry["step"] == step
        assert abs(entry["bits_per_byte"] - bits) <= 1e-4, (step, bits, entry)

    # What eight devices in two processes saved, one device restores.
    model, other = (
        model_files.load_model(command.folder / "two"),
        model_files.load_model(command.folder / "one"),
    )
    assert jax.tree.structure(model.params) == jax.tree.structure(other.params)
    for a, b in zip(jax.tree.leaves(model.states), jax.tree.leaves(other.states), strict=True):
        assert abs(a - b).max() <= 1e-6


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"coordinator": "127.0.0.1"}, "coordinator: expected HOST:PORT"),
        ({"process_id": 2}, "process_id: expected 0 <= process_id < processes=2, got 2"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        Group(**{"coordinator": "127.0.0.1:1", "processes": 2, "process_id": 0, **values})
