"""Draw the pictures of the documentation: `python docs/make_images.py`."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

IMAGES = Path(__file__).parent / "images"
CELL, LABEL, TITLE, IN_ROW = 130, 112, 30, 6
STAIN_NAMES = {"h&e": "H&E", "melan": "Melan-A", "sox10": "SOX10"}
OUTLINE = (0, 160, 60)


def demo_picture(cohort_folder: Path) -> Image.Image:
    """Draw a benign and a high-grade case of the demo, planted patches outlined.

    Args:
        cohort_folder: Written by `make_demo_cohort`.

    Returns:
        The contact sheet, 892 px wide, patches at their true size.
    """
    with (cohort_folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        codes = {row["Case"]: row["Class"] for row in csv.DictReader(file)}
    with (cohort_folder / "planted.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    height = 2 * (TITLE + len(STAIN_NAMES) * CELL)
    sheet = Image.new("RGB", (LABEL + IN_ROW * CELL, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(17)
    top = 0
    for title, case_id in (
        ("benign", _richest(rows, {c for c, code in codes.items() if code == "1"})),
        ("high grade (planted patches outlined)", _richest(rows, {c for c in codes if codes[c] != "1"})),
    ):
        draw.text((LABEL, top + 5), f"case {case_id}: {title}", fill="black", font=font)
        top += TITLE
        for stain, name in STAIN_NAMES.items():
            draw.text((10, top + CELL // 2 - 10), name, fill="black", font=font)
            of_stain = [row for row in rows if row["case_id"] == case_id and row["stain"] == stain]
            _draw_row(sheet, cohort_folder, of_stain, top)
            top += CELL
    return sheet.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


def _richest(rows: list[dict[str, str]], cases: set[str]) -> str:
    """The case with all stains and the most planted patches; of equals the first."""

    def richness(case_id: str) -> tuple[int, int, int]:
        own = [row for row in rows if row["case_id"] == case_id]
        return len({row["stain"] for row in own}), sum(int(row["planted"]) for row in own), -int(case_id)

    return max(cases, key=richness)


def attention_picture(project: Path, run: Path) -> Image.Image:
    """Draw the six patches of every high-grade test case that have the most effective attention.

    Args:
        project: The demo's folder.
        run: A run in it that has `attention_analysis/patch_attention.csv`.

    Returns:
        One row a case, planted patches outlined, the attention below each patch.
    """
    with (project / "planted.csv").open(encoding="utf-8", newline="") as file:
        planted = {row["path"]: row["planted"] for row in csv.DictReader(file)}
    table = run / "attention_analysis" / "patch_attention.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = [{**row, "planted": planted[row["path"]]} for row in csv.DictReader(file)]
    cases = list(dict.fromkeys(row["case_id"] for row in rows if row["planted"] == "1"))
    step = CELL + TITLE
    sheet = Image.new("RGB", (LABEL + IN_ROW * CELL, len(cases) * step), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, case in enumerate(cases):
        own = [row for row in rows if row["case_id"] == case]
        own.sort(key=lambda row: -float(row["effective_attention"]))
        shown = own[:IN_ROW]
        count = sum(row["planted"] == "1" for row in own)
        text = f"case {case}\n{len(own)} patches,\n{count} planted"
        draw.text((8, number * step + CELL // 3), text, fill="black", font=font)
        _draw_cells(sheet, project, shown, number * step)
        for column, row in enumerate(shown):
            share = f"{float(row['effective_attention']):.1%}"
            left = LABEL + column * CELL + CELL // 2 - 18
            draw.text((left, number * step + CELL + 2), share, fill="black", font=font)
    return sheet.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


def page_picture(report: Path, case: str, path: Path) -> None:
    """Take a picture of a case's page in a report, with the machine's own Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 1500})
        page.goto(f"{report.resolve().as_uri()}#case={case}")
        page.screenshot(path=path, type="jpeg", quality=72)
        browser.close()


def _draw_row(sheet: Image.Image, folder: Path, rows: list[dict[str, str]], top: int) -> None:
    """Up to three planted patches among six, in the order of the table."""
    planted = [row for row in rows if row["planted"] == "1"][: IN_ROW // 2]
    others = [row for row in rows if row["planted"] == "0"][: IN_ROW - len(planted)]
    _draw_cells(sheet, folder, [row for row in rows if row in planted or row in others], top)


def _draw_cells(sheet: Image.Image, folder: Path, rows: list[dict[str, str]], top: int) -> None:
    for column, row in enumerate(rows):
        patch = Image.open(folder / "patches" / row["path"])
        patch.thumbnail((CELL - 8, CELL - 8))
        left = LABEL + column * CELL + (CELL - patch.width) // 2
        upper = top + (CELL - patch.height) // 2
        if row["planted"] == "1":
            frame = (left - 4, upper - 4, left + patch.width + 3, upper + patch.height + 3)
            ImageDraw.Draw(sheet).rectangle(frame, outline=OUTLINE, width=4)
        sheet.paste(patch, (left, upper))


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        subprocess.run([Path(sys.executable).with_name("featstore"), "demo", demo], check=True)
        demo_picture(demo).save(IMAGES / "demo_patches.png", optimize=True)
        (run,) = (demo / "runs").glob("*_dual_stream")
        attention_picture(demo, run).save(IMAGES / "demo_attention.png", optimize=True)
        featstore = Path(sys.executable).with_name("featstore")
        subprocess.run([featstore, "attention", run, "--project", demo], check=True)
        overlay = Image.open(run / "attention_analysis/overlays/case_15_h&e_sliceunmatched_1_attention.jpg")
        overlay.convert("RGB").save(IMAGES / "overlay.jpg", quality=82, optimize=True)
        page_picture(run / "report.html", "15", IMAGES / "report_case.jpg")
        loss = Image.open(run / "model_loss.png")
        loss.thumbnail((760, 760))
        loss.convert("RGB").quantize(64).save(IMAGES / "demo_loss.png", optimize=True)
