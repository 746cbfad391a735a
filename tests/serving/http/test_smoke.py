"""``moe-jax smoke`` against something that is not this service."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import pytest
from typer.testing import CliRunner

from moe_jax.checkpoint import Checkpoint, save
from moe_jax.cli import app
from moe_jax.routers import TopK

runner = CliRunner()


class Stranger(BaseHTTPRequestHandler):
    """Answers every request with an object that no endpoint of this service gives."""

    body = b"{}"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Writes nothing."""


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"components": [], "status": 1}', b"[" * 99_999])
def test_smoke_says_that_something_else_answers(tmp_path, monkeypatch, body):
    router = TopK(num_experts=4, k=2)
    content = Checkpoint(
        params={"block": router.init(jax.random.key(0), 16)},
        routers={"block": router},
        states={"block": router.init_state()},
    )
    monkeypatch.setattr(Stranger, "body", body)
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = ["--json", "--checkpoint", str(save(tmp_path / "one", content))]
        result = runner.invoke(app, ["smoke", url, *options])
        server.shutdown()
    assert result.exit_code == 1, result.output
    for check in json.loads(result.stdout)["checks"]:
        if check["check"] in ("routes a batch", "routes as the checkpoint"):
            assert "expected the answer of this service" in check["detail"]
