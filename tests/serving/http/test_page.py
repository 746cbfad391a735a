"""The status page in a real browser: it is live, it shows what /metrics says, in light and dark."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from tests.serving.served import WIDTH, served, small_engine, tensor

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: the page was not opened in a browser"
)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with served(small_engine()) as started:
        started.idle_page = browse(started, tmp_path_factory.mktemp("idle"), "--dump-dom").stdout
        rng = np.random.default_rng(0)
        for _ in range(20):
            x = rng.standard_normal((1, 8, WIDTH), dtype=np.float32)
            body = json.dumps({"inputs": [tensor(x)]}).encode()
            assert started.request("POST", "/v2/models/router/infer", body)[0] == 200
        started.request("POST", "/v2/models/router/infer", b"{}")
        yield started


def browse(service, tmp_path, *options, path="/"):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,820",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
        *options,
        f"http://{service.address}{path}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_page_is_live_and_shows_the_metrics(service, tmp_path):
    page = browse(service, tmp_path, "--dump-dom", "--enable-logging=stderr", "--v=0")
    dom = page.stdout
    for shown in (
        'class="state good" role="status">ready<',
        "21 since the start",
        "160 since the start",
        "expert 7",
        "k = 4",
        "<dt>malformed</dt>",
        ">closed</dd>",
        "<dt>blocked clients</dt>",
        "untrained",
        '<section id="start" class="start" hidden',
    ):
        assert shown in dom, shown
    assert "Content Security Policy" not in page.stderr
    assert "Uncaught" not in page.stderr


def test_before_the_first_request_the_page_says_what_to_do_and_what_is_served(service):
    idle = service.idle_page
    assert '<main id="board" aria-live="off" hidden=""' in idle
    assert '<section id="start" class="start">' in idle
    assert f'<span id="address">http://{service.address}</span>' in idle
    assert "Serves untrained weights from a seed: DynamicK, 1 to 4 of 8 experts a token" in idle


@pytest.mark.parametrize(("theme", "paper"), [("light", 0.96), ("dark", 0.08)])
def test_a_screenshot_in_light_and_dark(service, tmp_path, theme, paper):
    picture = tmp_path / "page.png"
    browse(service, tmp_path, f"--screenshot={picture}", path=f"/?theme={theme}")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (820, 1280)
    assert pixels[-1, 0].mean() == pytest.approx(paper, abs=0.02)
    # Text and bars: a blank page, or one whose style did not load, has neither.
    bar = np.array([0x2F, 0x6D, 0xB3] if theme == "light" else [0x6A, 0xA6, 0xE8]) / 255
    near = np.abs(pixels - bar).max(axis=-1) < 0.02
    assert near.sum() > 2000
    contrast = np.abs(pixels - pixels[-1, 0]).max(axis=-1) > 0.5
    assert 0.01 < contrast.mean() < 0.3
