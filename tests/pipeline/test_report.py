"""A report has the figures of its results, marks what decides nothing, escapes what it is given, shows in Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssdd.engine.png import save_png
from ssdd.images.pixels import grid
from ssdd_pipeline.report.page import main
from ssdd_pipeline.report.pictures import coloured, difference, read_grid

NETWORK, CLASSIFIER = "efficientnet_lite0", "classifier:some/file.safetensors"
EVIL = "<script>alert('x')</script>&\""
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
CONTROL = (
    "<!doctype html><body><div style='width:3000px'>wide</div><img src='data:image/png;base64,AAAA'>"
    "<script>console.error('seen')</script></body>"
)
PROBE = """<script>addEventListener("load", () => parent.postMessage({inner: innerWidth, images: document.images.length,
scroll: document.documentElement.scrollWidth, broken: [...document.images].filter(i => !i.naturalWidth).length,
unnamed: [...document.images].filter(i => !i.alt).length}, "*"))</script>"""


def scores(kid: float, **more: float) -> dict:
    return {"frechet": 100 * kid, "kid": kid, "kid_low": kid - 0.25, "kid_high": kid + 0.25, **more}


def write_run(jobs: Path, name: str, checkpoint: str | None, features: float) -> None:
    config = {
        "losses": {"lpips": 0.0, "repa": 0.0, "features": features},
        "aux_losses": {"repa": {"model": "some_vit"}, "features": {"model": "tf_efficientnet_lite0"}},
        "ssdd": {"checkpoint": checkpoint, "encoder_checkpoint": None},
    }
    (jobs / name).mkdir(parents=True)
    (jobs / name / "config.yaml").write_text(json.dumps(config))


def write_evaluation(folder: Path, **more: object) -> None:
    """A result as both evaluations have it, of three decoders and a baseline, with pictures."""
    steps = {"teacher-4": 4, "teacher-1": 1, "student-1": 1}
    rows = []
    for i, (name, n) in enumerate([*steps.items(), ("blur", None)]):
        unseen = {f"{key}_to_held_out": 2.0 + i for key in ("kid", "kid_low", "kid_high")}
        more_scores = unseen if more["task"] == "evaluate" else {"precision": 0.5 + i / 100}
        distances = {NETWORK: scores(1.25 + i, **more_scores), CLASSIFIER: scores(0.0625 * (i + 1))}
        rows.append({"name": name, "steps": n, "PSNR": 20 + i / 7, "distances": distances})
        rows[-1] |= {"images_per_s": 1000 / (i + 1)} if n else {}
    paired = {"teacher-4 - student-1": {"kid": -1.5, "low": -2.0, "high": -1.0}}
    paired["teacher-4 - teacher-1"] = {"kid": -0.5, "low": -1.0, "high": 0.25}
    runs = {"teacher-4": "tokenizer", "teacher-1": "tokenizer", "student-1": "student"}
    result = {
        "count": 24,
        "rows": rows,
        "floor": {NETWORK: scores(0.5), CLASSIFIER: scores(0.03125)},
        "paired": {NETWORK: paired, CLASSIFIER: paired},
        "features": {NETWORK: "ab" * 32, CLASSIFIER: "cd" * 32},
        "decoders": {name: {"reference": runs[name], "steps": n, "weights": "ef" * 32} for name, n in steps.items()},
        "measured": {"command": EVIL, "commit": "0123abcd", "date": "2026-11-21T09:25:12+00:00", "machine": "a chip"},
    }
    (folder / "pictures").mkdir(parents=True)
    (folder / "task_result.json").write_text(json.dumps(result | more))
    drawn = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in ("originals", *steps, "blur"):
        columns = 3 if more["task"] == "evaluate" else 6
        save_png(folder / "pictures" / f"{name}.png", grid(drawn if name != "blur" else 255 - drawn, columns))


def write_evaluations(jobs: Path) -> list[Path]:
    """Folders of a reconstruction and a generation; the student alone had Lite0's features as a loss."""
    write_run(jobs, "tokenizer", None, 0.0)
    write_run(jobs, "student", "tokenizer", 0.5)
    write_evaluation(jobs / "recon", task="eval", data="01" * 32, crop="resize")
    noise = [{"noise": level, **scores(1 + level)} for level in (0.0, 0.5)]
    gap = {"gfid": 9.5, "rfid": 4.125, "gap": 5.375, "rfid_to_reference": 4.0, "gap_to_reference": 5.5, "kid_gap": 0.75}
    write_evaluation(
        jobs / "drawn",
        task="evaluate",
        samples={"n": 24, "seed": 7, "steps": 25, "class_names": ["cat", EVIL], "latents_sha256": "12" * 32},
        reference={"source": "digits", "fingerprint": "34" * 32, "crop": "adm"},
        shown=[{"label": 0, "indices": [0, 2, 4]}, {"label": 1, "indices": [1, 3, 5]}],
        gap={NETWORK: {"teacher-4": gap}},
        latent_noise={name: {"teacher-4": noise, "student-1": noise} for name in (NETWORK, CLASSIFIER)},
        sweep=[
            {
                "cfg_scale": c,
                "steps": 9,
                "n": 8,
                "distances": {"teacher-4": {NETWORK: scores(c), CLASSIFIER: scores(c)}},
            }
            for c in (1.0, 2.0)
        ],
    )
    return [jobs / "recon", jobs / "drawn"]


