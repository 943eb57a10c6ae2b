"""What a user of generate.py relies on: values that come back, runs that go on, images that the model's classifier confirms."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from medsd import MedSDPipeline, read_image
from medsd.config import GenerateConfig
from medsd.data.dataset import load_info
from medsd.data.export import SYNTHETIC
from medsd.errors import InputError
from medsd.inference.animation import FRAMES, Film, chosen_steps, write_animation
from medsd.inference.gallery import Gallery, folder_names
from medsd.inference.generating import Sampling, batches, draw_batch, image_seed
from medsd.inference.pictures import grid
from recipes import generate
from tests.conftest import REPOSITORY
from tests.test_pipeline import pipeline
from tests.test_processes import ENVIRONMENT, LAUNCHERS

QUICK = {"num_images": 3, "batch_size": 2, "num_inference_steps": 3}
JOINT = {
    "kind": "stack",
    "parts": [
        {"channels": 1, "map": {"kind": "recorded", "rule": "percentiles", "ranges": [[0.0, 900.0]]}},
        {"channels": 1, "map": {"kind": "labels", "values": [0.0, 1.0, 4.0]}},
    ],
}


@pytest.fixture(scope="module")
def info(phantom_data):
    return load_info(phantom_data)


@pytest.fixture(scope="module")
def folder(info, tmp_path_factory):
    """A pipeline with random weights, of one CT window."""
    path = tmp_path_factory.mktemp("pipelines") / "ct"
    pipeline(info).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def joint(info, tmp_path_factory):
    """One of images in grey values together with their masks."""
    path = tmp_path_factory.mktemp("pipelines") / "joint"
    pipeline(replace(info, intensity=JOINT, image_channels=2, unit="grey value")).save_pretrained(path)
    return path


def made(folder, output_dir, **flags):
    generate.main(GenerateConfig(pipeline=str(folder), output_dir=str(output_dir), **(QUICK | flags)))
    return output_dir


def manifest(images):
    return [json.loads(line) for line in (images / "manifest.jsonl").read_text().splitlines()]


def content(images):
    return {str(path.relative_to(images)): path.read_bytes() for path in sorted(images.rglob("*")) if path.is_file()}


def source(pipe, class_name, seed):
    """The image of a seed as one call of the pipeline draws it, `(C, H, W)` in the source's unit."""
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "source"}
    return pipe(class_name=class_name, generator=torch.Generator().manual_seed(seed), **options).images[0]


@pytest.fixture(scope="module")
def pipe(folder):
    loaded = MedSDPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize(("flags", "step"), [({"format": "dicom"}, 0.002), ({"bits": 16}, 130 / 65535), ({"format": "nifti"}, 0.0)])
def test_hounsfield_units_come_back(folder, pipe, tmp_path, flags, step):
    images = made(folder, tmp_path / "images", class_name=("epidural",), seed=5, **flags)
    lines = manifest(images)
    assert [line["seed"] for line in lines] == [5, 6, 7] and {line["model"] for line in lines} == {pipe.fingerprint()}
    for line in lines:
        values = read_image(images / line["file"])
        if "bits" in line:
            values = line["low"] + values / 65535 * (line["high"] - line["low"])
        np.testing.assert_allclose(values, source(pipe, "epidural", line["seed"]), rtol=0, atol=step / 2 + 2e-3)
        assert line["unit"] == "HU" and line["accepted"] and line["probability"] is None and line["tries"] == 1


def test_an_image_and_its_mask_come_back_as_two_channels(joint, tmp_path):
    images = made(joint, tmp_path / "images", class_name=("normal",), format="nifti")
    for line in manifest(images):
        grey, mask = read_image(images / line["file"])
        assert grey.min() >= 0 and grey.max() <= 900 and len(np.unique(grey)) > 100 and set(np.unique(mask)) <= {0, 1, 4}
        assert (line["channels"], line["label_channels"]) == (2, 1)
    assert len(np.unique(mask)) > 1
    view = Image.open(made(joint, tmp_path / "png", class_name=("normal",)) / "normal" / "00000.png")
    assert view.size == (64, 32)


