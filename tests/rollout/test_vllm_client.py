"""Servers that aren't as they should be, each told within a bounded time: small ones that stand for vLLM's."""

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
    """Answers as vLLM's server does, but for what a test sets in ``says``: a text, a status and a text, a list, a function."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict, str | None]] = []
        self.version = "new"
        self.says = {
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
                said = peer.says.get(path, "{}")
                if path == "/v1/completions" and "stream" not in body:
                    said = "{}"  # the question whether it knows the last token
                said = said() if callable(said) else said
                if isinstance(said, list):  # slowly, a piece a second
                    self.send_response(200)
                    self.end_headers()
                    for piece in said:
                        self.wfile.write(piece.encode())
                        time.sleep(1)
                    return
                status, text = said if isinstance(said, tuple) else (200, said)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, *_) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_) -> None:
                """Of those who don't wait for an answer."""

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
    """``start(url, ...)``: an engine on servers at these addresses."""
    made = []

    def engine(*urls: str, model=None, **settings) -> VllmServerEngine:
        told = {"max_length": 64, "folder": tmp_path, "timeouts": SHORT, "batch_size": 4} | settings
        made.append(VllmServerEngine(urls, model or prepared_model(), prepared_tokenizer(), **told))
        return made[-1]

    yield engine
    for each in made:
        each.close()


def nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# --- what is refused at the start -------------------------------------------------------------------------------------


def test_a_server_without_what_a_training_needs_is_told_how_it_is_started(peer, start):
    peer.says["/server_info"] = (404, '{"detail":"Not Found"}')
    with pytest.raises(RolloutError, match=r"doesn't offer /server_info.*\n *VLLM_SERVER_DEV_MODE=1 vllm serve "):
        start(peer.url)
    other = CONFIG | {"model_config": CONFIG["model_config"] | {"logprobs_mode": "raw_logprobs"}}
    peer.says["/server_info"] = json.dumps({"vllm_config": other})
    with pytest.raises(RolloutError, match=r"raw_logprobs.*\n.*--max-model-len 88 --logprobs-mode processed_logprobs"):
        start(peer.url)


def test_one_that_is_unfit_stops_the_start_though_another_is_fit(peer, start):
    fit = Peer()
    peer.says["/v1/models"] = (401, "")
    with pytest.raises(RolloutError, match=rf"VLLM_API_KEY: the vLLM server {peer.url} expects another key"):
        start(fit.url, peer.url)
    fit.close()


def test_what_is_no_server_of_vllm(peer, start):
    peer.says["/server_info"] = "{}"
    with pytest.raises(RolloutError, match=r"doesn't describe itself as vLLM 0.32.x .*KeyError"):
        start(peer.url)
    peer.says["/v1/models"] = "<html>"
    with pytest.raises(RolloutError, match="isn't a vLLM server; it answered '<html>'"):
        start(peer.url)
    peer.says["/health"] = (404, "")
    with pytest.raises(RolloutError, match="doesn't offer /health"):
        start(peer.url)


def test_another_version_is_told(peer, start, caplog):
    start(peer.url)
    assert "vLLM 0." not in caplog.text
    peer.says["/version"] = '{"version": "0.40.2"}'
    start(peer.url)
    assert "runs vLLM 0.40.2" in caplog.text


