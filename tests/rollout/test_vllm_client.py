"""Errors of servers, each reported in bounded time; small fake servers stand in for vLLM's."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rollout.contract import END_IDS, prepared_model, prepared_tokenizer, prompts_of

from reinforcepp import ReinforceConfig
from reinforcepp.config.reinforce import server_addresses
from reinforcepp.errors import ConfigError, EngineLost, RolloutError
from reinforcepp.rollout.engine import request_seed
from reinforcepp.rollout.selection import choose_engine
from reinforcepp.rollout.vllm import server_pool
from reinforcepp.rollout.vllm.client import Timeouts, VllmClient
from reinforcepp.rollout.vllm.server_engine import VllmServerEngine
from reinforcepp.rollout.vllm.server_transfer import EXTENSION
from reinforcepp.types import Sampling

KEY = "sk-quite-secret"
SHORT = Timeouts(connect=1, health_interval=0.1, health=1.5, progress=2, rejoin=1)
CONFIG = {
    "model_config": {"dtype": "torch.bfloat16", "logprobs_mode": "processed_logprobs"},
    "parallel_config": {"worker_extension_cls": EXTENSION},
    "weight_transfer_config": None,
}


def event(ids, *, logprobs=(-1.0,), reason=None, text="") -> str:
    choice = {"token_ids": ids, "logprobs": {"token_logprobs": list(logprobs)}, "finish_reason": reason, "text": text}
    return json.dumps({"choices": [choice]}, ensure_ascii=False)


def stream(*events: str) -> str:
    return "".join(f"data: {event}\n\n" for event in (*events, "[DONE]"))


class Peer:
    """A fake vLLM server. A test sets responses in ``responses``: a text, a status and a text, a list, or a function."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict, str | None]] = []
        self.version = "new"
        self.responses = {
            "/health": "",
            "/version": '{"version": "0.32.1"}',
            "/v1/models": '{"data": [{"id": "served", "max_model_len": 256}]}',
            "/server_info": json.dumps({"vllm_config": CONFIG}),
            "/reset_prefix_cache": '{"success": true}',
            "/v1/completions": stream(event([5, 6], logprobs=(-1.0, -2.0)), event([0], reason="stop")),
            "/weight_info": lambda: json.dumps({"weight_version": self.version}),
        }
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "null") if length else {}
                path = self.path.partition("?")[0]
                peer.asked.append((path, body, self.headers.get("Authorization")))
                if path == "/update_weight_version":
                    peer.version = body["new_version"]
                response = peer.responses.get(path, "{}")
                if path == "/v1/completions" and "stream" not in body:
                    response = "{}"  # the check for the last token
                response = response() if callable(response) else response
                if isinstance(response, list):  # slowly, one part per second
                    self.send_response(200)
                    self.end_headers()
                    for part in response:
                        self.wfile.write(part.encode())
                        time.sleep(1)
                    return
                status, text = response if isinstance(response, tuple) else (200, response)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, *_) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_) -> None:
                """Ignore clients that disconnect early."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def peer():
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr(server_pool, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(server_pool, "FIRST_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(server_pool, "MAX_RETRY_SECONDS", 0.1)


@pytest.fixture
def start(tmp_path):
    """Return ``start(url, ...)``, which starts an engine on servers at these addresses."""
    made = []

    def engine(*urls: str, model=None, **settings) -> VllmServerEngine:
        defaults = {"max_length": 64, "folder": tmp_path, "timeouts": SHORT, "batch_size": 4} | settings
        made.append(VllmServerEngine(urls, model or prepared_model(), prepared_tokenizer(), **defaults))
        return made[-1]

    yield engine
    for each in made:
        each.close()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# --- rejected at the start --------------------------------------------------------------------------------------------


def test_a_server_with_wrong_settings_is_rejected_with_the_command_to_start_it(peer, start, monkeypatch):
    peer.responses["/server_info"] = (404, '{"detail":"Not Found"}')
    with pytest.raises(RolloutError, match=r"doesn't offer /server_info.*\n *VLLM_SERVER_DEV_MODE=1 vllm serve "):
        start(peer.url)
    other = CONFIG | {"model_config": CONFIG["model_config"] | {"logprobs_mode": "raw_logprobs"}}
    peer.responses["/server_info"] = json.dumps({"vllm_config": other})
    with pytest.raises(RolloutError, match=r"raw_logprobs.*\n.*--max-model-len 88 --logprobs-mode processed_logprobs"):
        start(peer.url)
    with pytest.raises(RolloutError, match=r"--host 127.0.0.1 .*--middleware reinforcepp.commands.access.RequireKey\n"):
        start(peer.url)
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RolloutError, match=r"--host 127.0.0.1 .*processed_logprobs\n"):
        start(peer.url)


def test_one_incompatible_server_of_two_stops_the_start(peer, start):
    fit = Peer()
    peer.responses["/v1/models"] = (401, "")
    with pytest.raises(RolloutError, match=rf"VLLM_API_KEY: the vLLM server {peer.url} expects another key"):
        start(fit.url, peer.url)
    fit.close()


def test_a_server_that_is_not_vllm(peer, start):
    peer.responses["/server_info"] = "{}"
    with pytest.raises(RolloutError, match=r"doesn't describe itself as vLLM 0.32.x .*KeyError"):
        start(peer.url)
    peer.responses["/v1/models"] = "<html>"
    with pytest.raises(RolloutError, match="isn't a vLLM server; it answered '<html>'"):
        start(peer.url)
    peer.responses["/health"] = (404, "")
    with pytest.raises(RolloutError, match="doesn't offer /health"):
        start(peer.url)


def test_another_version_is_logged(peer, start, caplog):
    start(peer.url)
    assert "vLLM 0." not in caplog.text
    peer.responses["/version"] = '{"version": "0.40.2"}'
    start(peer.url)
    assert "runs vLLM 0.40.2" in caplog.text


def test_unreachable_servers(start):
    """A closed port, an unknown host name, a silent host, and a port that accepts and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = {
            closed_port(): r"can't be reached \(Connection refused\)",
            "http://no-such-host.invalid:8000": r"can't be reached \(.*(not known|resolution)",
            f"http://127.0.0.1:{silent.getsockname()[1]}": "didn't respond in time",
            "http://192.0.2.1:8000": "can't be reached",
        }
        for address, why in addresses.items():
            with pytest.raises(RolloutError, match=rf"no vLLM server is available: {address} {why}"):
                start(address)
        with pytest.raises(RolloutError) as caught:
            start(*addresses)
        assert all(address in str(caught.value) for address in addresses)