def test_every_file_says_that_it_is_synthetic(folder, tmp_path):
    one = {"class_name": ("epidural",), "num_images": 1}
    png = made(folder, tmp_path / "png", gif=True, **one)
    for file in ("overview.png", "epidural/00000.png"):
        assert Image.open(png / file).text["Description"] == SYNTHETIC
    assert Image.open(png / "epidural" / "00000.gif").info["comment"].decode().startswith(SYNTHETIC)
    dicom = made(folder, tmp_path / "dicom", format="dicom", gif=True, gif_format="webp", **one)
    assert pydicom.dcmread(dicom / "epidural" / "00000.dcm").ConversionType == "SYN"
    assert Image.open(dicom / "epidural" / "00000.webp").getexif()[0x010E].startswith(SYNTHETIC)
    nifti = made(folder, tmp_path / "nifti", format="nifti", **one)
    assert bytes(nibabel.load(nifti / "epidural" / "00000.nii.gz").header["descrip"]).startswith(b"synthetic, shows nobody")
    assert {path.name for path in tmp_path.iterdir()} == {"png", "dicom", "nifti"}


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_ends_with_the_image(folder, tmp_path, kind):
    images = made(folder, tmp_path / "images", class_name=("normal",), num_inference_steps=5, gif=True, gif_samples=2, gif_format=kind)
    assert [line.get("animation") for line in manifest(images)] == [f"normal/00000.{kind}", f"normal/00001.{kind}", None]
    with Image.open(images / "normal" / f"00001.{kind}") as film:
        assert film.n_frames == 5 and film.size == (256, 256)
        film.seek(0)
        first = np.asarray(film.convert("L")).astype(int)
        film.seek(4)
        last = np.asarray(film.convert("L")).astype(int)
    image = np.asarray(Image.open(images / "normal" / "00001.png")).astype(int).repeat(8, 0).repeat(8, 1)
    assert np.abs(last - image).max() <= 1 < np.abs(first - image).mean()


