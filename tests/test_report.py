"""The report: numbers that figures are drawn from, what is drawn, and the page in a browser."""

import json
import re
import shutil
import subprocess
import sys
from html import unescape

import numpy as np
import pytest

from medsd.errors import InputError
from medsd.evaluation.classification import auroc, calibration_error
from medsd.evaluation.curves import calibration_bins, confusion_counts, roc_points, wilson_interval
from medsd.report import charts, figures, page, pictures, style
from medsd.report.embed import embed
from medsd.report.page import Material, write_report
from medsd.report.tables import Notes, numbers_table

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '<b>"x"&$a$'
NAMES = ["normal", "epidural", HOSTILE]


@pytest.fixture
def scores():
    """Probabilities `(90, 3)` with ties, and labels of which two are not known."""
    draws = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    evidence = draws.normal(size=(90, 3)).round(1) + 1.5 * np.eye(3)[labels]
    labels[[0, 40]] = -1
    return np.exp(evidence) / np.exp(evidence).sum(1, keepdims=True), labels


@pytest.fixture
def material(scores):
    """Something for every section."""
    draws = np.random.default_rng(1)
    images = draws.integers(0, 256, (3, 2, 16, 16), dtype=np.uint8)
    row = {"column": "sex", "value": HOSTILE, "n": 12, "metric": 0.8, "low": 0.7, "high": 0.9}
    run = {"model": "tiny", "fraction": 0.1, "seed": 0, "auroc": "0.8", "auroc_low": "0.7", "auroc_high": ""}
    return Material(
        title=f"Heads {HOSTILE}",
        facts={"data": HOSTILE},
        environment={"packages": {"torch": "2.13.0"}, "device": HOSTILE},
        curves=[{"step": step, "time": 0.0, "loss": 1 / step} for step in range(1, 80)] + [{"step": 80, "validation_auroc": 0.9}],
        class_names=NAMES,
        grids={"real": images, "reconstructed": images, "generated": np.stack([images] * 3, -1)},
        denoising=images,
        features={kind: (draws.normal(size=(5, 4)), np.array([0, 1, 2, 1, -1])) for kind in ("real", "generated")},
        probabilities=scores[0],
        labels=scores[1],
        metrics={
            "n": 90,
            "auroc": 0.9,
            "auroc_ci": [0.85, 0.95],
            "fid": None,
            "fid_ci": None,
            f"auroc/{HOSTILE}": 0.87,
            "risk_coverage": [[0.5, 0.0], [1.0, 0.2]],
            "calibration": {"weighting": "uniform"},
            "reasons": {"fid": HOSTILE, "fid_ci": HOSTILE},
        },
        evidence=[(np.stack([images[0, 0]] * 3, -1), HOSTILE)],
        sweep=[run | {"patients": 10}, run | {"patients": 40, "auroc": ""}],
        audit={"copies": 0, "quantity": HOSTILE},
        audit_pairs=(images[:, 0], images[:, 1], [HOSTILE] * 3),
        audit_scores=(draws.normal(size=30), draws.normal(size=40), -2.0),
        subgroups=[row, row | {"value": "M", "metric": None, "low": None, "high": None}],
        histograms=(np.arange(8.0), np.full(8, 0.125), np.full(8, 0.125), "HU"),
    )


@pytest.fixture(autouse=True)
def light():
    with style.theme("light"):
        yield


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_roc_points_are_those_of_scikit_learn(scores):
    metrics = pytest.importorskip("sklearn.metrics")
    positive = scores[1] == 1
    theirs = metrics.roc_curve(positive, scores[0][:, 1], drop_intermediate=False)[:2]
    ours = roc_points(scores[0][:, 1], positive)
    np.testing.assert_allclose(ours, theirs)
    assert np.trapezoid(ours[1], ours[0]) == pytest.approx(auroc(scores[0][:, 1], positive, np.ones((1, 90)))[0])


def test_bins_add_up_to_the_calibration_error(scores):
    confidence, right = scores[0].max(1), scores[0].argmax(1) == scores[1]
    counts, said, share = calibration_bins(confidence, right)
    gap = np.nansum(counts / counts.sum() * np.abs(share - said))
    assert counts.sum() == 90 and gap == pytest.approx(calibration_error(confidence, right, np.ones((1, 90)))[0])


def test_intervals_of_shares_are_those_of_scipy():
    from scipy.stats import binomtest

    for hits, count in ((0, 3), (5, 9), (40, 40)):
        theirs = binomtest(hits, count).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson_interval(hits, count), (theirs.low, theirs.high), atol=1e-6)


