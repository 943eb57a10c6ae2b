"""The page: what it reads and deletes, what it says, and a visit by a browser."""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medsd import MedSDPipeline, load_info
from medsd.config import AppConfig
from medsd.data import upload
from medsd.data.export import SYNTHETIC
from medsd.data.intensity import Labels, Range, Recorded, Stack
from medsd.data.upload import take_upload
from medsd.errors import InputError
from medsd.inference.folder import PipelineInfo
from medsd.inference.generating import Sampling, draw_batch
from medsd.inference.pictures import picture
from medsd.report.fragments import about, alert, bars, in_words, stability_in_words
from medsd.report.visitor import cannot_classify, classify, generate, look, or_alert, prompts_of, receive, takes_prompts
from recipes import app
from tests.browser import CHROMIUM, Browser
from tests.conftest import REPOSITORY

SECONDS_TO_END = 20


@pytest.fixture(scope="module")
def pipe(phantom_data):
    torch.manual_seed(0)
    made = MedSDPipeline.from_preset("tiny", load_info(phantom_data), pixel_std=0.5)
    made.info = replace(made.info, data=load_info(phantom_data))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def data(phantom_data):
    return load_info(phantom_data)


@pytest.fixture(scope="module")
def dicom(phantom_data):
    return next((phantom_data.parent / "phantom_dicom_0").rglob("*.dcm"))


@pytest.fixture
def drop(tmp_path):
    """Puts bytes where Gradio would: alone in a folder of their own."""

    def place(content, name):
        folder = tmp_path / "uploads" / "0123"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return place


def png(pixels):
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def nifti(voxels, claims=None):
    header = nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes()
    return header if claims is None else header[:42] + np.int16(claims).tobytes() + header[48:]


def silent(*told, **more):
    """No progress bar."""


def test_a_dicom_is_read_and_gone(data, drop, dicom):
    path = drop(dicom.read_bytes(), "scan.dcm")
    found = take_upload(path, data)
    assert found.images.shape == (1, 1, 32, 32) and found.images.dtype == np.int16 and found.images.min() < -500
    assert (found.modality, found.ranges, found.middle, found.remarks(data)) == ("CT", None, 0, [])
    assert not path.exists() and not path.parent.exists()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"no image" * 300, "a.dcm", "cannot be decoded"),
        (b"no image", "a.png", "cannot be decoded"),
        (b"no image", "a.exe", "not a kind of image"),
        (b"\x93NUMPY\x01\x00junk", "a.npy", "cannot be decoded"),
        (nifti(np.zeros((4, 4, 4), np.int16), (32000, 32000, 32000)), "a.nii", "the header claims"),
        (png(np.arange(256, dtype=np.uint8).reshape(16, 16)), "a.png", "grey values of 8 bits, and this model reads HU"),
        (b"", "a.tif", "cannot be decoded"),
    ],
    ids=["dicom", "png", "program", "npy", "bomb", "8 bits", "empty"],
)
def test_a_hostile_file_is_one_line_and_gone(pipe, drop, content, name, message):
    path = drop(content, name)
    found, words = receive(pipe, path)
    assert found is None and message in words and "\n" not in words
    assert str(path.parent) not in words and "Traceback" not in words
    assert not path.exists()


def large():
    file = BytesIO()
    np.save(file, np.zeros((4096, 4096), np.float32))
    return file.getvalue()


@pytest.mark.parametrize(("limit", "value", "message"), [("SECONDS", 0.0, "took longer"), ("MEMORY", 2**23, "")])
def test_a_decoder_beyond_its_limits_is_ended_and_the_page_goes_on(pipe, drop, dicom, monkeypatch, limit, value, message):
    with monkeypatch.context() as patch:
        patch.setattr(upload, limit, value)
        found, words = receive(pipe, drop(large(), "large.npy"))
    assert found is None and words.startswith("large.npy: ") and message in words
    assert receive(pipe, drop(dicom.read_bytes(), "scan.dcm"))[0] is not None