def test_a_port_with_another_protocol(start):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak() -> None:
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                connection.sendall(b"220 mail.example ESMTP\r\n")
                connection.close()

        threading.Thread(target=speak, daemon=True).start()
        with pytest.raises(RolloutError, match=r"no vLLM server is available: .* closed the connection"):
            start(f"http://127.0.0.1:{other.getsockname()[1]}")


def test_one_of_two_servers_is_enough_and_the_other_can_join_later(peer, start, caplog):
    late = Peer()
    late.responses["/health"] = (503, "not yet")
    engine = start(peer.url, late.url)
    assert re.search(f"{late.url}.*failed with 503", caplog.text) and len(engine.pool.ready()) == 1
    late.responses["/health"] = ""
    engine.pool.wait()
    assert len(engine.pool.ready()) == 2 and late.version == peer.version
    late.close()


def test_tls_needs_a_trusted_certificate(peer, start, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl isn't installed")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    peer.server.socket = context.wrap_socket(peer.server.socket, server_side=True)
    url = peer.url.replace("http", "https")
    with pytest.raises(RolloutError, match=r"can't be reached \(.*certificate"):
        start(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    assert start(url).generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))


def test_servers_that_other_nodes_reach_are_a_warning(start, caplog):
    def warnings(*urls: str) -> str:
        caplog.clear()
        server_pool._warn_about_exposed(urls)
        return caplog.text

    assert warnings("http://127.0.0.1:8001", "http://[::1]:8002", "http://localhost:8003") == ""
    message = warnings("http://127.0.0.1:8001", "http://gpu1:8000", "https://10.0.0.2:8443")
    assert "http://gpu1:8000, https://10.0.0.2:8443: the connection isn't encrypted, and vLLM's" in message
    assert "127.0.0.1" not in message and "isn't encrypted" not in warnings("https://gpu1:8443")
    with pytest.raises(EngineLost):
        start("http://no-such-host.invalid:8000")
    assert "run code for every client" in caplog.text