def test_confusion_counts_what_is_known():
    counts = confusion_counts([0, 0, 1, 2, -1, 1], [0, 1, 1, 2, 0, -1], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_roc_draws_a_curve_and_its_area_for_each_class(scores):
    (axes,) = figures.roc_curves(*scores, NAMES).axes
    known = scores[1] >= 0
    for place, name in enumerate(NAMES):
        positive = scores[1][known] == place
        found = next(line for label, line in lines(axes).items() if label.startswith(name))
        np.testing.assert_allclose(found.get_xydata().T, roc_points(scores[0][known, place], positive))
        assert found.get_label() == f"{name} {figures.area(scores[0][known, place], positive):.3f}"


def test_roc_of_two_classes_is_of_the_second(scores):
    (axes,) = figures.roc_curves(scores[0][:, :2], np.minimum(scores[1], 1), ["without", "with"]).axes
    assert [label.split()[0] for label in lines(axes) if not label.startswith("_")] == ["with"]


def test_findings_are_ranked_and_calibrated_one_by_one():
    draws = np.random.default_rng(2)
    probabilities = draws.random((400, 3))
    labels = (draws.random((400, 3)) < probabilities).astype(int)
    labels[:, 2], labels[0, 0] = 0, -1
    (axes,) = figures.roc_curves(probabilities, labels, NAMES).axes
    assert len([label for label in lines(axes) if not label.startswith("_")]) == 2  # Nothing shows the third.
    above, below = figures.reliability(probabilities, labels, NAMES).axes
    np.testing.assert_allclose(lines(above)["epidural"].get_ydata(), calibration_bins(probabilities[:, 1], labels[:, 1])[2])
    assert sum(bar.get_height() for bar in below.patches) == 1199
    given = charts.ranking(Material(class_names=NAMES, probabilities=probabilities, labels=labels))
    assert [chart.name for chart in given] == ["roc", "reliability"]


def test_reliability_shows_the_share_right_and_the_counts(scores):
    above, below = figures.reliability(*scores).axes
    known = scores[1] >= 0
    counts, said, share = calibration_bins(scores[0][known].max(1), scores[0][known].argmax(1) == scores[1][known])
    (points,) = (container for container in above.containers)
    np.testing.assert_allclose(points.lines[0].get_xydata(), np.stack([said, share], 1)[counts > 0])
    assert [bar.get_height() for bar in below.patches] == counts.tolist()


def test_confusion_writes_shares_of_rows_and_counts():
    (axes,) = figures.confusion([0, 0, 0, 0, 1, 2, -1], [0, 0, 0, 1, 1, 1, 0], NAMES).axes
    assert texts(axes)[:3] == ["75 %\n(3)", "25 %\n(1)", "0 %\n(0)"] and texts(axes)[7] == "100 %\n(1)"
    np.testing.assert_allclose(axes.images[0].get_array()[0], [0.75, 0.25, 0])


def test_loss_is_smoothed_where_it_is_long_and_other_numbers_have_their_own_panel():
    draws = np.random.default_rng(0)
    log = [{"step": step, "loss": 1 + draws.random(), "validation_loss": None} for step in range(100)]
    log += [{"step": 99, "validation_loss": 2.0, "validation_auroc": 0.9}, {"step": 50, "validation_auroc": 0.8}]
    loss, ranking = figures.loss_curves(log).axes
    raw, smooth = (np.asarray(line.get_ydata()) for line in loss.lines[:2])
    assert np.array_equal(raw, [line["loss"] for line in log[:100]]) and smooth.std() < 0.7 * raw.std()
    assert lines(loss)["validation loss"].get_xydata().tolist() == [[99, 2.0]]
    assert ranking.get_title(loc="left") == "AUROC, validation images" and len(ranking.lines[0].get_xydata()) == 2


def test_risk_coverage_draws_its_points():
    points = [[0.1, 0.0], [1.0, 0.25]]
    (axes,) = figures.risk_coverage(points).axes
    assert axes.lines[0].get_xydata().tolist() == points


def test_data_size_draws_each_run_and_the_means_of_seeds():
    table = [
        {"model": "tiny", "patients": "10", "seed": 0, "auroc": "0.6", "auroc_low": "0.5", "auroc_high": "0.7"},
        {"model": "tiny", "patients": 10, "seed": 1, "auroc": 0.8, "auroc_low": None, "auroc_high": None},
        {"model": "tiny", "patients": 100, "seed": 0, "auroc": 0.9},
        {"model": "small", "patients": 100, "seed": 0, "auroc": ""},
    ]
    (axes,) = figures.data_size(table).axes
    assert axes.get_xscale() == "log" and [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "100"]
    np.testing.assert_allclose(lines(axes)["tiny"].get_xydata(), [[10, 0.7], [100, 0.9]])
    bars = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.5, 0.7], [0.8, 0.8], [0.9, 0.9]])
    assert "small" not in lines(axes)