def test_too_many_slices_are_refused(data, drop, monkeypatch):
    monkeypatch.setattr(upload, "MOST_KEPT", 3 * 32 * 32 * 2)
    path = drop(nifti(np.random.default_rng(0).integers(-9, 99, (32, 32, 5)).astype(np.int16)), "a.nii")
    with pytest.raises(InputError, match="more than 3 slices"):
        upload.read_upload(path, data)


def test_a_volume_begins_at_its_middle_and_keeps_the_range_of_all(data, drop):
    voxels = np.random.default_rng(0).integers(1, 1000, (20, 16, 9)).astype(np.int16)
    mri = replace(data, unit="grey value", intensity=Recorded("percentiles", ((0.0, 1.0),)).to_dict())
    found = take_upload(drop(nifti(voxels), "a.nii"), mri)
    assert (len(found), found.middle, found.longest) == (9, 4, 20)
    np.testing.assert_allclose(found.range_of(3), found.range_of(0))
    assert found.range_of(0).shape == (1, 1, 2) and found.ranges[0, 0, 1] == pytest.approx(995, abs=3)
    assert [line.split(",")[0] for line in found.remarks(mri)] == ["It is 20 px where the model sees 32 px"]


def test_what_is_measured_on_one_slice_is_said(data, drop):
    mri = replace(data, unit="grey value", intensity=Recorded("percentiles", ((0.0, 1.0),)).to_dict())
    found = take_upload(drop(png(np.arange(1024, dtype=np.uint16).reshape(32, 32)), "a.png"), mri)
    assert found.ranges is None and "on this slice alone" in found.remarks(mri)[0]


@pytest.mark.parametrize(("low", "high", "message"), [(0, 4095, "values from 0 to 4095"), (0, 255, None)])
def test_values_that_a_model_of_8_bits_would_clip_are_refused(data, drop, low, high, message):
    grey = replace(data, unit="grey value", intensity=Range(0.0, 255.0).to_dict())
    path = drop(png(np.linspace(low, high, 1024).astype(np.uint16).reshape(32, 32)), "a.png")
    if message is None:
        assert take_upload(path, grey).images.max() == 255
    else:
        with pytest.raises(InputError, match=message):
            take_upload(path, grey)


def test_a_ct_is_not_for_a_model_of_grey_values(data, drop, dicom):
    with pytest.raises(InputError, match="a CT image in HU"):
        take_upload(drop(dicom.read_bytes(), "scan.dcm"), replace(data, unit="grey value"))


def saved_png(html):
    return Image.open(BytesIO(base64.b64decode(re.search(r'download="[^"]+" href="data:image/png;base64,([^"]+)"', html)[1])))


def test_an_image_is_the_first_of_generate_and_says_it_is_synthetic(pipe):
    told = []
    html = generate(pipe, "epidural", None, 7, 4, 2.0, lambda done, desc: told.append(done))
    drawn = draw_batch(pipe, "epidural", [0], Sampling(num_inference_steps=4, seed=7))
    file = saved_png(html)
    np.testing.assert_array_equal(np.asarray(file), np.asarray(picture(drawn.images[0])))
    assert file.text["Description"] == SYNTHETIC and "epidural_seed7.png" in html
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert html.count("<li>") == 4 and ">noise<" in html and ">image<" in html


def test_what_cannot_be_drawn_is_told(pipe):
    assert "9999" in or_alert(generate, pipe, "normal", None, 0, 9999, 2.0, silent)


def test_an_answer_names_all_that_is_known_of_it(pipe, drop, dicom):
    found, words = receive(pipe, drop(dicom.read_bytes(), "scan.dcm"))
    assert words == ""
    html = classify(pipe, found, 1, None, 8, silent)
    assert all(f"<span>{name}</span>" in html for name in pipe.class_names)
    numbers = [[float(value) for value in match] for match in re.findall(r"<span>([\d.]+) <small>\[([\d.]+), ([\d.]+)\]", html)]
    assert len(numbers) == 6 and sum(value for value, _, _ in numbers) == pytest.approx(1, abs=0.01)
    assert all(0 <= low <= high <= 1 for _, low, high in numbers)
    assert "Not calibrated" in html and "of at most 48 rows" in html and "endless computing" in html and "Evidence map" in html
    assert "the only slice" in look(pipe, found, 1)