@pytest.fixture
def evaluations(tmp_path):
    return write_evaluations(tmp_path / "jobs")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    folders = write_evaluations(folder / "jobs")
    assert main([*map(str, folders), f"out={folder / 'report.html'}"]) == 0
    return (folder / "report.html").read_text()


def tables(page: str) -> list[tuple[str, list[list[str]]]]:
    """(caption, rows of texts) of every table."""

    def text(part: str) -> str:
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split())

    found = []
    for table in re.findall(r"<table>.*?</table>", page, re.S):
        rows = [re.findall(r"<t[hd]\b.*?</t[hd]>", row, re.S) for row in re.findall(r"<tr\b.*?</tr>", table, re.S)]
        caption = re.search(r"<caption>(.*?)</caption>", table, re.S)[1]
        found.append((text(caption), [[text(cell) for cell in row] for row in rows]))
    return found


def test_every_figure_of_a_result_is_in_its_table_beside_its_interval_and_its_floor(page):
    caption, (header, *rows) = tables(page)[0]
    assert "24 held-out images" in caption and NETWORK in caption
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == ["teacher-1", "teacher-4", "student-1", "blur", "held-out images"]
    student = table["student-1"]
    assert student["PSNR ↑"] == f"{20 + 2 / 7:.2f}" and student["decode images/s ↑"] == f"{1000 / 3:.1f}"
    assert student["rKID [95 %] ↓ optimised"] == "3.2500 [3.0000, 3.5000]"
    assert student["rFD ↓ optimised"] == "325.000" and student["rFD ÷ floor ↓ optimised"] == "6.50"
    assert table["held-out images"]["rFD ↓ optimised"] == "50.000" and table["blur"]["decode images/s ↑"] == "–"


def test_generated_images_are_also_held_against_images_that_the_generator_never_saw(page):
    _, (header, *rows) = next(found for found in tables(page) if found[0].startswith("24 generated"))
    place = header.index("gKID to held-out [95 %] ↓ optimised")
    assert [row[place] for row in rows[:2]] == ["3.0000 [3.0000, 3.0000]", "2.0000 [2.0000, 2.0000]"]
    assert not any("to held-out" in cell for cell in tables(page)[0][1][0])


def test_the_generation_gap_is_a_table_where_it_was_measured(page):
    gaps = [(caption, rows) for caption, rows in tables(page) if caption.startswith("Generation gap")]
    assert len(gaps) == 1 and gaps[0][1][1] == ["teacher-4", "9.500", "4.125", "5.375", "4.000", "5.500", "0.7500"]


def test_a_paired_difference_names_the_closer_decoder_only_where_its_interval_decides(page):
    rows = next(rows for caption, rows in tables(page) if caption.startswith("KID differences"))
    assert rows[1:] == [
        ["teacher-4 − teacher-1", "-0.5000 [-1.0000, +0.2500]", "undecided"],
        ["teacher-4 − student-1", "-1.5000 [-2.0000, -1.0000]", "teacher-4"],
    ]


def test_columns_of_a_network_that_was_a_training_loss_are_marked_and_the_others_are_not(page):
    by_network = {
        name: [(caption, rows[0]) for caption, rows in tables(page) if f"features {name}" in caption]
        for name in (NETWORK, "classifier")
    }
    for caption, header in by_network[NETWORK]:
        marked = [cell for cell in header if "optimised" in cell]
        assert marked and not any(cell.startswith(("PSNR", "decode", "closer")) for cell in marked)
        assert "student-1; its figures are biased in favour" in caption or caption.startswith(
            ("KID differences", "Generation gap")
        )
    assert not any("optimised" in cell for _, header in by_network["classifier"] for cell in header)
    assert f"KID on {NETWORK} is not used here" in page


