"""Pushing a prepared folder to a Hub, and what must never get there."""

import io
import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from medsd.data.dataset import load_info
from medsd.errors import InputError
from medsd.hub.dataset import check_privacy, dataset_card, files_to_send, parcel_of, push_dataset
from medsd.hub.privacy import Secrets, scan
from tests.hub_server import TOKEN, hub, read_card

REPO = "user/heads"
PUSH_AND_LOAD = """
import json, sys
from pathlib import Path

import datasets

from medsd import load_dataset
from medsd.data.dataset import available_splits
from medsd.errors import InputError
from medsd.hub.dataset import push_dataset

def values(row):
    return row["key"], row["label"], row["prompt"], row["patient_id"], row["image"].tobytes(), str(row["image"].dtype)


folder, repository = Path(sys.argv[1]), "user/heads"
datasets.disable_progress_bars()
url = push_dataset(folder, repository)
report = {"url": url, "again": push_dataset(folder, repository), "splits": available_splits(repository)}
for split in report["splits"]:
    local = [values(row) for row in load_dataset(folder, split)]
    report.setdefault("rows", []).append(len(local))
    report.setdefault("same", []).append([values(row) for row in load_dataset(repository, split)] == local)
    report.setdefault("streamed", []).append([values(row) for row in load_dataset(repository, split, streaming=True)] == local)
report["plain"] = {split: part.num_rows for split, part in datasets.load_dataset(repository).items()}
report["public"] = push_dataset(folder, "user/open", private=False, confirm_public_data=True)
try:
    push_dataset(folder, "user/open")
except InputError as error:
    report["refused"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture
def data(phantom_data, tmp_path):
    """A copy of the prepared phantom that a test may spoil."""
    for name in ("data", "data.private"):
        shutil.copytree(phantom_data.with_name(name), tmp_path / name)
    return tmp_path / "data"


def spoil(data, column, value):
    """Put `value` into the first row of a column of the first shard."""
    shard = sorted((data / "data").iterdir())[0]
    table = pyarrow.parquet.read_table(shard)
    place = table.schema.get_field_index(column)
    values = pyarrow.array([value, *table[column].to_pylist()[1:]], table.schema.field(place).type)
    pyarrow.parquet.write_table(table.set_column(place, table.schema.field(place), values), shard)


def secret_of(data, column):
    return pyarrow.parquet.read_table(data.with_name("data.private") / "keys.parquet")[column][0].as_py()


def test_push_and_load_back(phantom_data, tmp_path):
    with hub() as server:
        environment = os.environ | server.environment(tmp_path / "cache")
        command = [sys.executable, "-c", PUSH_AND_LOAD, str(phantom_data)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["url"] == found["again"] == f"{server.url}/datasets/user/heads"
        assert found["splits"] == ["train", "validation", "test"] and all(found["same"]) and all(found["streamed"])
        assert found["plain"] == dict(zip(found["splits"], found["rows"], strict=True))
        assert "is public" in found["refused"] and not server.repositories["datasets/user/open"].private
        repository = server.repositories["datasets/user/heads"]
        sent = files_to_send(phantom_data)
        assert repository.private and set(repository.files) == {*sent, "README.md", ".gitattributes"}
        assert repository.commits[0] == [*sent, "README.md"]
        assert all(repository.files[path] == (phantom_data / path).read_bytes() for path in sent)
        front, _ = read_card(server, "datasets/user/heads")
        assert front["configs"][0]["data_files"][0] == {"split": "train", "path": "data/train-*.parquet"}


def test_the_card_says_what_it_is(data):
    card = dataset_card(data, "user/heads")
    summary = json.loads((data / "summary.json").read_text())
    assert "Not for clinical use" in card and "HU (CT)" in card and f"| images |  | {summary['images']['train']} |" in card
    assert "| epidural | a head CT with &lt;epidural> |" in card and "- `patient_id`: salted hash" in card


@pytest.mark.parametrize(
    ("column", "kind"), [("patient", "patient's id"), ("sop_uid", "SOP instance UID"), ("file", "name of a file or folder")]
)
def test_a_planted_identity_is_refused(data, column, kind):
    check_privacy(data, parcel_of(data, REPO))
    secret = secret_of(data, column)
    spoil(data, "prompt", f"a head CT of {secret}")
    with pytest.raises(InputError, match=f"column prompt in data/.*{kind}") as refused:
        push_dataset(data, "user/heads")
    assert secret not in str(refused.value)


def test_identities_are_found_in_hash_columns_names_metadata_and_texts(data):
    secret = secret_of(data, "patient")
    spoil(data, "series_id", secret)
    with pytest.raises(InputError, match="column series_id"):
        check_privacy(data, parcel_of(data, REPO))
    spoil(data, "series_id", "0" * 16)
    check_privacy(data, parcel_of(data, REPO))
    shard = sorted((data / "data").iterdir())[0]
    table = pyarrow.parquet.read_table(shard)
    pyarrow.parquet.write_table(table.append_column(f"of {secret}", table["key"]), shard)
    with pytest.raises(InputError, match="a column's name"):
        check_privacy(data, parcel_of(data, REPO))
    pyarrow.parquet.write_table(table.replace_schema_metadata({"note": json.dumps({"by": [secret]})}), shard)
    with pytest.raises(InputError, match="the metadata"):
        check_privacy(data, parcel_of(data, REPO))
    pyarrow.parquet.write_table(table, shard)
    (data / "quarantine.jsonl").write_text(json.dumps({"key": "0" * 16, "reason": f"cannot read {secret}"}) + "\n")
    with pytest.raises(InputError, match="a text in quarantine.jsonl"):
        check_privacy(data, parcel_of(data, REPO))


def test_what_counts_as_an_identity(tmp_path):
    columns = {
        "file": ["a/0001.png", "b/0001.png", "a/Doe-7.nii.gz", "Doe_Jane/b/glioma.png"],
        "patient": ["Ab12", "cd34", "Ab12", "cafe0123deadbeef"],
        "sop_uid": [None, None, None, "1.2"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "keys.parquet")
    secrets = Secrets.read(tmp_path / "keys.parquet", ["glioma"])
    assert secrets.kind_in("scan of AB12, left") == "patient's id" and secrets.kind_in("xab12y") is None
    assert secrets.kind_in("cafe0123deadbeef") == "patient's id" and secrets.kind_in("see doe-7!") == "name of a file or folder"
    assert secrets.kind_in("of doe_jane") == "name of a file or folder"
    kinds = {"Nr 7471123": "patient's id"}
    pyarrow.parquet.write_table(pyarrow.table({"file": ["x"], "patient": ["7471123"], "sop_uid": [None]}), tmp_path / "numbers.parquet")
    numbers = Secrets.read(tmp_path / "numbers.parquet", [])
    assert {text: numbers.kind_in(text) for text in kinds} == kinds and numbers.kind_in("7471123 images", prose=True) is None
    for harmless in ("0001", "glioma", "1.2", "00ab1200cd340000", "train-00001-of-00002.parquet"):
        assert secrets.kind_in(harmless) is None


def test_numbers_in_headers_and_records_are_looked_at(tmp_path):
    image = io.BytesIO()
    noted = PngInfo()
    noted.add_text("PatientID", "471123")
    Image.new("L", (4, 4)).save(image, "PNG", pnginfo=noted)
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"by": "471123"})
    secrets = Secrets({6: {"471123": "patient's id"}, 9: {"471123456": "patient's id"}})
    spoilt = {"figures/roc.png": image.getvalue(), "unet/model.safetensors": tmp_path / "model.safetensors"}
    spoilt |= {"metrics.json": b'{"n": 471123456}', "config.yaml": b"finetune_unet:\n  seed: 471123456\n"}
    for path, content in spoilt.items():
        with pytest.raises(InputError, match="holds a patient's id"):
            scan({path: content}, secrets, "take it out")
    scan({"metrics.json": b'{"n": 471123}', "README.md": b"471123 images"}, secrets, "")
    with pytest.raises(InputError, match="holds a token"):
        scan({"README.md": b"key_hf_ABCDEFGHIJKLMNOPQRSTUV"}, secrets, "take it out")


def test_a_shard_that_changes_under_the_scan_is_not_sent(data, monkeypatch, tmp_path):
    def rewritten(folder, parcel):
        check_privacy(folder, parcel)
        shard = sorted((folder / "data").iterdir())[0]
        shard.write_bytes(shard.read_bytes() + b" ")

    monkeypatch.setattr("medsd.hub.dataset.check_privacy", rewritten)
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with pytest.raises(InputError, match="has changed since it was looked through"):
            push_dataset(data, "user/heads")
        assert set(server.repositories["datasets/user/heads"].files) == {".gitattributes"}


def test_a_public_data_set_is_confirmed_by_somebody(data):
    with pytest.raises(InputError, match="a public data set needs --confirm_public_data"):
        push_dataset(data, "user/heads", private=False)


def test_other_files_do_not_travel(data):
    (data / ".DS_Store").write_text("a Finder's note")
    assert not {".DS_Store", "contact_sheet.png"} & set(files_to_send(data))
    (data / "notes.txt").write_text("Mrs Doe")
    with pytest.raises(InputError, match=r"holds notes\.txt, which medsd did not write"):
        push_dataset(data, "user/heads")
    (data / "notes.txt").rename(data / "data" / "train-00007-of-00008.parquet")
    with pytest.raises(InputError, match="train-00007-of-00008"):
        push_dataset(data, "user/heads")


def test_nothing_is_pushed_unseen(data):
    shutil.rmtree(data.with_name("data.private"))
    with pytest.raises(InputError, match=r"keys\.parquet is not there"):
        push_dataset(data, "user/heads")
    (data / "medsd.json").unlink()
    with pytest.raises(InputError, match=r"no medsd\.json"):
        push_dataset(data, "user/heads")


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(data):
    for repository, message in {"user/heads": "HF_HUB_OFFLINE forbids it", "no/such/name": "is no repository name"}.items():
        with pytest.raises(InputError, match=message):
            push_dataset(data, repository)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(hub_id, *arguments, **options):
        asked.append(hub_id)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    for expected in (["runs/nothing"], ["runs/nothing"]):  # Before there is a folder `runs`, it can be a user's name.
        with pytest.raises(InputError, match="no prepared data there"):
            load_info("runs/nothing")
        assert asked == expected
        (tmp_path / "runs").mkdir(exist_ok=True)
