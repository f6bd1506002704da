"""Promises about the service: what it answers, whatever it is sent; what it counts; how it starts and ends."""

import contextlib
import io
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import httpx2 as httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_model import NAMES, ROOT, SERVE, served, wafer, write_model
from starlette.testclient import TestClient

from waferlab.deployment import service
from waferlab.deployment.answering import MAX_IN_WORK, PIECE
from waferlab.deployment.predictor import Predictor
from waferlab.deployment.request_maps import MAX_BODY, MAX_DIES, MAX_MAPS, RefusedRequest, maps_from_body
from waferlab.deployment.service import create_app, serve
from waferlab.deployment.shadow import WAITING
from waferlab.errors import UserError

JSON, NPY = {"Content-Type": "application/json"}, {"Content-Type": "application/x-npy"}
SECRET, SECRET_NUMBER = "a word of the sender", 987654321


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def client(model):
    with client_of(Predictor(model)) as client:
        yield client


@pytest.fixture(scope="module")
def server(model):
    with served(model) as (_, url):
        yield url


@contextlib.contextmanager
def client_of(predictor, **more):
    with TestClient(create_app(predictor, **more), raise_server_exceptions=False) as client:
        until(lambda: client.get("/ready").status_code == 200 or not isinstance(predictor, Predictor))
        yield client


def until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_json(*maps):
    return json.dumps({"maps": [np.asarray(one).tolist() for one in maps]}).encode()


def count(client, name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def refused(answer, *statuses):
    """That an answer is one sentence, of one of these statuses, without a word of what was sent."""
    assert answer.status_code in statuses, (answer.status_code, answer.text)
    assert [*answer.json()] == ["error"]
    assert answer.json()["error"].endswith(".")
    assert not any(word in answer.text for word in ("Traceback", 'File "', SECRET, str(SECRET_NUMBER)))
    return answer.json()["error"]


# ---------------------------------------------------------------------------------------------- what is answered


LOT = [wafer(0), wafer(0.1), wafer(0.4), wafer(0.95)]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (as_json(*LOT), JSON),
        (as_json(*LOT), {"Content-Type": "Application/JSON; charset=utf-8"}),
        (npy(np.stack(LOT)), NPY),
        (npy(np.asfortranarray(np.stack(LOT))), NPY),
        (npy(np.stack(LOT)), {"Content-Type": "application/octet-stream"}),
    ],
)
def test_a_lot_is_answered_with_classes_probabilities_sets_and_who_should_look(client, model, body, headers):
    answer = client.post("/predict", content=body, headers=headers)
    told, predictor = answer.json(), Predictor(model)
    assert answer.status_code == 200
    assert told["model"] == {"name": "model.onnx", "sha256": predictor.sha256}
    assert told["coverage"] == 0.9 and told["no_promise_for"] == ["Near-full"]  # three lots cannot promise it
    assert [one["class"] for one in told["answers"]][:1] == ["none"]
    assert [one["class"] for one in told["answers"]][2:] == ["Random", "Near-full"]
    assert [one["set"] for one in told["answers"]][::2] == [["none"], ["Random"]]
    assert [one["abstain"] for one in told["answers"]] == [False, True, False, False]
    assert {*told["answers"][1]["set"]} == {"none", "Random"}
    given = [[one["probabilities"][name] for name in NAMES] for one in told["answers"]]
    np.testing.assert_allclose(given, predictor.probabilities(LOT), atol=1e-6)


def test_one_map_and_a_ragged_lot_are_answered(client):
    one = client.post("/predict", content=npy(wafer(0.4, (30, 7))), headers=NPY)
    assert [answer["class"] for answer in one.json()["answers"]] == ["Random"]
    ragged = [wafer(0.95, (1, 1)), wafer(0, (5, 9)), wafer(0.4, (26, 26))]
    several = client.post("/predict", content=as_json(*ragged), headers=JSON)
    assert [answer["class"] for answer in several.json()["answers"]] == ["Near-full", "none", "Random"]