def test_a_run_whose_losses_are_not_found_is_named(evaluations, tmp_path):
    shutil.rmtree(tmp_path / "jobs" / "tokenizer")  # the student started from it: its losses aren't known either
    assert main([str(evaluations[0]), f"out={tmp_path / 'report.html'}"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Training losses of teacher-4, teacher-1, student-1: unknown" in page


def test_what_results_say_is_escaped_and_nothing_refers_outside_the_page(page):
    assert EVIL not in page and html.unescape(page).count(EVIL) >= 2
    assert "<script" not in page
    references = re.findall(r"""(?:src|href)=["']([^"']*)""", page) + re.findall(r"url\(([^)]*)", page)
    assert references and all(reference.startswith(("data:", "#")) for reference in references)
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(identifiers)) == len(identifiers)
    assert {reference[1:] for reference in references if reference.startswith("#")} <= set(identifiers)


def test_provenance_has_command_commit_machine_date_checksums_seed_and_count(page):
    told = page[page.index('id="provenance"') :]
    for part in ("0123abcd", "a chip", "2026-11-21T09:25:12", "ab" * 32, "ef" * 32, "34" * 32, "24 generated images"):
        assert part in told
    assert re.search(r"<dt>seed</dt><dd><div>7</div>", told) and html.escape(EVIL, quote=False)[:20] in told


def test_differences_are_signed_white_at_zero_and_taken_sample_by_sample(tmp_path):
    images = torch.arange(6, dtype=torch.uint8).mul(40).view(6, 1, 1, 1).expand(6, 3, 16, 8)
    save_png(tmp_path / "grid.png", grid(images, columns=3))
    read = read_grid(tmp_path / "grid.png", rows=2, columns=3)
    assert read.shape == (2, 3, 16, 8, 3) and (read[1, 2] == 200).all()
    assert read_grid(tmp_path / "grid.png", rows=5, columns=3) is None
    values = difference(read[0], read[0][::-1])
    assert values[:, 0, 0].tolist() == [-80, 0, 80]
    darker, equal, brighter = coloured(values, limit=80)[:, 0, 0].astype(int)
    assert equal.tolist() == [255, 255, 255] and darker[2] > darker[0] and brighter[0] > brighter[2]


def test_large_pictures_are_reduced_so_that_a_page_stays_below_three_megabytes(evaluations, tmp_path):
    y, x = np.mgrid[:128, :128]
    waves = [np.sin(x / (5 + i)) + np.cos(y / (3 + i)) for i in range(160)]
    images = torch.from_numpy(np.stack(waves) * 60 + 128).to(torch.uint8)[:, None]
    folder = evaluations[1]
    for name in ("teacher-4", "teacher-1", "student-1"):
        save_png(folder / "pictures" / f"{name}.png", grid(images, columns=8))
    result = json.loads((folder / "task_result.json").read_text())
    shown = [{"label": c, "indices": list(range(8 * c, 8 * c + 8))} for c in range(20)]
    (folder / "task_result.json").write_text(json.dumps(result | {"shown": shown}))
    assert main([str(folder), f"out={tmp_path / 'report.html'}"]) == 0
    page = (tmp_path / "report.html").read_bytes()
    assert page.count(b"data:image/jpeg") == 20 * 5 and len(page) < 3e6


def test_a_folder_without_an_evaluation_is_an_error_that_names_it(tmp_path, capsys):
    (tmp_path / "task_result.json").write_text('{"task": "train"}')
    assert main([str(tmp_path), f"out={tmp_path / 'report.html'}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err and not (tmp_path / "report.html").exists()
    assert main([f"out={tmp_path / 'report.html'}"]) == 2


def browse(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        "--virtual-time-budget=10000", "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)


def measured(tmp_path: Path, page: str, width: int) -> tuple[dict, list[str]]:
    """What the page measures of itself in a frame `width` px wide, and the lines of its console."""
    page = page.replace("style-src", "script-src 'unsafe-inline'; style-src")  # of the probe; the rest stays forbidden
    page = page.replace("</body>", f"{PROBE}</body>")
    frame = tmp_path / f"frame-{width}.html"
    frame.write_text(
        "<!doctype html><meta charset=utf-8><script>addEventListener('message',"
        "event => document.title = JSON.stringify(event.data))</script>"
        f'<iframe width={width} height=900 style="border:0" srcdoc="{html.escape(page)}"></iframe>'
    )
    done = browse(tmp_path, f"--window-size={width + 100},1000", "--dump-dom", frame.as_uri())
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    return json.loads(html.unescape(title[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no chromium; on Debian: apt-get install chromium (scripts/test --all does)"
)
def test_in_chromium_the_page_fits_400_and_1400_pixels_without_errors_and_prints(page, tmp_path):
    faults, console = measured(tmp_path, CONTROL, 400)
    assert faults["scroll"] > 400 and faults["broken"] == 1 and console, "the probe finds no faults"
    for width in (400, 1400):
        found, console = measured(tmp_path, page, width)
        assert console == []  # the page's policy forbids requests: one would be an error here
        assert found["inner"] == width and found["scroll"] <= width
        assert found["images"] > 20 and found["broken"] == 0 and found["unnamed"] == 0
    (tmp_path / "page.html").write_text(page)
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF") and len((tmp_path / "page.pdf").read_bytes()) > 2e4


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no chromium; on Debian: apt-get install chromium (scripts/test --all does)"
)
def test_in_chromium_a_dark_scheme_darkens_the_page_and_the_plots_follow(page, tmp_path):
    (tmp_path / "page.html").write_text(page)
    shades = []
    for scheme in ("--force-dark-mode", "--disable-features=WebContentsForceDark"):
        options = (scheme, f"--screenshot={tmp_path / 'page.png'}", "--window-size=900,900")
        browse(tmp_path, *options, (tmp_path / "page.html").as_uri())
        shades.append(np.asarray(Image.open(tmp_path / "page.png").convert("L")).mean())
    assert shades[0] < 100 < 200 < shades[1]
