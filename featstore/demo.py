"""A cohort to try featstore on: real tissue, three stains, and labels with a planted meaning."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image

from featstore.demo_tissue import SECOND_DYE, Look, Tissue, crowd, load_tissue, paint
from featstore.errors import CohortError

DEMO_NOTE = (
    "The demo's labels are planted: every patch is cut from one image of colon tissue, and some patches "
    "of the cases called high grade were given larger, darker, crowded nuclei. Crops of that one image "
    "overlap across train, validation and test. An AUC on this cohort shows that the machinery works, "
    "and nothing about pathology."
)
VERSION = 1
MARKER = "demo.json"
STAINS = tuple(SECOND_DYE)
SLICES = ("match_1", "unmatched_1")
N_BENIGN, N_HIGH_GRADE = 24, 20
BENIGN_LACKING, HIGH_GRADE_LACKING = 3, 2
COLUMNS = ("path", "case_id", "stain", "slice_id", "patch", "planted")

_YAML = """\
# A featstore project on the demo cohort. Paths are relative to this file.
#
{note}

patches:
  folder: patches            # case_{{case}}_{{slice}}_{{stain}}_patch{{n}}.png, at any depth

labels:
  file: labels.csv           # one row a case
  case_column: Case
  class_column: Class

classes:                     # name: [codes in labels.csv]; other codes leave the cohort
  benign: [1]
  high_grade: [3, 4]

store:
  path: store                # where the embeddings are kept

backbone:
  name: densenet121
  weights: random:0          # only because the demo must run without a download; for real work: imagenet
  resize: 64                 # small, so that the demo takes seconds; the usual side is 224
"""
DEMO_NEXT = """\
  featstore check                               what is in the cohort, and what looks odd
  featstore train-head --model dual_stream      another training, another run folder
  featstore evaluate                            the newest run again, from its checkpoints
  featstore attention                           which stain, slice and patch it looked at
  featstore probe                               what each single patch says
  featstore split --folds 5                     splits for trainings to share; then train-head --fold 0
With your own patches:
  featstore init PATCHES --labels labels.csv && featstore extract && featstore train-head"""


@dataclass(frozen=True)
class DemoCohort:
    """A demo cohort on disk.

    Args:
        folder: Holds patches/, labels.csv, planted.csv and demo.json.
        n_patches: Number of patches.
        n_cases: Number of cases.
        paths: Every patch, in the order of planted.csv.
    """

    folder: Path
    n_patches: int
    n_cases: int
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class _Case:
    number: int
    case_id: str
    code: str
    lacks: str | None

    @property
    def stains(self) -> tuple[str, ...]:
        return tuple(stain for stain in STAINS if stain != self.lacks)


def write_demo_project(folder: Path, seed: int = 0) -> DemoCohort:
    """Write the demo cohort and a commented featstore.yaml, ready for every command.

    Args:
        folder: New, empty, or a demo folder of the same seed (which is left as it is).
        seed: Source of chance.

    Returns:
        The cohort.

    Raises:
        CohortError: The folder holds something else.
    """
    cohort = make_demo_cohort(folder, seed)
    config = folder / "featstore.yaml"
    if not config.exists():
        note = fill(DEMO_NOTE, 96, initial_indent="# ", subsequent_indent="# ")
        config.write_text(_YAML.format(note=note), encoding="utf-8")
    return cohort


def make_demo_cohort(folder: Path, seed: int = 0) -> DemoCohort:
    """Write patches/, labels.csv and planted.csv: 44 cases, three stains, two slices each.

    The labels are planted and prove nothing about pathology: all patches are
    crops of one image (immunohistochemistry of a colon, from scikit-image),
    which overlap across any split. In cases called high grade about a third
    of the patches of some slices have large, dark, crowded nuclei;
    planted.csv says which (its paths are relative to patches/). Colour, light
    and focus vary by case and slice, independently of the class. An AUC here
    proves only the machinery.

    Args:
        folder: New, empty, or a demo folder of the same seed (which is left as it is).
        seed: Source of chance; the same seed gives the same bytes.

    Returns:
        The cohort.

    Raises:
        CohortError: The folder holds something else, or scikit-image lacks its image.
    """
    marker = {"featstore_demo": VERSION, "seed": seed}
    if _is_complete(folder, marker):
        return _read(folder)
    tissue = load_tissue()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps({**marker, "complete": False}) + "\n", encoding="utf-8")
    cases = _draw_cases(np.random.default_rng([VERSION, seed]))
    rows = [row for case in cases for row in _write_case(folder, case, tissue, seed)]
    _write_csv(folder / "planted.csv", COLUMNS, rows)
    _write_csv(folder / "labels.csv", ("Case", "Class"), [(case.case_id, case.code) for case in cases])
    (folder / MARKER).write_text(json.dumps({**marker, "complete": True}) + "\n", encoding="utf-8")
    return _read(folder)


def _is_complete(folder: Path, marker: dict[str, int]) -> bool:
    """Whether the same cohort is here; an unfinished one may be written again, nothing else may."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = "something that is not a demo cohort"
    try:
        there = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if {key: there[key] for key in marker} == marker:
            return bool(there["complete"]) and (folder / "planted.csv").is_file()
        found = f"the demo cohort of seed {there['seed']}, version {there['featstore_demo']}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CohortError(
        f"the demo's folder already holds {found}",
        expected=f"a new or empty folder, or the demo of seed {marker['seed']}, version {VERSION}",
        where=str(folder),
        fix="name another folder, or delete this one if nothing in it is needed",
    )


