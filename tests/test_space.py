"""The page as a Space: what is sent, and that it starts from there."""

import os
import subprocess
import sys

import pytest

from medsd.errors import InputError
from medsd.hub.space import PACKAGE, push_space
from tests.conftest import REPOSITORY
from tests.hub_server import TOKEN, Fault, card_errors, front_of
from tests.test_faults import client, server

__all__ = ["client", "server"]
APP = REPOSITORY / "recipes" / "app.py"

pytest.importorskip("gradio", reason="the page needs Gradio, which is in the extra `app`")


def test_a_space_holds_all_that_it_needs_and_starts(server, client, tmp_path):
    assert push_space(APP, "user/heads", "user/page") == f"{server.url}/spaces/user/page"
    space = server.repositories["spaces/user/page"]
    assert space.private and space.variables == {"MEDSD_PIPELINE": "user/heads"}
    front = front_of(space.files["README.md"])
    assert (
        front["app_file"] == "app.py"
        and front["models"] == ["user/heads"]
        and card_errors(space.files["README.md"].decode(), "space") == []
    )
    assert b"diffusers==" in space.files["requirements.txt"] and b"torchvision" not in space.files["requirements.txt"]
    for path, content in space.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = (
        "import sys, medsd, runpy; print(medsd.__file__); sys.argv = ['app.py', '--help']; runpy.run_path('app.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path)) and "--push_space" in done.stdout, done.stderr


def test_a_second_push_brings_it_up_to_date(server, client):
    push_space(APP, "user/heads", "user/page")
    server.repositories["spaces/user/page"].files["medsd/gone.py"] = b""
    push_space(APP, "user/others", "user/page")
    space = server.repositories["spaces/user/page"]
    assert "medsd/gone.py" not in space.files and space.variables == {"MEDSD_PIPELINE": "user/others"}


def test_what_else_lies_in_a_checkout_stays(server, client):
    scratch = PACKAGE / "scratch_of_this_test.py"
    try:
        scratch.write_text("PATIENTS = ['Doe']")
        push_space(APP, "user/heads", "user/page")
    finally:
        scratch.unlink()
    files = server.repositories["spaces/user/page"].files
    assert "medsd/hub/space.py" in files and "medsd/report/app.css" in files and "medsd/scratch_of_this_test.py" not in files


def test_a_page_with_a_token_is_refused(server, client, tmp_path):
    (tmp_path / "app.py").write_text(f'TOKEN = "{TOKEN}"')
    with pytest.raises(InputError, match=r"app\.py holds a token of the Hub"):
        push_space(tmp_path / "app.py", "user/heads", "user/page")
    assert not server.repositories


def test_a_space_without_its_pipeline_is_not_seen(server, client):
    server.faults.append(Fault("POST .*/variables", 403, 100))
    with pytest.raises(InputError, match="may not write there"):
        push_space(APP, "user/heads", "user/page")
    assert "app.py" not in server.repositories["spaces/user/page"].files


def test_a_pipeline_of_this_machine_is_refused(server, client, tmp_path):
    with pytest.raises(InputError, match=r"push it with recipes/push\.py"):
        push_space(APP, str(tmp_path), "user/page")
    assert not server.repositories