def test_a_long_way_is_shown_in_few_frames(pipe):
    film = Film([1])
    options = {"num_inference_steps": 40, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    latents = pipe(class_name="normal", num_images_per_prompt=2, callback_on_step_end=film, **options).images
    assert film.frames(pipe)[1].shape == (FRAMES, 1, 32, 32) and torch.equal(film.latents[-1], latents[1:])
    assert chosen_steps(3) == {0, 1, 2} and {0, 99} < chosen_steps(100)


def test_an_animation_of_one_step_is_a_picture(tmp_path):
    write_animation(tmp_path / "a.gif", torch.zeros(1, 3, 32, 32), "synthetic")
    assert Image.open(tmp_path / "a.gif").n_frames == 1


def test_a_callback_sees_and_steers_what_is_denoised(pipe):
    seen = []

    def still(caller, step, timestep, tensors):
        seen.append((caller is pipe, step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    images = pipe(class_name="normal", num_inference_steps=3, output_type="latent", callback_on_step_end=still).images
    assert seen == [(True, step, int(timestep)) for step, timestep in enumerate(pipe.scheduler.timesteps)]
    assert not images.any()


def test_seeds_of_attempts_never_meet_and_are_told_apart_by_torch():
    seeds = {image_seed(7, index, attempt) for index in range(500) for attempt in range(128)}
    assert len(seeds) == 500 * 128 and max(seeds) < 2**32 and image_seed(7, 3) == 10
    first, again = (torch.randn(9, generator=torch.Generator().manual_seed(image_seed(0, 0, attempt))) for attempt in (0, 1))
    assert not torch.equal(first, again)


def test_batches_are_fixed():
    found = batches(["a", "b"], 5, 2)
    assert [(batch.class_name, list(batch.indices)) for batch in found] == [(name, part) for name in "ab" for part in ([0, 1], [2, 3], [4])]


def test_what_the_classifier_does_not_confirm_is_drawn_again(pipe):
    plain = Sampling(num_inference_steps=3, min_probability=1e-30)
    first = draw_batch(pipe, "epidural", range(6), plain)
    assert first.tries == [1] * 6 and all(first.accepted)
    wanted = float(np.median(first.probabilities))
    drawn = draw_batch(pipe, "epidural", range(6), replace(plain, min_probability=wanted, max_tries=3), filmed=6)
    assert {place for place, tries in enumerate(drawn.tries) if tries == 1} == {
        place for place, probability in enumerate(first.probabilities) if probability >= wanted
    }
    assert max(drawn.tries) > 1
    for place, seed in enumerate(drawn.seeds):
        found, before = drawn.probabilities[place], first.probabilities[place]
        assert found >= before and drawn.accepted[place] == (found >= wanted)
        assert drawn.accepted[place] or drawn.tries[place] == 3
        assert seed in {image_seed(0, place, attempt) for attempt in range(3)} and (seed == place) == (found == before)
        image = pipe.data.intensity_map.from_unit(drawn.images[place]).numpy()
        np.testing.assert_allclose(image, source(pipe, "epidural", seed), atol=2e-3)
        torch.testing.assert_close(drawn.frames[place][-1], drawn.images[place], atol=1e-4, rtol=0)


def test_probabilities_are_those_of_classify(joint):
    """Also where the intensity map is recorded image by image: then an image is read in the range that it was drawn for."""
    pipe = MedSDPipeline.from_pretrained(joint)
    pipe.set_progress_bar_config(disable=True)
    drawn = draw_batch(pipe, "normal", range(2), Sampling(num_inference_steps=3, min_probability=1e-30))
    images = pipe.data.intensity_map.from_unit(drawn.images).numpy()
    ranges = np.float32([[[0, 900], [0, 4]]] * 2)
    found = pipe.classify(list(images), max_pairs=16, ranges=ranges).probabilities[:, 0]
    np.testing.assert_array_equal(found, drawn.probabilities)


def test_the_manifest_tells_what_was_not_confirmed(folder, tmp_path, capsys):
    images = made(folder, tmp_path / "images", class_name=("normal", "epidural"), min_probability=0.999999, max_tries=2, num_images=2)
    lines = manifest(images)
    below = [line for line in lines if not line["accepted"]]
    assert below and all(line["probability"] < 0.999999 and line["tries"] == 2 for line in below)
    assert all(line["probability"] >= 0.999999 for line in lines if line["accepted"])
    assert f"{len(below)} of them stayed below" in capsys.readouterr().out


def test_names_of_folders_differ_whatever_the_classes_are():
    names = ["a/b", "a-b", "A-b", "..", "", "manifest.jsonl", "x" * 300, "脑"]
    folders = folder_names(names)
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    assert folders["a/b"] == "a-b" and folders["a-b"] == "a-b-2" and folders[".."] == "class" and folders["脑"] == "脑"
    assert not any("/" in folder or len(folder.encode()) > 250 for folder in folders.values())
    assert folder_names([]) == {None: "unconditional"}


def test_classes_whose_folders_collide_are_kept_apart(info, tmp_path):
    names = ["a/b", "a-b"]
    pipeline(replace(info, class_names=names, class_tokens=["<x>", "<y>"], prompts=["a <x>", "a <y>"])).save_pretrained(tmp_path / "unet")
    images = made(tmp_path / "unet", tmp_path / "images", num_images=1)
    assert [(line["class"], line["file"]) for line in manifest(images)] == [("a/b", "a-b/00000.png"), ("a-b", "a-b-2/00000.png")]
    alone = made(tmp_path / "unet", tmp_path / "alone", num_images=1, class_name=("a-b", "a-b"))
    assert [line["file"] for line in manifest(alone)] == ["a-b-2/00000.png"]


def test_each_row_of_a_sheet_stands_beside_its_name():
    images = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1).expand(2, 3, 1, 64, 64)
    sheet = np.asarray(grid(images, ["a", "a longer name"]))
    margin = sheet.shape[1] - 3 * 128
    assert margin > 0 and np.array_equal(sheet[:, margin:], np.asarray(grid(images)))
    short, long = (np.flatnonzero(name.any(0)) for name in np.split(sheet[:, :margin], 2))
    assert 0 < short.max() < long.max() < margin - 1


def test_a_pipeline_without_classes(info, tmp_path):
    pipeline(info.without_classes()).save_pretrained(tmp_path / "unet")
    images = made(tmp_path / "unet", tmp_path / "images", format="dicom", num_images=11)
    assert [line["file"] for line in manifest(images)] == [f"unconditional/{index:05d}.dcm" for index in range(11)]
    assert Image.open(images / "overview.png").size == (generate.OVERVIEW_COLUMNS * 128, 128)
    with pytest.raises(InputError, match="two or more classes"):
        made(tmp_path / "unet", tmp_path / "other", min_probability=0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bits": 16, "format": "dicom"}, "--bits 16 is for PNG"),
        ({"gif_samples": 2}, "add --gif"),
        ({"gif_format": "webp"}, "add --gif"),
        ({"max_tries": 3}, "add --min_probability"),
        ({"min_probability": 0.5, "max_tries": 129}, "at most 128"),
        ({"min_probability": 1.0}, "between 0 and 1"),
        ({"seed": 2**32}, "repeat"),
        ({"class_name": ("glioma",)}, "unknown"),
        ({"scheduler": "Nothing"}, "no scheduler of diffusers that fits"),
        ({"num_inference_steps": 1001}, "schedule has 1000"),
    ],
)
def test_refusals(folder, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        made(folder, tmp_path / "images", **flags)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [{"format": "dicom"}, {"bits": 16}])
def test_several_channels_need_nifti(joint, tmp_path, flags):
    with pytest.raises(InputError, match="2: take --format nifti"):
        made(joint, tmp_path / "images", **flags)


def test_findings_do_not_exclude_each_other(info, tmp_path):
    pipeline(replace(info, multi_label=True)).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="findings that can hold together"):
        made(tmp_path / "unet", tmp_path / "images", min_probability=0.5)


