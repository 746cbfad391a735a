"""Who may ask, at each level, and what is checked before a body is read."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_jax.checkpoint import archive
from moe_jax.cli import app as cli
from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine, make_logger
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.app import create_app
from moe_jax.serving.http.openapi import document
from moe_jax.serving.http.smoke import check
from tests.serving.engine.conftest import Log
from tests.serving.engine.test_reload import write
from tests.serving.http.fuzz import ask
from tests.serving.served import SMALL, WIDTH, served, small_engine, tensor

INFER = "/v2/models/router/infer"
BODY = json.dumps({"inputs": [tensor(np.ones((1, 2, WIDTH), np.float32))]}).encode()


@pytest.fixture(scope="module")
def strict():
    with small_engine(security_level="strict", api_keys="alice,bob", admin_key="root") as engine:
        app = create_app(engine)
        yield app
        app.transport.close()


def asked(app, method, path, body=b"", **headers):
    named = [(n.replace("_", "-").lower().encode(), v.encode()) for n, v in headers.items()]
    status, data = asyncio.run(ask(app, (method, path, named, body)))
    return status, json.loads(data) if data[:1] in (b"{", b"[") else data


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", INFER, {}, 401),
        ("POST", INFER, {"authorization": "Bearer mallory"}, 401),
        ("POST", INFER, {"authorization": "Basic alice"}, 401),
        ("POST", INFER, {"authorization": "Bearer alice"}, 200),
        ("POST", INFER, {"x_api_key": "bob"}, 200),
        ("GET", "/v2/models/router", {}, 401),
        ("GET", "/v2/models/router", {"authorization": "Bearer alice"}, 200),
        ("GET", "/v2/models/router/routes/0123456789abcdef", {}, 401),
        ("GET", "/metrics", {}, 401),
        ("GET", "/metrics", {"authorization": "Bearer alice"}, 401),
        ("GET", "/metrics", {"authorization": "Bearer root"}, 200),
        ("POST", "/admin/reload", {"authorization": "Bearer alice"}, 401),
        ("GET", "/v2/health/live", {}, 200),
        ("GET", "/ready", {}, 200),
    ],
)
def test_strict_asks_for_keys(strict, method, path, headers, status):
    body = BODY if path == INFER else b""
    assert asked(strict, method, path, body, **headers)[0] == status


def test_strict_is_terse(strict):
    status, answer = asked(strict, "POST", INFER, b"{}", x_api_key="alice")
    assert (status, answer) == (400, {"error": "malformed request", "code": "malformed"})
    assert asked(strict, "GET", "/health")[1].keys() == {"status"}
    assert "configuration" in asked(strict, "GET", "/health", authorization="Bearer root")[1]


def test_a_key_is_optional_below_strict_but_a_wrong_one_is_told():
    with small_engine(api_keys="alice") as engine:
        app = create_app(engine)
        assert asked(app, "POST", INFER, BODY)[0] == 200
        assert asked(app, "POST", INFER, BODY, x_api_key="alice")[0] == 200
        assert asked(app, "POST", INFER, BODY, x_api_key="mallory")[0] == 401
        app.transport.close()


def test_limits_are_checked_before_the_body_is_read(monkeypatch):
    with small_engine() as engine:
        app = create_app(engine)

        def refuse(client, *, tokens=0, requests=1):
            raise ServingError("rate_limited", "too many requests", retry_after=2.5)

        monkeypatch.setattr(engine, "admit", refuse)

        async def receive():
            raise AssertionError("the body was read")

        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": INFER,
            "query_string": b"",
            "headers": [(b"content-length", b"10")],
            "client": ("127.0.0.1", 1),
        }
        asyncio.run(app(scope, receive, send))
        app.transport.close()
    assert sent[0]["status"] == 429
    assert (b"retry-after", b"3") in sent[0]["headers"]


def test_a_fault_of_ours_is_a_500_that_says_nothing_of_it(monkeypatch):
    with small_engine() as engine:
        app = create_app(engine)

        def broken(*args, **options):
            raise RuntimeError("secret detail")

        monkeypatch.setattr(engine, "infer", broken)
        status, answer = asked(app, "POST", INFER, BODY)
        app.transport.close()
    assert (status, answer["code"]) == (500, "internal")
    assert "secret" not in answer["error"]


def test_more_requests_than_may_wait_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr("moe_jax.serving.http.transport._SPARE_THREADS", 0)
    with small_engine(max_inflight=1, max_queue=1) as engine:
        app = create_app(engine)
        transport = app.transport
        assert transport.capacity == 2
        block = threading.Event()

        async def crowd():
            tasks = [asyncio.create_task(transport.work(block.wait)) for _ in range(2)]
            await asyncio.sleep(0)
            status, data = await ask(app, ("POST", INFER, [], BODY))
            block.set()
            await asyncio.gather(*tasks)
            return status, json.loads(data)["code"]

        assert asyncio.run(crowd()) == (503, "queue_full")
        assert asked(app, "POST", INFER, BODY)[0] == 200
        transport.close()


def statuses(app, count, body=BODY, **headers):
    return [asked(app, "POST", INFER, body, **headers)[0] for _ in range(count)]


def test_limits_and_blocks_act_over_http():
    with small_engine(
        security_level="standard", rate_limit_requests=5, trusted_proxies="127.0.0.1"
    ) as engine:
        app = create_app(engine)
        # The proxy is trusted, so each client behind it is one of its own.
        assert statuses(app, 7, x_forwarded_for="192.0.2.1") == [200] * 5 + [429] * 2
        assert statuses(app, 1, x_forwarded_for="192.0.2.2") == [200]
        named = [(b"x-forwarded-for", b"192.0.2.1")]
        status, data = asyncio.run(ask(app, ("POST", INFER, named, BODY)))
        assert (status, json.loads(data)["code"]) == (429, "rate_limited")
        # Ten violations are a block, which even a good request meets.
        assert statuses(app, 9, x_forwarded_for="192.0.2.1")[-1] == 403
        assert asked(app, "GET", "/ready", x_forwarded_for="192.0.2.1")[0] == 200
        assert statuses(app, 1, x_forwarded_for="192.0.2.3") == [200]
        app.transport.close()


def test_malformed_requests_are_counted_and_block_and_good_ones_never_do():
    with small_engine(security_level="standard") as engine:
        app = create_app(engine)
        assert statuses(app, 60) == [200] * 60
        assert statuses(app, 10, b"{}") == [400] * 10
        assert statuses(app, 1) == [403]
        counted = engine.get_metrics()["errors_by_code"]
        assert counted == {"malformed": 10, "blocked": 1}
        app.transport.close()


def test_tokens_are_limited_once_the_size_is_known():
    with small_engine(security_level="standard", rate_limit_tokens=5) as engine:
        app = create_app(engine)
        assert statuses(app, 3) == [200, 200, 429]  # two tokens each
        app.transport.close()


def test_nobody_is_a_new_client_by_claiming_another_address():
    with served(small_engine(security_level="standard", rate_limit_requests=2)) as service:
        statuses = [
            service.request("POST", INFER, BODY, {"X-Forwarded-For": f"192.0.2.{i}"})[0]
            for i in range(4)
        ]
    assert statuses == [200, 200, 429, 429]


@pytest.mark.parametrize("header", [None, "x_forwarded_for", "forwarded", "via", "origin"])
@pytest.mark.parametrize("key", [None, "guess"])
def test_without_an_admin_key_nobody_reloads_over_http(header, key):
    """A proxy on the same host makes every client look local, so being local proves nothing."""
    with small_engine() as engine:
        app = create_app(engine)
        headers = {} if header is None else {header: "192.0.2.1"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        for body in (b"", b'{"checkpoint": "/etc"}'):
            status, answer = asked(app, "POST", "/admin/reload", body, **headers)
            assert (status, answer["code"]) == (404, "not_found")
            assert "MOE_ADMIN_KEY" in answer["error"]
        app.transport.close()


@pytest.fixture
def checkpoints(tmp_path):
    """``releases/one`` and a link ``latest`` to it, and ``secrets`` beside the folder."""
    releases = tmp_path / "releases"
    write(releases / "one", seed=1)
    (releases / "latest").symlink_to(releases / "one")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "hidden-name").write_text("hidden-text")
    (releases / "exit").symlink_to(tmp_path / "secrets")
    (releases / "broken").mkdir()
    (releases / "broken" / "hidden-name").write_text("hidden-text")
    return releases


def test_reload_takes_checkpoints_below_one_folder_and_tells_nothing_of_the_disk(checkpoints):
    secrets = checkpoints.parent / "secrets"
    lines = Log()
    with small_engine(
        logger=lines, admin_key="root", reload_folder=str(checkpoints), serve_moe="auto"
    ) as engine:
        app = create_app(engine)

        def reload(name):
            body = json.dumps({"checkpoint": str(name)}).encode()
            return asked(app, "POST", "/admin/reload", body, authorization="Bearer root")

        for name in ("one", checkpoints / "one", "latest", "broken/../one"):
            status, answer = reload(name)
            assert status == 200, answer
            assert "source" not in answer
            assert str(checkpoints) not in json.dumps(answer)
        refusals = [
            reload(name)
            for name in (
                "/etc",
                "/etc/passwd",
                "/",
                "/nowhere",
                secrets,
                secrets / "hidden-name",
                "..",
                ".",
                "../secrets",
                "one/../../secrets",
                "exit",
                "exit/hidden-name",
                "nothing",
                "broken",
                checkpoints,
                "~",
                "a\0b",
                "x" * 5000,
                "\ud800",
            )
        ]
        app.transport.close()
    assert {status for status, _ in refusals} <= {400, 422}
    refused = {json.dumps(answer) for status, answer in refusals if status == 422}
    assert len(refused) == 1, "what is missing, forbidden or broken is answered alike"
    for _, answer in refusals:
        assert "hidden" not in json.dumps(answer)
        assert str(checkpoints.parent) not in json.dumps(answer)
    assert "hidden-name" in lines.text() or "broken" in lines.text(), "the log has the reason"


def test_without_a_reload_folder_only_checkpoints_beside_the_configured_one_may_be_named(
    checkpoints,
):
    for settings, status in [({"checkpoint": str(checkpoints / "one")}, 200), ({}, 422)]:
        with small_engine(admin_key="root", serve_moe="auto", **settings) as engine:
            app = create_app(engine)
            body = b'{"checkpoint": "latest"}'
            actual = asked(app, "POST", "/admin/reload", body, authorization="Bearer root")
            assert actual[0] == status, actual
            app.transport.close()


def test_a_service_of_a_release_may_be_told_any_release_beside_it(tmp_path):
    releases, names = tmp_path / "releases", []
    for seed in (1, 2):
        write(tmp_path / f"checkpoint-{seed}", seed=seed)
        archive.export(tmp_path / f"export-{seed}", tmp_path / f"checkpoint-{seed}")
        names.append(archive.restore(tmp_path / f"export-{seed}", releases)["release"])
    write(tmp_path / "outside", seed=3)
    settings = {"checkpoint": str(releases / "current" / "checkpoint"), "serve_moe": "off"}
    with small_engine(admin_key="root", **settings) as engine:
        app = create_app(engine)

        def reload(name):
            body = json.dumps({"checkpoint": str(name)}).encode()
            return asked(app, "POST", "/admin/reload", body, authorization="Bearer root")

        for name in names:
            assert reload(releases / name / "checkpoint")[1]["release"] == name
        assert reload(f"{names[0]}/checkpoint")[1]["release"] == names[0]
        assert reload("current/checkpoint")[1]["release"] == names[1]
        assert reload(tmp_path / "outside")[0] == 422
        app.transport.close()


@pytest.mark.parametrize("level", ["standard", "strict"])
def test_a_refused_reload_of_the_configured_folder_says_how_to_go_back(tmp_path, level):
    """``current`` still leads to the refused release, and the next start would read it."""
    lines, path = Log(), write(tmp_path / "one", seed=1)
    settings = {"checkpoint": path, "serve_moe": "off", "security_level": level}
    with served(small_engine(logger=lines, admin_key="root", **settings)) as service:
        (tmp_path / "one" / "manifest.json").write_text("{}")
        command = ["reload", service.address, "--admin-key", "root"]
        refused = CliRunner().invoke(cli, command)
        assert refused.exit_code == 1
        assert "moe-jax rollback RELEASES" in " ".join(refused.output.split())
        [facts] = [facts for _, event, facts in lines.lines if event == "reload_refused"]
        assert "moe-jax rollback RELEASES" in facts["hint"]
        named = CliRunner().invoke(cli, [*command, "--checkpoint", "nowhere"])
        assert named.exit_code == 1
        assert "rollback" not in named.output, "the configured folder is as it was"


def test_smoke_and_reload_say_whether_a_key_is_missing_or_wrong():
    settings = {"security_level": "strict", "api_keys": "alice", "admin_key": "root"}
    with served(small_engine(**settings)) as service:

        def said(command, *keys):
            result = CliRunner().invoke(cli, [command, service.address, *keys], env=NO_KEYS)
            return result.exit_code, " ".join(result.output.split())

        smoke = ("smoke", "--key", "alice")
        assert said(*smoke, "--admin-key", "root")[0] == 0
        code, text = said(*smoke)
        assert (code, "metrics: needs the admin key: --admin-key KEY" in text) == (1, True)
        code, text = said(*smoke, "--admin-key", "nope")
        assert (code, "sent is not the admin key of this service" in text) == (1, True)
        code, text = said("reload")
        assert (code, "A reload needs the admin key: --admin-key KEY" in text) == (1, True)
        code, text = said("reload", "--admin-key", "nope")
        assert (code, "sent is not the admin key of this service" in text) == (1, True)
    with small_engine(admin_key="root") as engine:
        app = create_app(engine)
        for headers, got in (({}, "none"), ({"authorization": "Bearer x"}, "another key")):
            answer = asked(app, "POST", "/admin/reload", **headers)[1]
            assert answer["error"].endswith(f"got {got}.")
        app.transport.close()


NO_KEYS = dict.fromkeys(("ROUTER_API_KEY", "ROUTER_ADMIN_KEY", "MOE_ADMIN_KEY"))


@pytest.mark.parametrize("level", ["standard", "strict"])
def test_the_log_line_of_a_refusal_has_its_reason(level):
    lines = Log()
    with small_engine(logger=lines, security_level=level, api_keys="alice") as engine:
        app = create_app(engine)
        for body, status in ((b"{}", 400), (BODY, 200)):
            assert asked(app, "POST", INFER, body, x_api_key="alice")[0] == status
        assert asked(app, "GET", "/nowhere")[0] == 404
        app.transport.close()
    bad, good, lost = [facts for _, event, facts in lines.lines if event == "request"]
    assert bad["code"] == "malformed"
    assert "inputs" in bad["error"], bad
    assert "error" not in good
    assert lost["error"] == "GET /nowhere: Not Found."


@pytest.mark.parametrize(
    ("level", "method", "path", "refused"),
    [
        ("standard", "POST", "/admin/reload", 401),
        ("strict", "GET", "/metrics", 401),
        ("strict", "GET", "/health", 200),  # only less is told
    ],
)
def test_wrong_admin_keys_are_counted_and_block(level, method, path, refused):
    with small_engine(security_level=level, admin_key="root", api_keys="alice") as engine:
        app = create_app(engine)
        after = engine.level.block_after or 0
        for _ in range(after):
            assert engine.access.blocks.blocked == 0
            assert asked(app, method, path, authorization="Bearer guess")[0] == refused
        assert engine.access.blocks.blocked == 1
        assert asked(app, "POST", INFER, BODY)[0] == 403
        assert asked(app, "POST", "/admin/reload", authorization="Bearer root")[0] == 200, (
            "the operator is not shut out"
        )
        assert engine.get_metrics()["errors_by_code"]["unauthorized"] >= after
        assert 'moe_errors_total{code="unauthorized"}' in engine.metrics_text().decode()
        app.transport.close()


def test_the_openapi_document_lists_what_reload_answers():
    """404 without an admin key in the settings; 401, 400, 422 and 200 with one."""
    operation = document(1)["paths"]["/admin/reload"]["post"]
    assert "admin key" in operation["description"]
    answers = []
    with small_engine() as engine:
        app = create_app(engine)
        answers.append(asked(app, "POST", "/admin/reload"))
        app.transport.close()
    with small_engine(admin_key="root") as engine:
        app = create_app(engine)
        answers.append(asked(app, "POST", "/admin/reload"))
        for body in (b"[", b'{"checkpoint": "/etc"}', b""):
            answers.append(asked(app, "POST", "/admin/reload", body, authorization="Bearer root"))
        app.transport.close()
    assert [status for status, _ in answers] == [404, 401, 400, 422, 200]
    for status, answer in answers[:-1]:
        assert answer["code"] in operation["responses"][str(status)]["description"]


def test_probes_without_a_key_are_no_violations():
    with small_engine(security_level="strict", admin_key="root") as engine:
        app = create_app(engine)
        for _ in range(20):
            assert asked(app, "GET", "/health")[0] == 200
            assert asked(app, "GET", "/ready")[0] == 200
        assert asked(app, "GET", "/metrics", authorization="Bearer root")[0] == 200
        app.transport.close()


def test_a_blocked_client_reads_no_metadata_either():
    with small_engine(security_level="standard") as engine:
        app = create_app(engine)
        assert asked(app, "GET", "/v2")[0] == 200
        assert statuses(app, 10, b"{}") == [400] * 10
        for path in ("/v2", "/v2/models/router", "/v2/models/router/versions/1"):
            assert asked(app, "GET", path)[0] == 403
        app.transport.close()


def test_what_can_never_pass_is_413_without_retry_after_and_no_violation():
    with served(small_engine(security_level="standard", rate_limit_tokens=1)) as service:
        for _ in range(15):
            status, headers, body = service.request("POST", INFER, BODY)
            assert (status, json.loads(body)["code"]) == (413, "too_large")
            assert "retry-after" not in headers
        assert service.engine.access.blocks.blocked == 0


def test_lines_of_a_list_header_are_joined(monkeypatch):
    with small_engine(trusted_proxies="127.0.0.0/8") as engine:
        app = create_app(engine)
        seen = []
        identify = engine.identify

        def watched(**options):
            seen.append(identify(**options).id)
            return identify(**options)

        monkeypatch.setattr(engine, "identify", watched)
        for lines, _ in FORWARDED:
            headers = [(b"x-forwarded-for", line.encode()) for line in lines]
            asyncio.run(ask(app, ("GET", "/v2", headers, b"")))
        app.transport.close()
    assert seen == [client for _, client in FORWARDED]


FORWARDED = [
    (["6.6.6.6", "192.0.2.7"], "192.0.2.7"),
    (["192.0.2.7", "127.0.0.9"], "192.0.2.7"),
    (["192.0.2.7", "127.0.0.9, 127.0.0.8", "127.0.0.7"], "192.0.2.7"),
    (["6.6.6.6, 203.0.113.7:52344", "127.0.0.9"], "203.0.113.7"),
    (["[2001:db8:1:2::9]:443", ""], "2001:db8:1:2::/64"),
]


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "content-type", "host"])
def test_a_header_that_is_no_list_comes_once(name):
    with small_engine() as engine:
        app = create_app(engine)
        pairs = [(name.encode(), b"application/json")] * 2
        status, _ = asyncio.run(ask(app, ("POST", INFER, pairs, BODY)))
        assert status == 400
        app.transport.close()


def test_a_host_without_memory_is_503(monkeypatch):
    with small_engine() as engine:
        app = create_app(engine)

        def exhausted(*args, **options):
            raise MemoryError

        for place in ("decode_request", "encode_response"):
            with monkeypatch.context() as patch:
                patch.setattr(f"moe_jax.serving.http.infer.{place}", exhausted)
                status, answer = asked(app, "POST", INFER, BODY)
                assert (status, answer["code"]) == (503, "out_of_memory")
        assert asked(app, "POST", INFER, BODY)[0] == 200
        assert app.transport.account.held == 0
        app.transport.close()


def test_an_answer_does_not_depend_on_its_log_line(monkeypatch):
    """Standard output on a full disk: every write to /dev/full fails."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        log = make_logger("INFO", "development", stream="stdout")
        with served(small_engine(logger=log, admin_key="root")) as service:
            limit = service.server.transport.body_limit
            bearer = {"Authorization": "Bearer root"}
            for _ in range(5):
                assert service.request("POST", INFER, BODY)[0] == 200
                assert service.request("POST", INFER, b"{}")[0] == 400
                status, _, body = service.request(
                    "POST", INFER, b"", {"Content-Length": str(limit + 1)}
                )
                assert (status, json.loads(body)["code"]) == (413, "too_large")
                assert service.request("POST", "/admin/reload", b"", bearer)[0] == 200
        monkeypatch.undo()