# --- requests ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_only_in_a_header(peer, start, monkeypatch):
    start(peer.url)
    assert {key for _, _, key in peer.asked} == {f"Bearer {KEY}"}
    assert KEY not in str([(path, body) for path, body, _ in peer.asked])
    peer.asked.clear()
    monkeypatch.delenv("VLLM_API_KEY")
    start(peer.url)
    assert {key for _, _, key in peer.asked} == {None}
    monkeypatch.setenv("VLLM_API_KEY", "sk one\n")
    with pytest.raises(ConfigError, match="VLLM_API_KEY: the key holds") as caught:
        start(peer.url)
    assert "sk one" not in str(caught.value)


def test_a_request_has_the_prompts_tokens_and_the_completions_seed(peer, start):
    engine, prompts = start(peer.url), prompts_of(prepared_tokenizer())[:2]
    peer.asked.clear()
    completions = engine.generate(prompts, Sampling(12, 0.7, 0.9, 40, 1.1, num_samples=2, seed=5))
    asked = sorted((body for path, body, _ in peer.asked if path == "/v1/completions"), key=lambda body: body["seed"])
    rows = [(prompt, sample) for prompt in prompts for sample in range(2)]
    expected = {request_seed(5, prompt.key, sample): list(prompt.ids) for prompt, sample in rows}
    assert [(body["seed"], body["prompt"]) for body in asked] == sorted(expected.items())
    expected_body = {
        "max_tokens": 12,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "min_p": 0,
    }
    expected_body |= {
        "ignore_eos": True,
        "stop_token_ids": END_IDS,
        "logprobs": 0,
        "return_token_ids": True,
        "model": "served",
    }
    assert all(expected_body.items() <= body.items() for body in asked)
    assert {c.ids for c in completions} == {(5, 6, 0)} and {c.logprobs for c in completions} == {(-1.0, -2.0, -1.0)}
    assert [c.prompt.key for c in completions] == [0, 0, 1, 1]


def test_the_requests_of_an_update_are_in_order(peer, start):
    engine = start(peer.url)
    peer.asked.clear()
    engine.load_weights(prepared_model())
    paths = [path for path, _, _ in peer.asked if path != "/health"]
    assert paths[0] == "/pause" and paths[-3:] == ["/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert paths[1:-3] == ["/collective_rpc"] * 2
    assert peer.version.endswith("-2")


# --- errors during a run ----------------------------------------------------------------------------------------------

SEPARATORS = "a\u2028b\x85c\x0bd"


def test_line_separators_inside_a_text_do_not_split_events(peer, start):
    peer.responses["/v1/completions"] = stream(event([5], text=SEPARATORS), event([7], reason="stop", text=SEPARATORS))
    (completion,) = start(peer.url).generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))
    assert completion.ids == (5, 7)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (stream(event([5])), "broke off in the middle of a completion (without a reason)"),
        (stream(event([5], reason="abort")), "broke off in the middle of a completion (abort)"),
        (stream(event([], logprobs=(), reason="stop")), "broke off in the middle of a completion (stop)"),
        (stream(event([5, 6], reason="stop")), "broke off in the middle of a completion (stop)"),
        (
            stream('{"error": {"message": "no memory"}}'),
            "failed in the middle of a completion ({'message': 'no memory'})",
        ),
        (stream('{"choices": []}'), "sent an unreadable response"),
        (stream("nonsense"), "sent an unreadable response"),
        ((500, "oh"), "failed with 500"),
        (lambda: time.sleep(0.7) or (500, "late"), "failed with 500"),
        (lambda: time.sleep(4) or "", "made no progress for 2 s"),
    ],
    ids=range(10),
)
def test_an_invalid_response_is_requeued_to_another_server(peer, start, response, reason):
    """Without a second server the run would stop after several losses in a row."""
    second = Peer()
    engine, prompts = start(peer.url, second.url), prompts_of(prepared_tokenizer())[:2]
    peer.responses["/v1/completions"] = response
    peer.responses["/v1/models"] = (500, "and it isn't taken back")
    completions = engine.generate(prompts, Sampling(4))
    assert [c.prompt.key for c in completions] == [0, 1] and {c.ids for c in completions} == {(5, 6, 0)}
    stats = engine.dispatches[-1]
    assert (stats.lost, stats.requeued) == (1, 1) and reason in stats.reasons[0]
    second.close()