LONG = ["--num_images", "6", "--batch_size", "2", "--num_inference_steps", "4", "--gif"]


def command(folder, output_dir):
    return ["recipes/generate.py", "--pipeline", str(folder), "--output_dir", str(output_dir), *LONG]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run, of one thread as all of ENVIRONMENT: the number of threads changes how sums are rounded."""
    images = tmp_path_factory.mktemp("whole") / "images"
    subprocess.run([sys.executable, *command(folder, images)], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, check=True)
    return images


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_alike(folder, whole, tmp_path):
    words = [sys.executable, *command(folder, tmp_path / "images")]
    process = subprocess.Popen(words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / ".images.generating" / "batches"
    deadline = time.monotonic() + 120
    while len(list(records.glob("0*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "images").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".images.generating" / "files" / "normal").glob("*.png")}
    answer = subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "images are drawn already: going on" in answer.stdout, answer.stderr
    assert len(kept) == 6 and kept == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images" / "normal").glob("*.png")}
    assert content(tmp_path / "images") == content(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


@pytest.mark.slow
def test_two_processes_draw_the_same_bytes(folder, whole, tmp_path):
    """On two cores, which they share: a thread each, as the one process had."""

    def confine():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    words = [*LAUNCHERS[2], *command(folder, tmp_path / "images")]
    answer = subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False, preexec_fn=confine)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "18/18" in answer.stderr  # The main process's half of 36 images.
    assert content(tmp_path / "images") == content(whole)


@pytest.fixture
def interrupted(folder, tmp_path, monkeypatch):
    """Flags of a run that Ctrl-C ended after its second batch."""
    flags = {"class_name": ("normal", "epidural"), "gif": True}
    add = Gallery.add

    def stop(self, number, lines, views):
        add(self, number, lines, views)
        if number == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Gallery, "add", stop)
        made(folder, tmp_path / "images", **flags)
    return flags


def test_an_interrupted_run_goes_on(capsys, folder, interrupted, tmp_path, monkeypatch):
    assert "goes on from what is drawn" in capsys.readouterr().out
    numbers, add = [], Gallery.add
    monkeypatch.setattr(Gallery, "add", lambda self, number, lines, views: numbers.append(number) or add(self, number, lines, views))
    images = made(folder, tmp_path / "images", **interrupted)
    assert "3 images are drawn already: going on" in capsys.readouterr().out and numbers == [2, 3]
    assert content(images) == content(made(folder, tmp_path / "fresh", **interrupted))


@pytest.mark.parametrize("change", [{"seed": 1}, {"guidance_scale": 3.0}, {"gif": False}, {"scheduler": "DPMSolverMultistepScheduler"}])
def test_other_settings_begin_anew(folder, interrupted, tmp_path, change, capsys):
    images = made(folder, tmp_path / "images", **(interrupted | change))
    assert "other settings are discarded" in capsys.readouterr().out
    assert content(images) == content(made(folder, tmp_path / "fresh", **(interrupted | change)))


def test_images_that_left_just_before_a_kill_are_drawn_again(folder, tmp_path, monkeypatch):
    """A kill between the last rename and the end of the run leaves records without files."""
    removed = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None if str(path).endswith(".generating") else removed(path, **options))
    images = made(folder, tmp_path / "images")
    monkeypatch.setattr(shutil, "rmtree", removed)
    assert (tmp_path / ".images.generating" / "batches" / "000000.json").is_file()
    before = content(images)
    made(folder, images, overwrite=True)
    assert content(images) == before and not (tmp_path / ".images.generating").exists()