def test_nobody_answers(start):
    """A port where nobody listens, a name that nobody has, a host that is silent, and one that accepts and is silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = {
            nobody(): r"can't be reached \(Connection refused\)",
            "http://no-such-host.invalid:8000": r"can't be reached \(.*(not known|resolution)",
            f"http://127.0.0.1:{silent.getsockname()[1]}": "didn't respond in time",
            "http://192.0.2.1:8000": "can't be reached",
        }
        for address, why in addresses.items():
            with pytest.raises(RolloutError, match=rf"no vLLM server is available: {address} {why}"):
                start(address)
        with pytest.raises(RolloutError) as told:
            start(*addresses)
        assert all(address in str(told.value) for address in addresses)


def test_a_port_that_speaks_something_else(start):
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


def test_one_of_two_is_enough_and_the_other_may_come(peer, start, caplog):
    late = Peer()
    late.says["/health"] = (503, "not yet")
    engine = start(peer.url, late.url)
    assert re.search(f"{late.url}.*failed with 503", caplog.text) and len(engine.pool.ready()) == 1
    late.says["/health"] = ""
    engine.pool.wait()
    assert len(engine.pool.ready()) == 2 and late.version == peer.version
    late.close()


def test_over_tls_a_certificate_that_is_known_is_wanted(peer, start, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
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


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_the_key_goes_in_a_header_and_nowhere_else(peer, start, monkeypatch):
    start(peer.url)
    assert {key for _, _, key in peer.asked} == {f"Bearer {KEY}"}
    assert KEY not in str([(path, body) for path, body, _ in peer.asked])
    peer.asked.clear()
    monkeypatch.delenv("VLLM_API_KEY")
    start(peer.url)
    assert {key for _, _, key in peer.asked} == {None}
    monkeypatch.setenv("VLLM_API_KEY", "sk one\n")
    with pytest.raises(ConfigError, match="VLLM_API_KEY: the key holds") as told:
        start(peer.url)
    assert "sk one" not in str(told.value)


def test_a_completion_is_asked_for_by_its_tokens_and_its_own_seed(peer, start):
    engine, prompts = start(peer.url), prompts_of(prepared_tokenizer())[:2]
    peer.asked.clear()
    completions = engine.generate(prompts, Sampling(12, 0.7, 0.9, 40, 1.1, num_samples=2, seed=5))
    asked = sorted((body for path, body, _ in peer.asked if path == "/v1/completions"), key=lambda body: body["seed"])
    rows = [(prompt, sample) for prompt in prompts for sample in range(2)]
    expected = {request_seed(5, prompt.key, sample): list(prompt.ids) for prompt, sample in rows}
    assert [(body["seed"], body["prompt"]) for body in asked] == sorted(expected.items())
    told = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "min_p": 0}
    told |= {"ignore_eos": True, "stop_token_ids": END_IDS, "logprobs": 0, "return_token_ids": True, "model": "served"}
    assert all(told.items() <= body.items() for body in asked)
    assert {c.ids for c in completions} == {(5, 6, 0)} and {c.logprobs for c in completions} == {(-1.0, -2.0, -1.0)}
    assert [c.prompt.key for c in completions] == [0, 0, 1, 1]


def test_the_order_of_an_update(peer, start):
    engine = start(peer.url)
    peer.asked.clear()
    engine.load_weights(prepared_model())
    paths = [path for path, _, _ in peer.asked if path != "/health"]
    assert paths[0] == "/pause" and paths[-3:] == ["/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert paths[1:-3] == ["/collective_rpc"] * 2
    assert peer.version.endswith("-2")


# --- what goes wrong in the middle ------------------------------------------------------------------------------------

SEPARATORS = "a\u2028b\x85c\x0bd"


def test_ends_of_lines_within_a_text_are_none_of_the_stream(peer, start):
    peer.says["/v1/completions"] = stream(event([5], text=SEPARATORS), event([7], reason="stop", text=SEPARATORS))
    (completion,) = start(peer.url).generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))
    assert completion.ids == (5, 7)


@pytest.mark.parametrize(
    ("said", "reason"),
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
def test_an_answer_that_is_none_is_asked_for_elsewhere(peer, start, said, reason):
    """Elsewhere is a second server; with none the run would stop after some in a row."""
    second = Peer()
    engine, prompts = start(peer.url, second.url), prompts_of(prepared_tokenizer())[:2]
    peer.says["/v1/completions"] = said
    peer.says["/v1/models"] = (500, "and it isn't taken back")
    completions = engine.generate(prompts, Sampling(4))
    assert [c.prompt.key for c in completions] == [0, 1] and {c.ids for c in completions} == {(5, 6, 0)}
    stats = engine.dispatches[-1]
    assert (stats.lost, stats.requeued) == (1, 1) and reason in stats.reasons[0]
    second.close()


def test_one_that_is_slow_is_waited_for(peer, start):
    """Longer than it may show nothing; now and then its health isn't told in time, but never twice in a row."""
    engine = start(peer.url)
    looks = iter(range(1000))
    peer.says["/health"] = lambda: time.sleep(2 * (next(looks) % 2 == 0)) or ""
    peer.says["/v1/completions"] = [*stream(event([5]), event([6]), event([0], reason="stop")).split("\n", 5)]
    peer.says["/v1/completions"] = [piece + "\n" for piece in peer.says["/v1/completions"]]
    (completion,) = engine.generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))
    assert completion.ids == (5, 6, 0) and engine.dispatches[-1].lost == 0


def test_a_request_that_no_server_takes_stops_the_run(peer, start):
    engine = start(peer.url)
    peer.says["/v1/completions"] = (400, '{"error": "top_k"}')
    with pytest.raises(RolloutError, match=r"rejected a request to /v1/completions: {.error.: .top_k.}") as told:
        engine.generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))
    assert not isinstance(told.value, EngineLost), "it would be asked of the others, and again"


def test_one_that_answers_nothing_right_stops_the_run(peer, start):
    engine = start(peer.url)
    answers = iter(range(1000))
    peer.says["/v1/completions"] = lambda: (200, "{}") if next(answers) % 2 else (500, "oh")
    with pytest.raises(RolloutError, match=r"workers in a row without a result"):
        engine.generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))