def test_audit_distances_are_shares_on_common_bins():
    (axes,) = figures.audit_distances([0.1, 0.2, 0.3], [0.5, 0.6], 0.05, "distance").axes
    held_out, samples = (sum(bar.get_height() for bar in bars) for bars in axes.containers)
    assert held_out == pytest.approx(1) and samples == pytest.approx(1) and lines(axes)["threshold"].get_xdata() == [0.05, 0.05]
    assert [len(bars) for bars in axes.containers] == [40, 40] and axes.get_xlabel() == "distance"


def test_subgroups_keep_the_line_of_a_group_without_a_number():
    row = {"column": "sex", "value": "F", "n": 12, "metric": 0.8, "low": 0.7, "high": 0.9}
    (axes,) = figures.subgroups([row, row | {"value": "M", "n": 3, "metric": None, "low": None, "high": None}]).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["SEX", "F (n=12)", "M (n=3)"]
    ((bar,),) = (container.lines[2][0].get_segments() for container in axes.containers)
    np.testing.assert_allclose(bar, [[0.7, 1], [0.9, 1]])


def test_histograms_draw_both():
    (axes,) = figures.histograms(np.arange(3), np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.3, 0.2]), "HU").axes
    assert lines(axes)["generated"].get_ydata().tolist() == [0.5, 0.3, 0.2] and axes.get_xlabel() == "HU"


def test_embedding_draws_each_image_once_and_says_how():
    places = np.random.default_rng(0).normal(size=(30, 2))
    figure = figures.embedding(places[:20], np.arange(20) % 3, places[20:], np.arange(10) % 3, NAMES, "PCA")
    drawn = np.concatenate([points.get_offsets() for points in figure.axes[0].collections])
    np.testing.assert_array_equal(np.unique(drawn, axis=0), np.unique(places, axis=0))
    assert figure.axes[0].get_title(loc="left") == "PCA of features" and len(drawn) == 30


def test_few_images_are_embedded_by_their_principal_components():
    decomposition = pytest.importorskip("sklearn.decomposition")
    values = np.random.default_rng(0).normal(size=(10, 5)) * [9, 5, 1, 1, 1]
    places, method = embed(values)
    theirs = decomposition.PCA(2).fit_transform((values - values.mean(0)) / values.std(0))
    assert method == "PCA"
    np.testing.assert_allclose(np.abs(places), np.abs(theirs), atol=1e-9)
    assert embed(values[:, :1])[0].shape == (10, 2)


def test_without_umap_many_images_are_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    assert embed(np.random.default_rng(0).normal(size=(40, 5)))[1] == "PCA"


@pytest.mark.slow
def test_umap_keeps_classes_apart_and_is_the_same_again():
    pytest.importorskip("umap")
    values = np.random.default_rng(0).normal(size=(60, 8)) + 20 * np.eye(2, 8)[np.arange(60) % 2]
    places, method = embed(values)
    assert method == "UMAP" and np.array_equal(places, embed(values)[0])
    means = [places[kind::2].mean(0) for kind in (0, 1)]
    assert np.linalg.norm(means[0] - means[1]) > 3 * places[::2].std(0).max()


def test_tiles_keep_their_pixels_and_have_clear_gaps():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 10, 3), dtype=np.uint8)
    (axes,) = pictures.image_grid(images, ["a", "a name of more letters"], columns=["1", "2", "3"]).axes
    sheet = np.asarray(axes.images[0].get_array())
    assert sheet.shape == (17, 32, 4)
    np.testing.assert_array_equal(sheet[9:, 11:21, :3], images[1, 1])
    assert not sheet[8].any() and not sheet[:, 10].any()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "a name of more\nletters"]
    np.testing.assert_allclose(axes.get_yticks(), [3.5, 12.5])
    with pytest.raises(InputError, match="uint8"):
        pictures.image_grid(images / 255, ["a", "b"])


def test_a_strip_names_its_ends():
    (axes,) = pictures.denoising_strip(np.zeros((1, 4, 8, 8), np.uint8), ["a"]).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["noise", "", "", "image"]


def test_pairs_stand_side_by_side_under_their_captions():
    samples, neighbours = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    plots = pictures.audit_pairs(samples, neighbours, ["first", "second", "third"]).axes
    assert [axes.get_title(loc="left") for axes in plots] == ["first", "second", "third", ""]
    sheet = np.asarray(plots[1].images[0].get_array())[..., 0]
    np.testing.assert_array_equal(sheet, np.hstack([samples[1], np.zeros((8, 1)), neighbours[1]]))


