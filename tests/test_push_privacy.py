"""Two hundred planted identities and paths, through preparing, training, scoring, reporting and pushing: a Hub receives none of them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.card_numbers import assert_numbers
from tests.conftest import REPOSITORY
from tests.hub_server import TOKEN, card_errors, hub
from tests.test_privacy import Planter, contents, found_in, needles, noise, places, save_png

IMAGES = 48
FIGURES = frozenset({b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tEXt"})
"""matplotlib says which version it is."""
FEW = ["--max_train_steps", "2", "--validation_steps", "2", "--checkpointing_steps", "1", "--train_batch_size", "4"]


def planted_table(folder, planter):
    """Images of 24 patients in folders, under names, with texts and a table that all say who they are of."""
    lines = [f"file,label,who,age,sex,{planter.text()}"]
    for number, path in places(folder, planter, ".png", IMAGES):
        if number % 2 == 0:
            who = planter.text()
        pixels = noise(number + 50) // 2 + np.uint8(60 * (number % 2))
        save_png(Image.fromarray(pixels), path, planter)
        lines.append(f"{path.relative_to(folder).as_posix()},{path.relative_to(folder).parts[0]},{who},{planter.text()},F,{planter.text()}")
    (folder / f"{planter.name()}.csv").write_text("\n".join(lines))
    return next(folder.glob("*.csv"))


@pytest.mark.slow
def test_a_hub_receives_no_planted_identity_and_no_path(tmp_path):
    planter = Planter()
    source = tmp_path / planter.name()
    table = planted_table(source, planter)
    work = tmp_path / planter.name() / planter.name()
    work.mkdir(parents=True)
    data, unet, vae, scores, report = (work / f"{planter.name()}_{kind}" for kind in ("data", "unet", "vae", "scores", "report"))
    (tmp_path / "salt").write_text("a salt that is the same in every run")
    asked = ["--source", "csv", "--data_dir", source, "--labels", table, "--patient_column", "who", "--resolution", "24"]
    asked += ["--split_fractions", "0.5", "0.25", "0.25", "--duplicates", "keep", "--salt_file", tmp_path / "salt", "--num_workers", "1"]
    with hub() as server:

        def run(recipe, *words):
            environment = os.environ | server.environment(tmp_path / "cache") | {"PYTHONPATH": str(REPOSITORY)}
            command = [sys.executable, str(REPOSITORY / "recipes" / recipe), *map(str, words)]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout + done.stderr

        said = run("prepare_data.py", *asked, "--output_dir", data, "--push_to_hub", "--hub_dataset_id", "user/data")
        said += run("finetune_vae.py", "--dataset_name", data, "--output_dir", vae, *FEW, "--push_to_hub", "--hub_model_id", "user/vae")
        said += run("finetune_unet.py", "--dataset_name", data, "--output_dir", unet, *FEW, "--vae", vae)
        said += run("classify.py", "--pipeline", unet, "--dataset_name", data, "--output_dir", scores, "--max_pairs", "2")
        judged = ["--pipeline", unet, "--dataset_name", data, "--scores", scores, "--output_dir", report]
        said += run("evaluate.py", *judged, "--num_samples", "64", "--num_inference_steps", "20")
        said += run("push.py", "--pipeline", unet, "--report", report, "--hub_model_id", "user/unet")
        planted = [*planter.texts, *planter.names]
        assert len(set(planted)) >= 200 and len(server.repositories) == 3
        wanted, looked = needles(planted), 0
        for name, repository in server.repositories.items():
            for path, content in repository.files.items():
                place = tmp_path / "received" / name / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
                assert not found_in(contents(place, FIGURES) + path.encode(), wanted), f"{name}/{path}"
                assert str(tmp_path).encode() not in content and TOKEN.encode() not in content, f"{name}/{path}"
                looked += 1
        assert looked >= 30 and "figures/generated.png" in server.repositories["models/user/unet"].files
        assert not found_in("\n".join(server.requests).encode(), wanted)
        assert not found_in(b"\n".join(server.received), wanted)
        assert TOKEN not in said
        card, metrics, audit, info = (
            server.repositories["models/user/unet"].files[name] for name in ("README.md", "metrics.json", "audit.json", "medsd.json")
        )
        assert json.loads(metrics) == json.loads((report / "metrics.json").read_text()) | {"subgroups": json.loads(metrics)["subgroups"]}
        assert_numbers(card.decode(), json.loads(metrics), json.loads(audit), json.loads(info)["data"]["class_names"])
        assert card_errors(card.decode(), "model") == []


@pytest.mark.slow
def test_the_needles_would_be_found(tmp_path):
    planter = Planter()
    planted_table(tmp_path / "in", planter)
    assert found_in(f"a head of {planter.texts[40]}".encode(), needles(planter.texts))