def test_findings_are_told_one_by_one(pipe, data, drop, dicom, monkeypatch):
    monkeypatch.setattr(pipe, "info", replace(pipe.info, data=replace(data, multi_label=True)))
    found, _ = receive(pipe, drop(dicom.read_bytes(), "scan.dcm"))
    html = classify(pipe, found, 1, None, 4, silent)
    assert html.count("<small>[") == 6 and "of at most 28 rows" in html
    assert [in_words(name) for name in ("", "a", "a|b")] == ["none of the findings", "a", "a and b"]


def test_progress_counts_to_the_rows_that_there_are(pipe, drop, dicom):
    told = []
    found, _ = receive(pipe, drop(dicom.read_bytes(), "scan.dcm"))
    classify(pipe, found, 1, None, 8, lambda done, **more: told.append((done, more["desc"])))
    assert told[-1] == (None, "looking for evidence") and all(done[0] <= done[1] == 48 for done, _ in told[:-1]) and len(told) > 1


def test_without_an_image_there_is_no_answer(pipe):
    assert "no image: drop one first" in or_alert(classify, pipe, None, 1, None, 8, silent)
    assert look(pipe, None, 1) == ""


@pytest.fixture(scope="module")
def foreign(phantom_data):
    """Without classes, as a Stable Diffusion folder of somebody else."""
    torch.manual_seed(0)
    made = MedSDPipeline.from_preset("tiny", replace(load_info(phantom_data), intensity=Range(0.0, 255.0).to_dict()), pixel_std=0.5)
    made.info = PipelineInfo(codec=made.info.codec)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_model_without_classes_takes_prompts(foreign, drop):
    assert takes_prompts(foreign) and cannot_classify(foreign) is None
    side = foreign.data.resolution
    found, words = receive(foreign, drop(png(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)), "a.png"))
    assert words == ""
    html = classify(foreign, found, 1, "a head CT\n\n a chest <b> X-ray \n", 4, silent)
    assert "<span>a chest &lt;b&gt; X-ray</span>" in html and "<span>a head CT</span>" in html and "Red speaks for a " in html
    assert "1 prompts; 2 to 10" in or_alert(classify, foreign, found, 1, "one", 4, silent)
    assert saved_png(generate(foreign, None, "a head CT", 0, 2, 1.0, silent)).width == side


def test_prompts_are_told_apart():
    assert prompts_of("a\n a \nb") == ["a", "b"]


def test_models_that_cannot_classify_say_why(pipe, data, monkeypatch):
    assert cannot_classify(pipe) is None
    monkeypatch.setattr(pipe, "info", replace(pipe.info, data=pipe.data.without_classes()))
    assert "needs two or more" in cannot_classify(pipe)
    masks = Stack(((Range(0.0, 255.0), 1), (Labels((0.0, 1.0)), 1)))
    monkeypatch.setattr(pipe, "info", replace(pipe.info, data=replace(data, intensity=masks.to_dict(), image_channels=2)))
    assert "with their masks" in cannot_classify(pipe)


def test_the_model_is_described(pipe):
    html = about(pipe)
    assert all(word in html for word in ("epidural", "32 x 32 px", "HU", "not calibrated", "pixels"))


def test_text_of_others_is_text():
    assert "<img" not in alert("<img src=x onerror=alert(1)>.dcm: cannot be decoded")
    assert "<b>" not in bars(["<b>x</b>"], np.ones(1), np.ones((1, 2)))


def test_bars_are_in_order_and_lines_span_their_intervals():
    html = bars(["a", "b"], np.array([0.25, 0.75]), np.array([[0.1, 0.4], [0.6, 0.9]]))
    assert html.index("<span>b</span>") < html.index("<span>a</span>")
    assert "left: 60.00%; width: 30.00%" in html and "0.750 <small>[0.600, 0.900]</small>" in html


@pytest.mark.parametrize(
    ("p_flip", "words"), [(0.002, "is settled: with probability less than 1 %"), (0.04, "nearly"), (0.3, "not settled")]
)
def test_what_more_computing_would_change_in_words(p_flip, words):
    assert words in stability_in_words(p_flip)


