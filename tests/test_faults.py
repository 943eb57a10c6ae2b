"""Thirty and more ways in which a push can go wrong: it succeeds after other tries, or ends in one line with nothing to be seen of it."""

import logging
import traceback

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from medsd.errors import InputError
from medsd.hub import upload as uploading
from medsd.hub.privacy import stamps
from medsd.hub.upload import Target, redacted, stated_licence, upload
from tests.hub_server import TOKEN, Fault, hub

CARD = b"---\ntags:\n- medical\n---\n# heads\n"
PARCEL = {
    "model_index.json": b"{}",
    "unet/model.safetensors": b"weights" * 5000,
    "text_encoder/model.safetensors": b"words" * 5000,
    "unet/config.json": b"{}",
    "README.md": CARD,
}
COMMIT, PUT, BATCH, CREATE, INFO = (
    r"POST .*/commit/",
    "PUT /lfs/",
    "POST .*/objects/batch",
    "POST /api/repos/create",
    "GET /api/models/user/x$",
)
PREUPLOAD, CARD_CHECK, TREE = r"POST .*/preupload/", "POST /api/validate-yaml", r"GET .*/tree/"
FOR_EVER = 1000
PASSING = {
    "busy while it is made": [Fault(CREATE, 429, headers={"Retry-After": "1"})],
    "busy three times while it is committed": [Fault(COMMIT, 429, times=3)],
    "an error while it is committed": [Fault(COMMIT, 500)],
    "a bad gateway before the upload": [Fault(PREUPLOAD, 502, times=2)],
    "no service for large files": [Fault(BATCH, 503, times=2)],
    "a timeout of a large file": [Fault(PUT, 504)],
    "an error on looking at it": [Fault(INFO, 500)],
    "a request that timed out": [Fault(COMMIT, 408)],
    "the way breaks while it is made": [Fault(CREATE, "drop")],
    "the way breaks while it is committed": [Fault(COMMIT, "drop", times=2)],
    "the way breaks within a large file": [Fault(PUT, "drop")],
    "the way breaks on listing": [Fault(TREE, "drop")],
    "the way breaks on checking the card": [Fault(CARD_CHECK, "drop")],
    "made, and nobody says so": [Fault(CREATE, "lose")],
    "committed, and nobody says so": [Fault(COMMIT, "lose")],
    "a large file is there, and nobody says so": [Fault(PUT, "lose")],
    "somebody else committed": [Fault(COMMIT, 412)],
    "two wrote at once": [Fault(COMMIT, 409)],
    "slow to commit": [Fault(COMMIT, "hang", seconds=1.0)],
    "slow with large files": [Fault(PUT, "hang", times=2, seconds=0.5)],
    "one thing after the other": [Fault(CREATE, 503), Fault(PUT, "drop"), Fault(COMMIT, 412), Fault(COMMIT, "drop")],
}
LASTING = {
    "errors for ever": ([Fault(COMMIT, 500, FOR_EVER)], "the Hub answered 500 6 times; the same push goes on"),
    "busy for ever": ([Fault(PREUPLOAD, 429, FOR_EVER)], "the Hub answered 429 6 times"),
    "never a whole file": ([Fault(PUT, "drop", FOR_EVER)], "the way to the Hub broke 6 times .*the same push goes on"),
    "never a commit": ([Fault(COMMIT, "drop", FOR_EVER)], "the way to the Hub broke 6 times .*the same push goes on"),
    "the second file is never taken": ([Fault(PUT, 500, FOR_EVER, after=1)], "the Hub answered 500 6 times"),
    "an expired token": ([Fault(CREATE, 401, FOR_EVER)], "does not know this token, or it has expired; `hf auth login`"),
    "a token that expires on the way": ([Fault(COMMIT, 401, FOR_EVER)], "does not know this token"),
    "a token that may only read": ([Fault(COMMIT, 403, FOR_EVER)], "this token may not write there"),
    "an organisation of others": ([Fault(CREATE, 403, FOR_EVER)], "this token may not write there"),
    "no such user": ([Fault(CREATE, 404, FOR_EVER)], "no such user"),
    "a full disk": ([Fault(COMMIT, 507, FOR_EVER)], "no room left"),
    "a full disk for large files": ([Fault(PUT, 507, FOR_EVER)], "no room left"),
    "a file that is too large": ([Fault(PUT, 413, FOR_EVER)], "no file as large as that"),
    "a refusal without a reason": ([Fault(COMMIT, 400, FOR_EVER)], "the Hub took nothing"),
}


@pytest.fixture(scope="module")
def server():
    with hub() as running:
        yield running