def test_a_large_lot_is_answered_in_order_and_in_pieces(model):
    asked = []

    class Watched(Predictor):
        def predict(self, maps, **more):
            asked.append(len(maps))
            return super().predict(maps, **more)

    rng = np.random.default_rng(0)
    lot = [wafer(share, (10, 10 + i % 3)) for i, share in enumerate(rng.uniform(size=5 * PIECE + 3))]
    with client_of(Watched(model)) as client:
        told = client.post("/predict", content=as_json(*lot), headers=JSON).json()
    assert [answer["class"] for answer in told["answers"]] == Predictor(model).predict(lot).classes
    assert max(asked) == PIECE and sum(asked) == len(lot) + 1


def test_a_model_without_sets_says_so_and_never_abstains(tmp_path):
    with client_of(Predictor(write_model(tmp_path / "plain.onnx", sets=False))) as client:
        told = client.post("/predict", content=as_json(wafer(0.1)), headers=JSON).json()
        assert count(client, "wafer_abstentions_total") == 0
    assert told["coverage"] is None and told["answers"][0]["set"] is None and told["answers"][0]["abstain"] is None


def test_the_promised_coverage_is_the_one_that_was_asked_for(model):
    with client_of(Predictor(model), coverage=0.75) as client:
        assert client.get("/ready").json()["coverage"] == 0.75
        assert client.get("/ready").json()["no_promise_for"] == []  # three lots can promise this much
    with pytest.raises(ValueError, match=r"Allowed: 0\.5 to 0\.99"):
        create_app(Predictor(model), coverage=0.999)


def test_the_service_describes_itself_to_programs_and_names_its_pages(client):
    described = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert {*described} == {"application/json", "application/x-npy", "application/octet-stream"}
    example = described["application/json"]["example"]
    assert client.post("/predict", json=example).status_code == 200
    assert "POST /predict" in refused(client.get("/docs"), 404)
    assert "POST /predict" in refused(client.get("/predict"), 405)


# ---------------------------------------------------------------------------------------------- what is refused


def header(shape, descr="'|u1'", order="False"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "not JSON"),
        (b"[[[1]]", 400, "not JSON"),
        (b'{"maps": [[[1]]]} x', 400, "not JSON"),
        (b'{"maps": [[[NaN]]]}', 400, "not JSON"),
        (b'{"maps": [[[Infinity]]]}', 400, "not JSON"),
        ('{"maps": [[[1]]]}'.encode("utf-16"), 400, "not JSON"),
        (b'{"maps": [[[%s]]]}' % (b"9" * 5000), 400, "not JSON"),
        (b"[" * 200_000, 400, "nested too deeply"),
        (b'{"maps":' * 100_000, 413, "more names than maps have"),
        (b"[[[1]]]", 422, "not an object"),
        (b'{"map": [[1]]}', 422, "not an object"),
        (b'{"maps": [[[1]]], "more": 1}', 422, "not an object"),
        (b'{"maps": "a word of the sender"}', 422, "not an object"),
        (b'{"maps": []}', 422, "no map"),
        (b'{"maps": [[1, 2]]}', 422, "map 0 is not a list of rows"),
        (b'{"maps": [[[1]], 1]}', 422, "map 1 is not a list of rows"),
        (b'{"maps": [[]]}', 422, "map 0 is not a list of rows"),
        (b'{"maps": [[[]]]}', 422, "without a die"),
        (b'{"maps": [[[1, 2], [1]]]}', 422, "different lengths"),
        (b'{"maps": [[[1.5, 0.2]]]}', 422, "not whole numbers"),
        (b'{"maps": [[[1.0]]]}', 422, "not whole numbers"),
        (b'{"maps": [[[true]]]}', 422, "not whole numbers"),
        (b'{"maps": [[[null]]]}', 422, "not whole numbers"),
        (b'{"maps": [[["a word of the sender"]]]}', 422, "not whole numbers"),
        (b'{"maps": [[[[1]]]]}', 422, "not whole numbers"),
        (b'{"maps": [[[{}]]]}', 422, "not whole numbers"),
        (b'{"maps": [[[3]]]}', 422, "above 2"),
        (b'{"maps": [[[-1]]]}', 422, "below 0"),
        (b'{"maps": [[[987654321]]]}', 422, "above 2"),
        (b'{"maps": [[[%s]]]}' % (b"9" * 100), 422, "above 2"),
        (b'{"maps": [[[%s]]]}' % b",".join([b"1"] * 1025), 422, "more than 1,024"),
        (b'{"maps": [%s]}' % b",".join([b"[[1]]"] * (MAX_MAPS + 1)), 413, "more than 1,024 maps"),
        (as_json(*[wafer(0, (1000, 1000))] * 3).replace(b" ", b""), 413, "dies together"),
    ],
    ids=range(33),
)  # fmt: skip
def test_json_that_is_no_maps_is_refused_with_a_sentence(client, body, status, says):
    assert says in refused(client.post("/predict", content=body, headers=JSON), status)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "not a .npy file"),
        (b"PK\x03\x04", 400, "not a .npy file"),
        (npy(wafer(0))[:20], 400, "not a .npy file"),
        (header("a word of the sender"), 400, "not a .npy file"),
        (header("(1, 1)", descr="'|O'"), 422, "not uint8"),
        (npy(wafer(0).astype(float)), 422, "not uint8"),
        (npy(wafer(0).astype(bool)), 422, "not uint8"),
        (npy(np.array([{"maps": SECRET}], dtype=object)), 422, "not uint8"),
        (npy(np.ones(4, np.uint8)), 422, "two or three dimensions"),
        (npy(np.ones((1, 1, 2, 2), np.uint8)), 422, "two or three dimensions"),
        (npy(np.full((2, 2), 3, np.uint8)), 422, "above 2"),
        (npy(np.ones((0, 4, 4), np.uint8)), 422, "no map"),
        (npy(np.ones((4, 0), np.uint8)), 422, "without a die"),
        (npy(wafer(0))[:-1], 400, "more or fewer bytes"),
        (npy(wafer(0)) + b"1", 400, "more or fewer bytes"),
        (header("(True, 1)") + b"\x01\x01", 400, "more or fewer bytes"),
        (header("(-1, 4)") + b"\x01" * 4, 422, "without a die"),
        (header("(987654321, 987654321)"), 422, "more than 1,024"),
        (header("(987654321, 20, 20)"), 413, "more than 1,024 maps"),
        (header("(1024, 1024, 1024)"), 413, "dies together"),
        (header("((((" * 2000), 400, "not a .npy file"),
    ],
    ids=range(21),
)
def test_npy_that_is_no_maps_is_refused_with_a_sentence(client, body, status, says):
    assert says in refused(client.post("/predict", content=body, headers=NPY), status)