def test_a_slow_server_is_not_lost(peer, start):
    """It takes longer than the progress timeout in total, and single health checks fail, but never two in a row."""
    engine = start(peer.url)
    looks = iter(range(1000))
    peer.responses["/health"] = lambda: time.sleep(2 * (next(looks) % 2 == 0)) or ""
    peer.responses["/v1/completions"] = [*stream(event([5]), event([6]), event([0], reason="stop")).split("\n", 5)]
    peer.responses["/v1/completions"] = [part + "\n" for part in peer.responses["/v1/completions"]]
    (completion,) = engine.generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))
    assert completion.ids == (5, 6, 0) and engine.dispatches[-1].lost == 0


def test_a_rejected_request_stops_the_run(peer, start):
    engine = start(peer.url)
    peer.responses["/v1/completions"] = (400, '{"error": "top_k"}')
    with pytest.raises(RolloutError, match=r"rejected a request to /v1/completions: '{.error.: .top_k.}") as caught:
        engine.generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))
    assert not isinstance(caught.value, EngineLost), "the request would be sent to the other servers, and again"


def test_a_server_that_always_fails_stops_the_run(peer, start):
    engine = start(peer.url)
    answers = iter(range(1000))
    peer.responses["/v1/completions"] = lambda: (200, "{}") if next(answers) % 2 else (500, "oh")
    with pytest.raises(RolloutError, match=r"workers in a row without a result"):
        engine.generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))


def test_lost_servers_are_listed_with_their_last_error(peer, start):
    second = Peer()
    engine = start(peer.url, second.url)
    second.close()
    peer.responses["/health"] = (503, "its engine is dead")
    peer.responses["/v1/completions"] = lambda: time.sleep(0.5) or ""
    with pytest.raises(RolloutError) as caught:
        engine.generate(prompts_of(prepared_tokenizer())[:2], Sampling(4))
    assert f"{peer.url} failed with 503" in str(caught.value) and "its engine is dead" in str(caught.value)
    assert f"{second.url} can't be reached (Connection refused)" in str(caught.value)


def test_errors_during_an_update(peer, start):
    """A server that keeps its cache or rejects weights isn't used; without another server the run stops with the cause."""
    engine = start(peer.url)
    peer.responses["/reset_prefix_cache"] = '{"success": false}'
    with pytest.raises(RolloutError, match="didn't empty its prefix cache"):
        engine.load_weights(prepared_model())
    peer.responses["/reset_prefix_cache"] = '{"success": true}'
    engine.pool._timeouts = Timeouts(rejoin=60)
    engine.load_weights(prepared_model())
    peer.responses["/collective_rpc"] = (500, "size mismatch")
    engine.pool._timeouts = SHORT
    with pytest.raises(RolloutError, match=r"failed with 500.*size mismatch.*Restart the server"):
        engine.load_weights(prepared_model())