@pytest.fixture(autouse=True)
def client(server, monkeypatch, caplog):
    """The real client, which talks to this server and does not wait between tries."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for module in (uploading, _http):
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    server.repositories.clear()
    server.stored.clear()
    server.requests.clear()
    server.faults.clear()


def send(parcel=PARCEL, **options):
    return upload(parcel, Target("user/x", **options), lambda path: path in PARCEL or path == "old.json", "Upload")


def refused(message, **options):
    """Its line, whose traceback must not hold the token."""
    with pytest.raises(InputError, match=message) as error:
        send(**options)
    shown = "".join(traceback.format_exception(error.value))
    assert TOKEN not in shown and "X-Amz-Signature" not in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def visible(server):
    found = server.repositories.get("models/user/x")
    return {} if found is None else {path: content for path, content in found.files.items() if path != ".gitattributes"}


@pytest.mark.parametrize("name", PASSING)
def test_it_succeeds_after_other_tries(server, name, caplog):
    server.faults[:] = PASSING[name]
    assert send() == f"{server.url}/user/x"
    assert not any(fault.times for fault in server.faults), "the fault did not come about"
    assert visible(server) == PARCEL and server.repositories["models/user/x"].private
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("name", LASTING)
def test_it_ends_in_one_line_and_nothing_is_seen_of_it(server, name, caplog, capsys):
    faults, message = LASTING[name]
    server.faults[:] = [Fault(fault.pattern, fault.what, fault.times, fault.after) for fault in faults]
    assert refused(message).startswith("--hub_model_id user/x")
    assert visible(server) == {}
    assert TOKEN not in caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize("name", [name for name, (faults, _) in LASTING.items() if faults[0].pattern != CREATE])
def test_what_was_there_before_stays_whole(server, name):
    """(The client does not mind that it may not make what is there.)"""
    send()
    server.faults[:] = [Fault(fault.pattern, fault.what, fault.times) for fault in LASTING[name][0]]
    changed = PARCEL | {"unet/model.safetensors": b"others" * 5000, "unet/config.json": b'{"a": 1}'}
    with pytest.raises(InputError):
        send(changed)
    assert visible(server) == PARCEL


def test_a_push_that_was_cut_off_goes_on_where_it_stopped(server):
    server.faults[:] = [Fault(COMMIT, 500, FOR_EVER)]
    refused("the Hub answered 500")
    sent = [request for request in server.requests if request.startswith("PUT")]
    assert len(sent) == 2
    server.faults.clear()
    server.requests.clear()
    send()
    assert not [request for request in server.requests if request.startswith("PUT")] and visible(server) == PARCEL


def test_what_says_that_it_is_complete_comes_last(server):
    send()
    assert server.repositories["models/user/x"].commits[-1][-2:] == ["model_index.json", "README.md"]


def test_files_of_an_earlier_push_go_and_those_of_others_stay(server):
    send(PARCEL | {"old.json": b"{}"})
    server.repositories["models/user/x"].files["LICENSE"] = b"mine"
    send()
    assert visible(server) == PARCEL | {"LICENSE": b"mine"}


def test_a_branch_is_made_for_it(server):
    send()
    send(PARCEL | {"unet/config.json": b'{"step": 1}'}, revision="checkpoint-1")
    branches = server.repositories["models/user/x"].branches
    assert branches["checkpoint-1"]["unet/config.json"] == b'{"step": 1}' and branches["main"]["unet/config.json"] == b"{}"


def test_a_public_repository_is_not_written_to_where_a_private_one_is_wanted(server):
    send(private=False)
    assert "is public" in refused("Nothing was sent")


@pytest.mark.parametrize("name", ["no/such/name", "user/x y"])
def test_no_repository_name(name):
    with pytest.raises(InputError, match="is no repository name"):
        upload(PARCEL, Target(name), lambda path: False, "Upload")


def test_nobody_is_there(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("the way to the Hub broke 6 times .*the same push goes on")


@pytest.mark.parametrize("change", ["other weights", "gone"])
def test_a_file_that_changed_since_it_was_looked_through(server, tmp_path, change):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    parcel = PARCEL | {"unet/model.safetensors": file}
    before = stamps(parcel)
    file.unlink() if change == "gone" else file.write_bytes(b"others!")
    with pytest.raises(InputError, match=r"unet/model\.safetensors has changed since it was looked through"):
        upload(parcel, Target("user/x"), lambda path: False, "Upload", before)
    assert visible(server) == {}


@pytest.mark.parametrize("error", [ConnectionError("reset"), TimeoutError("too slow"), RuntimeError("xet: broken")])
def test_what_other_ways_of_sending_raise_is_tried_again(server, monkeypatch, error):
    """The Hub's own storage is reached by a client that raises errors of its own."""
    tries, commit = [], uploading._commit

    def broken(*arguments):
        tries.append(1)
        if len(tries) < 3:
            raise error
        return commit(*arguments)

    monkeypatch.setattr(uploading, "_commit", broken)
    send()
    assert len(tries) == 3 and visible(server) == PARCEL


def test_a_licence_that_was_stated_stays(server):
    assert stated_licence(Target("user/x")) is None
    send(PARCEL | {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    server.faults[:] = [Fault(INFO, 503, times=2), Fault(INFO, "drop")]
    assert stated_licence(Target("user/x")) == "cc-by-nc-4.0" and not any(fault.times for fault in server.faults)
    server.faults[:] = [Fault(INFO, 503, FOR_EVER)]
    with pytest.raises(InputError, match="the Hub answered 503 6 times"):
        stated_licence(Target("user/x"))


def test_a_branch_that_fails_says_nothing_of_itself(server):
    send()
    server.faults[:] = [Fault(r"POST .*/commit/checkpoint", 500, FOR_EVER)]
    refused("answered 500", revision="checkpoint-1")
    assert set(server.repositories["models/user/x"].branches["checkpoint-1"]) == {".gitattributes"}


def test_a_card_that_the_hub_does_not_take(server):
    refused("the Hub took nothing", parcel=PARCEL | {"README.md": b"---\ntags: 3\n---\n"})
    assert visible(server) == {}


def test_tokens_and_signatures_are_not_quoted():
    text = redacted(f"PUT https://bucket/oid?X-Amz-Signature=abc failed for {TOKEN}")
    assert text == "PUT https://bucket/oid failed for hf_..."


def test_there_are_thirty_scripts():
    assert len(PASSING) + len(LASTING) >= 30