def test_a_header_that_promises_much_costs_no_memory():
    tracemalloc.start()
    with pytest.raises(RefusedRequest):
        maps_from_body(header("(1024, 1024, 1024)"), "application/x-npy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_DIES


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}, JSON | {"Content-Encoding": "gzip"}])
def test_what_the_headers_do_not_announce_is_not_guessed(client, headers):
    refused(client.post("/predict", content=as_json(wafer(0)), headers=headers), 415)


def test_a_model_that_fails_is_told_in_a_sentence_too_and_is_not_ready(model):
    class Broken(Predictor):
        def predict(self, maps, **more):
            raise RuntimeError(SECRET)

    with TestClient(create_app(Broken(model)), raise_server_exceptions=False) as client:
        refused(client.post("/predict", content=as_json(wafer(0)), headers=JSON), 500)
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        assert count(client, 'wafer_requests_total{status="500"}') == 1


# ---------------------------------------------------------------------------------------------- whatever is sent

some = settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck])
scalars = st.none() | st.booleans() | st.floats() | st.integers() | st.just(SECRET) | st.just(SECRET_NUMBER)
anything = st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.just("maps"), x), max_leaves=20)
almost = st.lists(st.lists(st.lists(st.integers(0, 2) | scalars, max_size=3), max_size=3) | scalars, max_size=3)
changes = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=4)


def answers_or_refuses(client, body, headers):
    """And goes on answering what is right."""
    answer = client.post("/predict", content=body, headers=headers)
    if answer.status_code != 200:
        refused(answer, 400, 413, 415, 422)
    good = client.post("/predict", content=as_json(wafer(0.4)), headers=JSON)
    assert good.status_code == 200 and good.json()["answers"][0]["class"] == "Random"


def changed(body, edits):
    for place, new in edits:
        body = body[:place] + new + body[place + 1 :]
    return body


@some
@given(anything | st.fixed_dictionaries({"maps": almost}))
def test_any_json_is_answered_or_refused(client, value):
    answers_or_refuses(client, json.dumps(value).encode(), JSON)


@some
@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda rest: header("(2, 2)")[:30] + rest))
def test_any_bytes_are_answered_or_refused(client, body):
    for headers in (JSON, NPY):
        answers_or_refuses(client, body, headers)