@pytest.mark.parametrize("name", ["light", "dark"])
def test_lines_and_letters_stand_out_from_the_paper(name):
    """Contrast by WCAG 2.2: 3 for lines, 4.5 for letters."""
    from matplotlib.colors import to_rgb

    def light_of(colour):
        rgb = np.array(to_rgb(colour))
        return 0.05 + np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    def contrast(colour):
        pair = light_of(colour), light_of(style.THEMES[name]["paper"])
        return max(pair) / min(pair)

    assert min(map(contrast, style.PALETTES[name])) > 3
    assert min(contrast(style.THEMES[name][role]) for role in ("ink", "muted")) > 4.5
    with style.theme(name):
        assert [style.readable((shade,) * 3) for shade in (0.0, 1.0)] == sorted(
            [style.ink(), style.ink("paper")], key=light_of, reverse=True
        )


def test_many_classes_have_lines_of_their_own():
    lines_of = {(each["color"], each["linestyle"]) for each in style.series(20)}
    assert len(lines_of) == 20


def test_letters_are_readable_on_a_phone():
    """At 360 px no letter of a figure is below 9 px."""
    figure = figures.roc_curves(np.eye(3), np.arange(3), NAMES)
    sizes = [text.get_fontsize() for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_legend().get_texts())]
    assert min(sizes) / 72 * 360 / style.WIDTH > 9


def test_an_empty_material_has_no_section(tmp_path):
    text = write_report(tmp_path, Material(title="Nothing")).read_text()
    assert "<section" not in text and "<img" not in text and "Not for clinical use" in text
    assert list((tmp_path / "figures").iterdir()) == []