def test_results_of_an_interrupted_call_are_dropped(peer, start):
    """As in a notebook, where an interrupt leaves requests in progress."""
    engine, prompts = start(peer.url), prompts_of(prepared_tokenizer())[:3]
    engine.pool.begin(Sampling(4))
    engine.pool.submit(engine.pool.clients[0], prompts[:1])
    assert [c.prompt.key for c in engine.generate(prompts[1:], Sampling(4))] == [1, 2]


def test_a_server_that_comes_back_with_another_key_is_not_used(peer, start):
    second = Peer()
    engine = start(peer.url, second.url)
    second.responses["/v1/completions"] = second.responses["/v1/models"] = (401, "who are you?")
    assert len(engine.generate(prompts_of(prepared_tokenizer())[:2], Sampling(4))) == 2
    end = time.monotonic() + 30
    while "expects another key" not in engine.pool._lost[engine.pool.clients[1]].reason:
        engine.pool._poll()
        assert time.monotonic() < end
    assert engine.pool.ready() == [engine.pool.clients[0]]
    second.close()


def test_an_unwritable_folder_is_reported(peer, start, tmp_path):
    plain = CONFIG | {"parallel_config": {"worker_extension_cls": ""}}
    peer.responses["/server_info"] = json.dumps({"vllm_config": plain})
    (tmp_path / "file").touch()
    with pytest.raises(RolloutError, match=r"can't be written to .*file.* \(Not a directory\)"):
        start(peer.url, folder=tmp_path / "file")


def test_a_check_of_all_servers_survives_a_lost_one(peer, start):
    second = Peer()
    engine, prompts = start(peer.url, second.url), prompts_of(prepared_tokenizer())[:3]
    assert len(engine.generate_everywhere(prompts, Sampling(4))) == 6
    second.responses["/v1/completions"] = (500, "oh")
    assert len(engine.generate_everywhere(prompts, Sampling(4))) == 3
    second.close()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_addresses():
    assert server_addresses("vllm://a:1,[::1]:2") == ["http://a:1", "http://[::1]:2"]
    assert server_addresses("vllm+https://gpu.example:8443") == ["https://gpu.example:8443"]
    assert server_addresses("vllm") == server_addresses("ray://auto") == []
    assert ReinforceConfig(rollout="vllm://10.0.0.1:8000,10.0.0.2:8000").rollout
    assert choose_engine("vllm://a:1", None, None).name == "servers"


@pytest.mark.parametrize(
    "rollout", ["vllm://", "vllm://a", "vllm://a:b", "vllm://a:1,", "vllm://k@a:1", "vllm://a:1/v1"]
)
def test_malformed_addresses(rollout):
    with pytest.raises(ConfigError, match=r"vllm://HOST:PORT,HOST:PORT, not 'vllm://"):
        ReinforceConfig(rollout=rollout)


def test_invalid_addresses():
    for rollout in ("vllm://a:0", "vllm://a:70000", "vllm://a:1,b:2,a:1"):
        with pytest.raises(ConfigError, match=r"no valid port|given twice"):
            ReinforceConfig(rollout=rollout)
    with pytest.raises(ConfigError, match=r"load_in_4bit.*servers"):
        ReinforceConfig(rollout="vllm://a:1", use_peft=True, load_in_4bit=True)
    with pytest.raises(ConfigError, match="rollout_workers is a setting of ray:// pools"):
        ReinforceConfig(rollout="vllm://a:1", rollout_workers=2)


def test_a_client_works_inside_a_running_event_loop(peer):
    """A notebook runs one."""

    async def notebook():
        return VllmClient(peer.url, None, None, SHORT).get("/version")

    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(asyncio.run, notebook()).result() == VllmClient(peer.url, None, None, SHORT).get(
            "/version"
        )


def test_a_client_must_be_checked_before_it_generates(peer):
    client = VllmClient(peer.url, None, None, SHORT)
    with pytest.raises(AssertionError, match="checked first"):
        client.generate(
            prepared_tokenizer(), prompts_of(prepared_tokenizer()), Sampling(4), max_concurrent=1, version=""
        )