def _read(folder: Path) -> DemoCohort:
    with (folder / "planted.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = tuple(folder / "patches" / row["path"] for row in rows)
    return DemoCohort(folder, len(paths), len({row["case_id"] for row in rows}), paths)


def _draw_cases(rng: np.random.Generator) -> list[_Case]:
    """Ids with gaps, classes in random order, and five cases without one of the stains."""
    total = N_BENIGN + N_HIGH_GRADE
    ids = np.sort(rng.choice(np.arange(1, 120), total, replace=False))
    high = set(rng.choice(total, N_HIGH_GRADE, replace=False).tolist())
    benign = [number for number in range(total) if number not in high]
    lacking = [
        *rng.choice(benign, BENIGN_LACKING, replace=False),
        *rng.choice(sorted(high), HIGH_GRADE_LACKING, replace=False),
    ]
    lacks = {int(number): STAINS[int(rng.integers(len(STAINS)))] for number in lacking}
    codes = ["1" if number not in high else str(rng.choice(["3", "4"])) for number in range(total)]
    return [_Case(n, str(ids[n]), codes[n], lacks.get(n)) for n in range(total)]


def _write_case(
    folder: Path, case: _Case, tissue: Tissue, seed: int
) -> Iterator[tuple[str, str, str, str, int, int]]:
    """Write one case's patches; yields its rows of planted.csv."""
    # Chance for the planting has a stream of its own, so that everything else is drawn
    # the same way whatever the class.
    neutral = np.random.default_rng([VERSION, seed, case.number, 0])
    planting = np.random.default_rng([VERSION, seed, case.number, 1])
    planted_slices = _draw_planted(case, planting)
    of_case = Look.draw(neutral)
    patches = folder / "patches"
    for stain in case.stains:
        place = Path(case.case_id, stain)
        (patches / place).mkdir(parents=True, exist_ok=True)
        for slice_id in SLICES:
            look = Look.draw(neutral, around=of_case)
            count = int(neutral.integers(4, 13))
            third = max(2, round(count / 3))
            chosen = set(planting.choice(count, third, replace=False).tolist())
            for index in range(count):
                planted = (stain, slice_id) in planted_slices and index in chosen
                image = _draw_patch(tissue, stain, look, neutral, planting if planted else None)
                file = place / f"case_{case.case_id}_{slice_id}_{stain}_patch{index + 1}.png"
                image.save(patches / file, compress_level=1)
                yield file.as_posix(), case.case_id, stain, slice_id, index + 1, int(planted)


def _draw_planted(case: _Case, rng: np.random.Generator) -> set[tuple[str, str]]:
    """Slices of a high-grade case that get planted patches: one or two in each of two stains."""
    if case.code == "1":
        return set()
    stains = rng.choice(case.stains, 2, replace=False)
    return {
        (str(stain), str(slice_id))
        for stain in stains
        for slice_id in rng.choice(SLICES, int(rng.integers(1, 3)), replace=False)
    }


def _draw_patch(
    tissue: Tissue, stain: str, look: Look, rng: np.random.Generator, planting: np.random.Generator | None
) -> Image.Image:
    """One patch of 48 to 128 px; one in twelve is a turned square with black corners."""
    turned = rng.random() < 1 / 12
    width = int(rng.integers(48, 89 if turned else 129))
    height = width if turned or rng.random() < 0.6 else int(rng.integers(48, 129))
    angle = float(rng.uniform(15, 75))
    part = tissue.crop(rng, width, height)
    image = paint(part if planting is None else crowd(part, tissue.nuclei, planting), stain, look)
    return image.rotate(angle, Image.Resampling.BICUBIC, expand=True) if turned else image


def _write_csv(file: Path, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