FIGURES = [
    *("loss", "real", "reconstructed", "generated", "denoising", "embedding", "histograms", "roc", "reliability", "risk_coverage"),
    *("confusion", "evidence", "subgroups", "data_size", "audit_distances", "audit_pairs"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the page of full material, made once."""
    return tmp_path_factory.mktemp("report")


@pytest.fixture
def full(written, material):
    if not (written / "report.html").exists():
        write_report(written, material)
    return written / "report.html"


def test_full_material_has_every_section_and_figure(full):
    from PIL import Image

    text = full.read_text()
    assert re.findall(r'<section id="([^"]+)"', text) == ["facts", "numbers", *page.SECTIONS, "environment", "notes"]
    assert re.findall(r'<figure id="figure-([^"]+)"', text) == FIGURES
    assert sorted(path.stem for path in (full.parent / "figures").iterdir()) == sorted(FIGURES)
    for path in (full.parent / "figures").iterdir():
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 10
    links, anchors = (set(re.findall(pattern, text)) for pattern in (r'href="#([^"]+)"', r'id="([^"]+)"'))
    assert links and links <= anchors


def test_the_page_is_whole_by_itself(full):
    text = full.read_text()
    assert "<script" not in text and not re.search(r"https?://|file://|//[a-z]", re.sub(r"data:[^\"]+", "", text))
    assert set(re.findall(r'(?:src|srcset|href)="([^"#:]+):', text)) == {"data"}
    assert text.isascii() and str(full.parent) not in text


def test_what_users_name_is_escaped_wherever_it_stands(full):
    text = full.read_text()
    assert "<b>" not in text and HOSTILE not in text and text.count("&lt;b&gt;&quot;x&quot;&amp;$a$") > 8


def test_every_figure_says_what_it_shows(full):
    text = full.read_text()
    images = re.findall(r"<img [^>]+>", text)
    alts = [unescape(re.search(r'alt="([^"]*)"', image)[1]) for image in images]
    assert len(images) == text.count("<figcaption>") == text.count("<source ") == len(FIGURES)
    assert all(len(alt) > 30 for alt in alts) and all(re.search(r'width="\d+" height="\d+"', image) for image in images)
    said = dict(zip(FIGURES, alts, strict=True))
    assert "from 1.000 at step 1 to 0.013 at step 79" in said["loss"] and "validation auroc 0.900" in said["loss"]
    assert "Error rate 0.200 of all images, 0.000 of the most certain 50%" in said["risk_coverage"]
    assert re.search(r"\d+ of 88 images are answered rightly; the most frequent mistake is", said["confusion"])


def test_a_missing_number_says_why(full):
    text = full.read_text()
    assert "<td>0.900</td><td>[0.850, 0.950]</td>" in text
    row = re.search(r"FID.*?</tr>", text)[0]
    assert row.count('&ndash;<sup><a href="#note-1"') == 2 and text.count('<li id="note-') == 1


@pytest.mark.parametrize(
    ("value", "said"), [(12345, "12,345"), (123.456, "123"), (12.34, "12.3"), (0.5, "0.500"), (0.000123, "0.00012"), (True, "yes")]
)
def test_numbers_are_shown_as_people_read_them(value, said):
    assert re.findall(r"<td>([^<]+)</td>", numbers_table("All", {"fid": value}, Notes())) == [said]


def test_a_number_that_is_none_is_a_dash():
    assert "<td>&ndash;</td>" in numbers_table("All", {"fid": float("nan")}, Notes())


def test_an_audit_that_is_left_out_says_why(tmp_path):
    metrics = {"audit": None, "reasons": {"audit": "Trained on <other> data."}}
    page = write_report(tmp_path, Material(title="a", class_names=["a"], metrics=metrics)).read_text()
    assert "<p>No audit: Trained on &lt;other&gt; data.</p>" in page and 'id="audit"' in page


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, material):
    write_report(tmp_path, Material(title="old", class_names=["a"], grids={"real": np.zeros((1, 1, 8, 8), np.uint8)}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="expected 1 rows of images"):
        write_report(tmp_path, Material(title="new", class_names=["a"], grids={"real": np.zeros((2, 1, 8, 8), np.uint8)}))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} and len(before) == 2


@pytest.mark.slow
def test_six_classes_of_the_worst_of_images_stay_under_six_megabytes(tmp_path, material):
    draws = np.random.default_rng(0)

    def noise(*shape):
        return draws.integers(0, 256, shape, dtype=np.uint8)

    material.class_names = ["intraparenchymal"] * 6
    material.grids = {kind: noise(6, 8, 256, 256) for kind in material.grids}
    material.denoising, material.evidence = noise(6, 8, 256, 256), [(noise(256, 256, 3), "one against another")] * 6
    material.audit_pairs = (noise(6, 256, 256), noise(6, 256, 256), ["distance"] * 6)
    material.probabilities = material.labels = None
    assert 2e6 < write_report(tmp_path, material).stat().st_size < 6e6


WRAPPER = """<!DOCTYPE html><body>
%s
<script>
window.onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const inside = frame.contentDocument, root = inside.scrollingElement, images = [...inside.images];
    return {
      width: root.clientWidth, spills: root.scrollWidth > root.clientWidth, paper: getComputedStyle(inside.body).backgroundColor,
      images: images.length, drawn: images.filter(image => image.complete && image.naturalWidth > 100).length,
      dark: images.filter(image => image.currentSrc !== image.src).length,
    };
  });
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
};
</script></body>"""
BROWSER = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--allow-file-access-from-files"),
    *("--enable-logging=stderr", "--window-size=1600,1000", "--dump-dom"),
]


def browse(folder, pages, *options):
    """What a browser makes of each (file, width), and its console's lines."""
    frames = (f'<iframe src="file://{file}" style="border: 0; height: 900px; width: {width}px"></iframe>' for file, width in pages)
    (folder / "wrapper.html").write_text(WRAPPER % "\n".join(frames))
    command = [CHROMIUM, *BROWSER, f"--user-data-dir={folder / 'profile'}", *options, f"file://{folder / 'wrapper.html'}"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    found = re.search(r"<pre>(\[.*?\])</pre>", answer.stdout)
    assert found, f"{answer.stdout[-500:]}\n{answer.stderr[-2000:]}"
    return json.loads(unescape(found[1])), [line for line in answer.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("scheme", "paper"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(22, 25, 29)")], ids=["light", "dark"])
def test_a_browser_draws_every_figure_and_needs_no_sideways_scroll(full, tmp_path, scheme, paper):
    seen, console = browse(tmp_path, [(full, 390), (full, 1440)], f"--blink-settings=preferredColorScheme={scheme}")
    assert not console
    for page_seen, width in zip(seen, (390, 1440), strict=True):
        assert width - 20 <= page_seen["width"] <= width and not page_seen["spills"]
        assert page_seen["images"] == page_seen["drawn"] == len(FIGURES) and page_seen["paper"] == paper
        assert page_seen["dark"] == (len(FIGURES) if scheme == "0" else 0)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_browser_would_see_what_is_wrong(tmp_path):
    (tmp_path / "bad.html").write_text('<div style="width:900px">x</div><img src="data:image/png;base64,AAAA"><script>nothing()</script>')
    (seen,), console = browse(tmp_path, [(tmp_path / "bad.html", 390)])
    assert seen["spills"] and seen["drawn"] == 0 and any("nothing is not defined" in line for line in console)
