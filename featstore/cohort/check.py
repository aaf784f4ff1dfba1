"""What is in the cohort, what was left out and why, and what looks wrong before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from featstore.cohort.colors import ColorVerdict, Rgb, contact_sheet, judge
from featstore.cohort.composition import Caps, classes_of, composition, unused
from featstore.cohort.labels import Labels
from featstore.cohort.names import natural_sorted, normalize_case
from featstore.cohort.patches import Scan
from featstore.cohort.report import CohortReport, shorten
from featstore.cohort.tables import printable
from featstore.config import ImagesConfig
from featstore.errors import FeatstoreError

SMALL_SIDE = 32  # px; below this the backbones' strides leave nothing
BLACK_MEAN = 30.0  # mean of all channels (8-bit) of a patch that is corner and no tissue
# A patch is glass if it has next to no colour and few grey levels. Pale immunostains have
# a tissue fraction of 0 too, but 4.6 bits and more; glass has 1.5 to 1.9.
BLANK_TISSUE = 0.05
BLANK_ENTROPY = 3.5
# Variance of the Laplacian. Real tissue as scanned: 380 and more; blurred by a Gaussian of
# σ = 1 px: medians of 44 and more, σ = 2: of 4 to 18, σ = 4: of 1.7 to 3.1.
BLURRED_SHARPNESS = 25.0
_SCORED_SIDE = 512  # px; larger patches are thinned out to this before colours are judged
_EXAMPLES = 5

Json = dict[str, Any]


def check_cohort(
    scan: Scan,
    labels: Labels | None,
    groups: Mapping[str, str] | None,
    images: ImagesConfig,
    *,
    caps: Caps | None = None,
    quality: pd.DataFrame | None = None,
    sample: int = 64,
    seed: int = 0,
) -> CohortReport:
    """Report on a cohort, decoding only a sample of its patches.

    Args:
        scan: The patch table and what was found besides.
        labels: None where there are none yet: every case then counts.
        groups: Case → group, or None.
        images: How files are decoded; a file that cannot be is counted, not raised.
        caps: What training is going to draw, or None.
        quality: Stored quality columns, one row a patch (`width, height, mean_red, mean_green,
            mean_blue, entropy, tissue_fraction, sharpness`; any may be missing), or None.
        sample: About how many patches to decode in all, spread evenly over the stains.
        seed: Decides which.

    Returns:
        The report.
    """
    table = scan.table
    class_of = classes_of(table, labels)
    decoded, failed, sizes = _sample(scan, images, sample, seed)
    verdicts = {stain: judge(stain, patches) for stain, patches in decoded.items()}
    if quality is not None and {"width", "height"} <= set(quality.columns):
        sizes = quality[["width", "height"]].to_numpy(dtype=float)
    data: Json = {
        "folder": printable(str(scan.folder)),
        **composition(table, class_of, labels),
        "left_out": _left_out(scan, labels, groups or {}),
        **_found(scan, labels),
        "sizes": _sizes(sizes),
        "sample": {
            "decoded": sum(map(len, decoded.values())),
            "failed": len(failed),
            "failures": failed[:_EXAMPLES],
        },
        "colors": {stain: _color(verdict) for stain, verdict in verdicts.items()},
        "quality": None if quality is None else _quality(quality),
        "caps": None if caps is None else unused(table, class_of, caps),
    }
    return CohortReport(
        data=data,
        warnings=_warnings(data, verdicts, images),
        unparsed=scan.unparsed,
        sheet=contact_sheet(decoded, verdicts) if any(decoded.values()) else None,
    )


def _found(scan: Scan, labels: Labels | None) -> Json:
    """What reading names, ids and positions came across."""
    from_labels = labels.normalized if labels is not None else {}
    return {
        "normalized": {
            kind: {**scan.normalized.get(kind, {}), **from_labels.get(kind, {})}
            for kind in ("case", "slice", "stain", "class")
        },
        "merged": scan.merged,
        "unparsed": {
            "count": len(scan.unparsed),
            "by_reason": dict(Counter(item.reason for item in scan.unparsed).most_common()),
            "examples": [item.path for item in scan.unparsed[:_EXAMPLES]],
        },
        "ignored": {printable(suffix): count for suffix, count in scan.ignored.items()},
        "links_skipped": [printable(path) for path in scan.links_skipped],
        "broken_links": [printable(path) for path in scan.broken_links],
        "geometry": {
            "rows_without_patch": scan.geometry_unmatched,
            "patches_without_row": scan.geometry_missing,
        },
    }


def _color(verdict: ColorVerdict) -> Json:
    score = None if np.isnan(verdict.score) else round(verdict.score, 3)
    return {"verdict": verdict.verdict, "score": score, "patches": verdict.patches}


def _left_out(scan: Scan, labels: Labels | None, groups: Mapping[str, str]) -> Json:
    cases = set(map(str, scan.table["case_id"].cat.categories))
    given = scan.unknown_exclusions
    excluded = {*scan.excluded, *given, *map(normalize_case, given)}
    known = {*labels.by_case, *labels.unmapped} if labels is not None else cases
    return {
        "cases_without_label": natural_sorted(cases - known),
        "labels_without_patches": natural_sorted(known - cases - excluded),
        "unmapped": {c: labels.unmapped[c] for c in natural_sorted(cases & set(labels.unmapped))}
        if labels
        else {},
        "excluded": natural_sorted(scan.excluded),
        "excluded_patches": scan.excluded_patches,
        "unknown_exclusions": natural_sorted(scan.unknown_exclusions),
        "grouped_without_patches": natural_sorted(set(groups) - cases - excluded),
        "groups": len({groups[case] for case in cases & set(groups)}),
    }


def _sample(
    scan: Scan, images: ImagesConfig, count: int, seed: int
) -> tuple[dict[str, list[Rgb]], list[str], np.ndarray[Any, np.dtype[np.float64]]]:
    """Decoded patches by stain, failures, and (n, 2) width and height from the headers."""
    from featstore.images import check_header, check_size, decode

    random = np.random.default_rng(seed)
    codes = scan.table["stain"].cat.codes.to_numpy()
    stains = [str(stain) for stain in scan.table["stain"].cat.categories]
    decoded: dict[str, list[Rgb]] = {}
    failed: list[str] = []
    sizes: list[tuple[int, int]] = []
    for code, stain in enumerate(stains):
        rows = np.flatnonzero(codes == code)
        chosen = random.choice(rows, min(len(rows), -(-count // len(stains))), replace=False)
        decoded[stain] = []
        for path in scan.table["path"].iloc[np.sort(chosen)]:
            try:
                file = scan.folder / path
                header = check_header(file, path, images.max_pixels)
                sizes.append((header.width, header.height))
                check_size(file.stat().st_size, images.max_pixels, path)
                data = file.read_bytes()
                pixels = decode(data, path, images.channel_order, images.max_pixels).pixels
            except OSError as error:
                failed.append(printable(f"{path}: {error.strerror or error}"))
            except FeatstoreError as error:
                found = error.found if path in error.found else f"{path}: {error.found}"
                failed.append(printable(found))
            else:
                step = -(-max(pixels.shape[:2]) // _SCORED_SIDE)
                decoded[stain].append(np.ascontiguousarray(pixels[::step, ::step]))
    return decoded, failed, np.array(sizes, dtype=np.float64).reshape(-1, 2)


def _sizes(sizes: np.ndarray[Any, np.dtype[np.float64]]) -> Json | None:
    if not len(sizes):
        return None
    side, short = sizes.max(axis=1), sizes.min(axis=1)
    return {
        "patches": len(sizes),
        "min_side": int(short.min()),
        "median_side": float(np.median(side)),
        "max_side": int(side.max()),
        "not_square": float((side != short).mean()),
        "below_32": int((short < SMALL_SIDE).sum()),
    }


def _quality(quality: pd.DataFrame) -> Json:
    """Counts of blank, black and blurred patches; a measure without its columns counts nothing."""
    nothing = pd.Series(np.nan, index=quality.index)
    columns = [c for c in ("mean_red", "mean_green", "mean_blue") if c in quality]
    mean = quality[columns].mean(axis=1) if len(columns) == 3 else nothing
    black = mean < BLACK_MEAN
    pale = quality.get("tissue_fraction", nothing) < BLANK_TISSUE
    blank = pale & (quality.get("entropy", nothing) < BLANK_ENTROPY)
    blurred = quality.get("sharpness", nothing) < BLURRED_SHARPNESS
    flags = {"black": black, "blank": blank & ~black, "blurred": blurred & ~blank & ~black}
    result: Json = {"patches": len(quality)}
    for name, flag in flags.items():
        result[name] = int(flag.sum())
        if "path" in quality:
            result[f"{name}_examples"] = [printable(str(p)) for p in quality["path"][flag][:_EXAMPLES]]
    return result


def _warnings(data: Json, verdicts: Mapping[str, ColorVerdict], images: ImagesConfig) -> list[str]:
    left, count, merged = data["left_out"], data["unparsed"]["count"], data["merged"].get("case", {})
    geometry, sample, quality = data["geometry"], data["sample"], data["quality"] or {}
    named = (
        ("cases without a label", left["cases_without_label"]),
        ("labels without patches", left["labels_without_patches"]),
        ("cases whose class is in no entry of `classes`", left["unmapped"]),
        ("exclusions that match no case", left["unknown_exclusions"]),
        ("groups name cases without patches", left["grouped_without_patches"]),
        ("case ids spelt in several ways", [" = ".join(found) for found in merged.values()]),
        ("cases that lack a stain", data["missing_stains"]),
        ("links not followed", data["links_skipped"]),
        ("links that lead nowhere", data["broken_links"]),
        ("sampled files that cannot be decoded", sample["failures"]),
    )
    sizes = data["sizes"] or {}
    source = "embedded so far" if quality else "sampled"
    counted = (
        (count, "file names that could not be read are left out (unparsed.csv)"),
        (geometry["rows_without_patch"], "rows of the geometry CSV match no patch"),
        (geometry["patches_without_row"], "patches have no row in the geometry CSV"),
        (
            sizes.get("below_32", 0),
            f"of {sizes.get('patches', 0):,} patches {source} have a side below {SMALL_SIDE} px",
        ),
        *(
            (quality.get(kind, 0), f"of {quality.get('patches', 0):,} patches embedded so far look {kind}")
            for kind in ("blank", "black", "blurred")
        ),
    )
    return [
        *(f"{title}: {shorten(items)}" for title, items in named if items),
        *(f"{n:,} {text}" for n, text in counted if n),
        *(
            f"class '{name}' has no cases with patches"
            for name, n in data["classes"].items()
            if not n["cases"]
        ),
        *_color_warning(verdicts, images),
    ]


def _color_warning(verdicts: Mapping[str, ColorVerdict], images: ImagesConfig) -> list[str]:
    bad = [stain for stain, verdict in verdicts.items() if verdict.verdict == "swapped"]
    if not bad:
        return []
    other = "rgb" if images.channel_order == "bgr" else "bgr"
    text = f"red and blue look swapped in {', '.join(bad)}: look at contact_sheet.png; if so, "
    if any(verdict.verdict == "natural" for verdict in verdicts.values()):
        # A verdict is a hint; a red chromogen can look natural either way.
        return [
            text.removesuffix("if so, ")
            + f"if the lower row is right for every stain, --channel-order {other}; "
            "if for some, save those files again"
        ]
    return [text + f"--channel-order {other}"]