def test_the_environment_stands_in_for_the_default_pipeline_alone(monkeypatch):
    monkeypatch.setenv("MEDSD_PIPELINE", "user/model")
    assert app.chosen_pipeline(AppConfig()) == "user/model"
    assert app.chosen_pipeline(AppConfig(pipeline="runs/mine/unet")) == "runs/mine/unet"
    monkeypatch.delenv("MEDSD_PIPELINE")
    assert app.chosen_pipeline(AppConfig()) == "runs/phantom/unet"


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\.\[app\]"):
        app.main(AppConfig())


# A browser's visit


@pytest.fixture(scope="module")
def address(pipe, tmp_path_factory):
    """Of a running page, whose files are below `visit.uploads`."""
    pytest.importorskip("gradio", reason="Gradio, the extra app, is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    folder = tmp_path_factory.mktemp("app")
    pipe.save_pretrained(folder / "unet")
    (folder / "uploads").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        REPOSITORY / "recipes" / "app.py",
        "--max_pairs",
        "8",
        "--num_inference_steps",
        "4",
        "--server_port",
        str(port),
    ]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads"), "MEDSD_PIPELINE": str(folder / "unet")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    said = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in said, (folder / "log").read_text()
    yield f"http://127.0.0.1:{port}", folder
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS_TO_END) == 128 + signal.SIGTERM
    assert not list((folder / "uploads").iterdir()), "nothing is left of what was dropped"
    assert (folder / "log").read_text() == ""


def tab(browser, name):
    press(browser, name, "button[role=tab]")
    browser.wait(f"document.querySelector('button[role=tab][aria-selected=true]').innerText.trim() == '{name}'")


def press(browser, name, selector="button.primary"):
    found = f"[...document.querySelectorAll('{selector}')].find(button => button.innerText.trim() == '{name}')"
    browser.wait(found)
    browser.run(f"{found}.click()")


def says(browser, words):
    browser.wait(f"document.body.innerText.includes('{words}')")


def spills(browser):
    return browser.run("document.documentElement.scrollWidth > document.documentElement.clientWidth")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1440, True)], ids=["telephone", "desk, dark"])
def test_a_visit(address, dicom, tmp_path, width, dark):
    url, folder = address
    (tmp_path / "hostile.dcm").write_bytes(b"no image" * 300)
    shutil.copy(dicom, tmp_path / "scan.dcm")
    with Browser(tmp_path / "profile") as browser:
        browser.open(url, width, 900, dark)
        press(browser, "Generate")
        says(browser, "Synthetic, it shows nobody")
        assert browser.run("document.querySelectorAll('.medsd-strip img').length") == 4 and not spills(browser)
        tab(browser, "Classify")
        press(browser, "Classify")
        says(browser, "no image: drop one first")
        browser.give_file("input[type=file]", tmp_path / "hostile.dcm")
        says(browser, "hostile.dcm: cannot be decoded")
        assert "Traceback" not in browser.run("document.body.innerText") and str(folder) not in browser.run("document.body.innerText")
        browser.wait("document.querySelector('input[type=file]')")
        browser.give_file("input[type=file]", tmp_path / "scan.dcm")
        says(browser, "CT, the only slice, as the model sees it")
        press(browser, "Classify")
        says(browser, "Red speaks for")
        assert browser.run("document.querySelectorAll('.medsd-bars li').length") == 6 and not spills(browser)
        picture = Path(os.environ.get("MEDSD_PICTURES", tmp_path)) / f"classified_{width}.png"
        browser.picture(picture)
        assert Image.open(picture).width == width and len(set(Image.open(picture).convert("RGB").resize((64, 64)).getdata())) > 50
        assert not [file for file in (folder / "uploads").rglob("*") if file.is_file() and file.stat().st_size]
        browser.run("window.scrollTo(0, 10000)")
        assert browser.run("document.querySelector('.medsd-warning').getBoundingClientRect().top") == 0, "it is seen wherever one is"
        tab(browser, "About")
        says(browser, "Parameters of the UNet")
        assert not spills(browser) and browser.run("document.body.classList.contains('dark')") == dark
        away = [address for address in browser.requests if not address.startswith((url, "data:", "blob:", "about:"))]
        assert not away and not browser.errors