@some
@given(changes)
def test_a_good_body_with_bad_places_is_answered_or_refused(client, edits):
    answers_or_refuses(client, changed(as_json(*LOT[:2]), edits), JSON)
    answers_or_refuses(client, changed(npy(np.stack(LOT)), edits), NPY)


# ---------------------------------------------------------------------------------------------- bounds


def connect(server, head, body=b""):
    """A connection that has sent the head of a request to /predict and some of its body."""
    host, port = server.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    lines = ["POST /predict HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *head]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def until_in_work(server, number):
    with httpx.Client(base_url=server) as client:
        until(lambda: count(client, "wafer_in_work") == number)


def status_of(connection):
    return int(connection.makefile("rb").readline().split()[1])


def test_a_body_that_is_too_large_is_refused_whatever_its_head_says(server):
    much = (b" " * 2**16 for _ in range(2 * MAX_BODY // 2**16))
    assert "8,388,608 bytes" in refused(httpx.post(f"{server}/predict", content=much, headers=JSON), 413)
    with connect(server, ["Content-Length: 99999999999"]) as connection:
        assert status_of(connection) == 413  # before any of it has arrived
    with connect(server, ["Content-Length: 2"], as_json(wafer(0))) as connection:
        assert status_of(connection) == 400  # it is read as far as it was said to be long
    with connect(server, ["Content-Length: 1000"], b"{"):
        pass  # gone before the end
    assert httpx.post(f"{server}/predict", content=as_json(wafer(0)), headers=JSON).status_code == 200


def test_more_requests_at_once_than_the_memory_is_meant_for_are_told_to_come_again(server):
    body = as_json(wafer(0))
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(server, [f"Content-Length: {len(body)}"])) for _ in range(MAX_IN_WORK)]
        until_in_work(server, MAX_IN_WORK)
        answer = httpx.post(f"{server}/predict", content=body, headers=JSON)
        refused(answer, 503)
        assert answer.headers["Retry-After"] == "1"
        assert httpx.get(f"{server}/health").status_code == 200
        for connection in slow:
            connection.sendall(body)
        assert {status_of(connection) for connection in slow} == {200}
    assert httpx.post(f"{server}/predict", content=body, headers=JSON).status_code == 200


# ---------------------------------------------------------------------------------------------- start and end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_ends_what_is_in_work_takes_nothing_new_and_has_never_needed_torch(model, number):
    body = as_json(wafer(0.4))
    with served(model) as (process, url):
        with connect(url, [f"Content-Length: {len(body)}"], body[:10]) as connection:
            until_in_work(url, 1)
            process.send_signal(number)
            until(lambda: refuses_connections(url))
            connection.sendall(body[10:])
            assert status_of(connection) == 200
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "False\n", "")


def refuses_connections(url):
    try:
        httpx.get(f"{url}/health")
    except httpx.HTTPError:
        return True
    return False


def test_a_port_that_is_taken_or_is_none_ends_with_a_sentence(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "-c", SERVE, model, str(port)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == UserError.exit_status
    assert f"127.0.0.1:{port}" in done.stderr and "--port" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(UserError, match=r"127\.0\.0\.1:99999"):
        serve(Predictor(model), port=99_999)
    with pytest.raises(UserError, match="coverage"):
        serve(Predictor(model), port=0, coverage=2.0)


def test_a_host_that_is_none_of_this_machine_is_named_with_its_own_remedy(model, monkeypatch):
    with pytest.raises(UserError, match=r"192\.0\.2\.7:0 .*Give another --host"):  # RFC 5737: nobody's
        serve(Predictor(model), port=0, host="192.0.2.7")

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"no\.such\.host:0 \(Name or service not known\)\. Give another --host"):
        serve(Predictor(model), port=0, host="no.such.host")


def test_a_page_from_elsewhere_that_calls_this_machine_by_its_own_name_is_not_answered(server):
    for host, status in (("evil.example", 400), ("evil.example:80", 400), ("localhost", 200), ("127.0.0.1:1", 200)):
        assert httpx.get(f"{server}/ready", headers={"Host": host}).status_code == status
    assert "sha256" not in httpx.get(f"{server}/ready", headers={"Host": "evil.example"}).text