def test_while_it_warms_up_probes_are_answered_and_requests_told_to_come_back(monkeypatch):
    loading = threading.Event()

    def load(*args):
        loading.wait(60)
        raise ValueError("no such weights")

    monkeypatch.setattr("moe_jax.serving.engine.served.load_weights", load)
    with RouterEngine(load_config(env={}, **SMALL), background=True) as engine:
        app = create_app(engine)
        assert asked(app, "GET", "/v2/health/live")[0] == 200
        assert asked(app, "GET", "/health")[0] == 200
        assert asked(app, "GET", "/metrics")[0] == 200
        assert asked(app, "GET", "/ready") == (503, {"ready": False, "reasons": ["warming"]})
        assert asked(app, "GET", "/v2/models/router")[0] == 503
        status, answer = asked(app, "POST", INFER, BODY)
        assert (status, answer["code"]) == (503, "warming")
        loading.set()
        deadline = time.monotonic() + 60
        while engine.load_error is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert asked(app, "GET", "/ready")[1]["reasons"] == ["params_missing"]
        app.transport.close()


def test_smoke_says_that_the_service_still_warms_and_tries_no_more(monkeypatch):
    loading = threading.Event()

    def load(*args):
        loading.wait(60)
        raise ValueError("no such weights")

    monkeypatch.setattr("moe_jax.serving.engine.served.load_weights", load)
    with served(RouterEngine(load_config(env={}, **SMALL), background=True)) as service:
        live, ready, *others = check(service.address)
        loading.set()
    assert (live["ok"], ready["ok"]) == (True, False)
    assert "still warming: it loads and compiles. Run smoke again" in ready["detail"]
    assert [c["detail"] for c in others] == ["not tried"] * 3
