"""The loss that is read layer by layer is the model's; memory holds one layer."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models import evaluate, load_model, stream_layers
from moe_jax.routers import MinP
from tests.models.made import SMALL, block_shapes, make_folder

MODELS = Path(__file__).parents[1] / "goldens" / "models"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 96, (5, 12))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_the_streamed_loss_is_that_of_the_models_logits(name, text):
    ids, mask = text
    model = load_model(MODELS / name)
    seen = []
    streamed = evaluate(MODELS / name, ids, mask, batch_size=2, progress=lambda *a: seen.append(a))
    whole = evaluate(model, ids, mask, batch_size=5)
    log_probs = jax.nn.log_softmax(model(jnp.asarray(ids), jnp.asarray(mask))[:, :-1])
    chosen = np.take_along_axis(np.asarray(log_probs), ids[:, 1:, None], axis=-1)[..., 0]
    real = (mask[:, 1:] & mask[:, :-1]).astype(bool)
    want = -chosen[real].astype(np.float64).mean()
    assert abs(streamed.loss - whole.loss) <= 1e-6
    assert abs(streamed.loss - want) <= 1e-6
    assert streamed.tokens == real.sum() == 51
    np.testing.assert_allclose(
        streamed.sequence_loss @ streamed.sequence_tokens / 51, streamed.loss, rtol=1e-12
    )
    assert streamed.perplexity == pytest.approx(np.exp(want))
    assert seen == [(1, 2, "layers"), (2, 2, "layers")]
    assert streamed.experts_per_token == dict.fromkeys(model.config.moe_layers, 2.0)


def test_another_rule_in_every_block_is_what_is_evaluated(text):
    ids, mask = text

    def fewer(layer, block):
        rule = MinP(num_experts=8, max_k=2)
        return dataclasses.replace(block, router=rule, state=rule.init_state())

    changed = evaluate(MODELS / "olmoe", ids, mask, change_block=fewer)
    assert set(changed.experts_per_token) == {0, 1}
    assert all(1 <= k < 2 for k in changed.experts_per_token.values())
    assert changed.loss != evaluate(MODELS / "olmoe", ids, mask).loss


def test_text_with_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="at least two real tokens"):
        evaluate(MODELS / "olmoe", [[1], [2]])
    with pytest.raises(ValueError, match="at least two real tokens"):
        evaluate(MODELS / "olmoe", [[1, 2]], [[0, 1]])


def test_a_layer_is_let_go_of_before_the_next_is_read():
    before = None
    for layer in stream_layers(MODELS / "olmoe"):
        assert before is None or not before.params
        assert layer.block is not None
        before = layer


SCRIPT = """
import sys, threading, time
import numpy as np
from moe_jax.models import evaluate

def resident():  # what no file backs, and pages of mapped files
    with open("/proc/self/status") as file:
        lines = [line.split() for line in file if line.startswith(("RssAnon", "RssFile"))]
    return sum(int(words[1]) * 1024 for words in lines)

def rise(folder):
    most, done = [0], [False]

    def watch():
        while not done[0]:
            most[0] = max(most[0], resident())
            time.sleep(0.0005)

    before = resident()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    evaluate(folder, np.arange(64).reshape(2, 32))
    done[0] = True
    thread.join()
    return most[0] - before

rise(sys.argv[1])  # compiles
print(rise(sys.argv[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_holds_one_layer_and_a_part(tmp_path):
    config = SMALL | {
        "model_type": "olmoe",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 6,
    }
    folder = make_folder(tmp_path / "made", config, dict(block_shapes(config, bias=False)))
    layer = 16 * 3 * 256 * 512 * 4
    # Freed memory goes back to the system at once, instead of being kept for the next tensor.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) <= 1.5 * layer, f"{int(ran.stdout) / layer:.2f} layers"