@pytest.mark.parametrize("host, alone", [("127.0.0.2", True), ("127.1", True), ("LOCALHOST", True), ("0.0.0.0", False)])
def test_whether_it_answers_to_its_own_names_alone_does_not_depend_on_how_the_address_is_spelt(
    model, monkeypatch, host, alone
):
    told = []

    def noted(*_, names, **__):
        told.extend(names)
        raise ValueError("enough")

    monkeypatch.setattr(service, "create_app", noted)
    with pytest.raises(UserError, match="enough"):
        serve(Predictor(model), port=0, host=host)
    assert ("*" in told) is not alone and (host.lower() in told) is alone


def test_names_in_a_challengers_file_command_no_terminal(model, caplog):
    class Sure(Predictor):
        def probabilities(self, maps):
            return np.eye(len(self.class_names))[[0] * len(maps)]

    loud = Sure(model)
    loud.class_names = ("\x1b]0;owned\x07", *loud.class_names[1:])
    with client_of(Predictor(model), shadow=loud) as client, caplog.at_level(logging.WARNING):
        client.post("/predict", content=as_json(*LOT), headers=JSON)
        until(lambda: count(client, "wafer_shadow_maps_total") == len(LOT))
    assert "owned" in caplog.text and "\x1b" not in caplog.text and "\x07" not in caplog.text


def test_it_listens_on_this_machine_alone(server):
    port = int(server.rpartition(":")[2])
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port)):
        pass


# ---------------------------------------------------------------------------------------------- what is counted


def test_requests_maps_abstentions_and_refusals_are_counted(model):
    with client_of(Predictor(model)) as client:
        client.post("/predict", content=as_json(*LOT), headers=JSON)
        client.post("/predict", content=as_json(wafer(0.4)), headers=JSON)
        client.post("/predict", content=b"?", headers=JSON)
        client.post("/predict", content=b"?", headers=NPY)
        assert count(client, 'wafer_requests_total{status="200"}') == 2
        assert count(client, 'wafer_requests_total{status="400"}') == 2
        assert count(client, 'wafer_bodies_rejected_total{reason="not JSON"}') == 1
        assert count(client, 'wafer_bodies_rejected_total{reason="not .npy"}') == 1
        assert count(client, 'wafer_maps_total{class="Random"}') == 2
        assert count(client, "wafer_maps_total") == 5
        assert count(client, "wafer_abstentions_total") == 1
        assert count(client, "wafer_seconds_count") == 4
        assert count(client, "process_resident_memory_bytes") > 2**20


def test_a_challenger_answers_in_the_shadow_and_its_disagreements_are_counted_and_logged(model, tmp_path, caplog):
    challenger = Predictor(write_model(tmp_path / "challenger.onnx", bias=(5, 3, -3)))
    with client_of(Predictor(model), shadow=challenger) as client, caplog.at_level(logging.WARNING):
        told = client.post("/predict", content=as_json(*LOT, wafer(0.6)), headers=JSON).json()
        assert [answer["class"] for answer in told["answers"]][2:] == ["Random", "Near-full", "Random"]
        until(lambda: count(client, "wafer_shadow_maps_total") == 5)
        until(lambda: count(client, "wafer_shadow_disagreements_total") == 2)
        client.post("/predict", content=as_json(wafer(0)), headers=JSON)
        until(lambda: count(client, "wafer_shadow_maps_total") == 6)
        assert count(client, "wafer_maps_total") == 6
    (line,) = [record.getMessage() for record in caplog.records if "challenger" in record.getMessage()]
    assert line == "challenger.onnx gives 2 of 5 maps another class: Random -> Near-full (2)"


def test_a_challenger_that_is_slow_or_fails_keeps_nobody_waiting(model):
    go = threading.Event()

    class Slow(Predictor):
        def probabilities(self, maps):
            assert go.wait(30)
            raise RuntimeError("no answer")

    with client_of(Predictor(model), shadow=Slow(model)) as client:
        for _ in range(WAITING + 2):
            assert client.post("/predict", content=as_json(*LOT), headers=JSON).status_code == 200
        assert count(client, "wafer_shadow_dropped_total") == 2 * len(LOT)
        go.set()
        until(lambda: count(client, "wafer_shadow_failures_total") == WAITING)
        assert client.post("/predict", content=as_json(*LOT), headers=JSON).status_code == 200