def test_when_none_comes_back_each_is_named_with_its_last_fault(peer, start):
    second = Peer()
    engine = start(peer.url, second.url)
    second.close()
    peer.says["/health"] = (503, "its engine is dead")
    peer.says["/v1/completions"] = lambda: time.sleep(0.5) or ""
    with pytest.raises(RolloutError) as told:
        engine.generate(prompts_of(prepared_tokenizer())[:2], Sampling(4))
    assert f"{peer.url} failed with 503" in str(told.value) and "its engine is dead" in str(told.value)
    assert f"{second.url} can't be reached (Connection refused)" in str(told.value)


def test_while_weights_are_handed_over(peer, start):
    """A server whose cache isn't emptied isn't used; with none left that is told, and what it said where it can't take them."""
    engine = start(peer.url)
    peer.says["/reset_prefix_cache"] = '{"success": false}'
    with pytest.raises(RolloutError, match="didn't empty its prefix cache"):
        engine.load_weights(prepared_model())
    peer.says["/reset_prefix_cache"] = '{"success": true}'
    engine.pool._timeouts = Timeouts(rejoin=60)
    engine.load_weights(prepared_model())
    peer.says["/collective_rpc"] = (500, "size mismatch")
    engine.pool._timeouts = SHORT
    with pytest.raises(RolloutError, match=r"failed with 500.*size mismatch.*Restart the server"):
        engine.load_weights(prepared_model())


def test_an_answer_to_what_was_asked_before_is_not_taken(peer, start):
    """As after an interrupt, when somebody goes on in the same process."""
    engine, prompts = start(peer.url), prompts_of(prepared_tokenizer())[:3]
    engine.pool.set_work(prompts, Sampling(4))
    engine.pool.submit(engine.pool.clients[0], [0])
    assert [c.prompt.key for c in engine.generate(prompts[1:], Sampling(4))] == [1, 2]


def test_one_that_comes_back_as_another_is_not_used(peer, start):
    second = Peer()
    engine = start(peer.url, second.url)
    second.says["/v1/completions"] = second.says["/v1/models"] = (401, "who are you?")
    assert len(engine.generate(prompts_of(prepared_tokenizer())[:2], Sampling(4))) == 2
    end = time.monotonic() + 30
    while "expects another key" not in engine.pool._lost[engine.pool.clients[1]].reason:
        engine.pool._poll()
        assert time.monotonic() < end
    assert engine.pool.ready() == [engine.pool.clients[0]]
    second.close()


def test_a_folder_that_can_not_be_written_to_is_told(peer, start, tmp_path):
    plain = CONFIG | {"parallel_config": {"worker_extension_cls": ""}}
    peer.says["/server_info"] = json.dumps({"vllm_config": plain})
    (tmp_path / "file").touch()
    with pytest.raises(RolloutError, match=r"can't be written to .*file.* \(Not a directory\)"):
        start(peer.url, folder=tmp_path / "file")


def test_a_check_of_all_survives_one_that_is_lost(peer, start):
    second = Peer()
    engine, prompts = start(peer.url, second.url), prompts_of(prepared_tokenizer())[:3]
    assert len(engine.generate_everywhere(prompts, Sampling(4))) == 6
    second.says["/v1/completions"] = (500, "oh")
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
def test_addresses_that_are_none(rollout):
    with pytest.raises(ConfigError, match=r"vllm://HOST:PORT,HOST:PORT, not 'vllm://"):
        ReinforceConfig(rollout=rollout)


def test_addresses_that_can_not_be():
    for rollout in ("vllm://a:0", "vllm://a:70000", "vllm://a:1,b:2,a:1"):
        with pytest.raises(ConfigError, match="which is no port or named twice"):
            ReinforceConfig(rollout=rollout)
    with pytest.raises(ConfigError, match="Weights of 4 bits can't be handed to vLLM's servers"):
        ReinforceConfig(rollout="vllm://a:1", use_peft=True, load_in_4bit=True)
    with pytest.raises(ConfigError, match="rollout_workers is a setting of ray:// pools"):
        ReinforceConfig(rollout="vllm://a:1", rollout_workers=2)


def test_a_client_works_where_a_loop_runs(peer):
    """As in a notebook."""

    async def notebook():
        return VllmClient(peer.url, None, None, SHORT).get("/version")

    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(asyncio.run, notebook()).result() == VllmClient(peer.url, None, None, SHORT).get(
            "/version"
        )


def test_a_client_is_checked_before_it_is_asked(peer):
    client = VllmClient(peer.url, None, None, SHORT)
    with pytest.raises(AssertionError, match="checked first"):
        client.generate(
            prepared_tokenizer(), prompts_of(prepared_tokenizer()), Sampling(4), max_concurrent=1, version=""
        )
