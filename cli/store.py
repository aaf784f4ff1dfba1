"""Commands about the store: info, verify, repair, gc, rm, import, export."""

from __future__ import annotations

from pathlib import Path

import typer

from cli.line import command
from featstore.errors import ConfigError
from featstore.flags import Call
from heads.config import Config


@command(("store",))
def info(call: Call[Config]) -> None:
    """Say what the store holds: cohort, backbone, sizes, stains."""
    from featstore.store import Store
    from featstore.store.summary import summarize

    summary = summarize(Store.open(call.project / call.config.store.path))
    call.answer(summary)


@command(("store",))
def verify(
    call: Call[Config],
    quick: bool = typer.Option(False, "--quick", help="only records, and that every part is there"),
    full: bool = typer.Option(False, "--full", help="also hash every byte of every part"),
    subset: str | None = typer.Option(None, help="n/t, n from 0: a share of the cases, e.g. one a night"),
    csv: Path | None = typer.Option(None, help="write what is found to this table"),
) -> None:
    """Look for damage in the store; exit code 1 if there is any. Changes nothing."""
    from featstore.progress import CaseBar
    from featstore.store.verify import verify as verify_store

    if quick and full:
        raise ConfigError("--quick and --full at once", expected="one of them", where="verify")
    level = "quick" if quick else "full" if full else "default"
    with CaseBar() as bar:
        report = verify_store(call.project / call.config.store.path, level, subset, bar.update)
    if csv is not None:
        report.write_csv(csv)
    call.answer(report)
    raise typer.Exit(report.exit_code)


@command(("store",))
def repair(
    call: Call[Config],
    quick: bool = typer.Option(False, "--quick", help="look only at records and sizes of parts"),
    apply: bool = typer.Option(False, "--apply", help="do it; otherwise only say what would be done"),
) -> None:
    """Move what is damaged to quarantine, so that `extract` computes just that again."""
    from featstore.progress import CaseBar
    from featstore.store.maintenance import repair as repair_store

    with CaseBar() as bar:
        path, level = call.project / call.config.store.path, "quick" if quick else "full"
        report = repair_store(path, apply, level, bar.update)
    call.answer(report)
    raise typer.Exit(report.exit_code)


@command(("store",))
def gc(
    call: Call[Config],
    apply: bool = typer.Option(False, "--apply", help="remove; otherwise only count"),
    grace: float = typer.Option(24.0, min=0, help="hours; keep what was needed or written since then"),
    quarantine: bool = typer.Option(False, "--quarantine", help="also remove what lies in quarantine"),
) -> None:
    """Remove old records, and the files that no recent record names."""
    from featstore.progress import CaseBar
    from featstore.store.maintenance import gc as collect

    with CaseBar() as bar:
        path = call.project / call.config.store.path
        report = collect(path, grace * 3600, apply, quarantine, bar.update)
    call.answer(report)


@command(("store",))
def rm(
    call: Call[Config],
    case: list[str] = typer.Option([], help="id of a case; may be given several times"),
    stain: list[str] = typer.Option([], help="only this stain; may be given several times"),
    slices: list[str] = typer.Option([], "--slice", help="only this slice; may be given several times"),
    apply: bool = typer.Option(False, "--apply", help="do it; otherwise only count"),
) -> None:
    """Take embeddings out of the store, by case, stain and slice."""
    from featstore.store.maintenance import rm as remove

    call.answer(remove(call.project / call.config.store.path, case, stain, slices, apply))


def _is_checkpoint(source: Path) -> bool:
    """Whether torch would have saved a model under this name; features of a cohort are no single file."""
    return source.suffix.lower() in (".pth", ".pt", ".ckpt", ".tar") and not source.is_dir()


@command(("imports", "store", "labels"), in_project=None)
def import_(
    call: Call[Config],
    source: Path = typer.Argument(
        ..., help="folder of features of another tool, a table of bags, or a checkpoint (.pth, .pt, .ckpt)"
    ),
) -> None:
    """Take the features of CLAM, TRIDENT, STAMP, slideflow, torchmil, a table, or of one .pt a patch.

    Or a checkpoint of a lab's own hierarchical trainer, as a run: --load-splits FILE says which are its
    test cases.
    """
    if call.config.imports.source_format == "auto" and _is_checkpoint(source):
        from heads.imported import import_checkpoint

        call.answer(import_checkpoint(call.config, call.project, source, call.tell))
        return
    from featstore.interop.project import import_project
    from featstore.progress import CaseBar

    with CaseBar("bags") as bar:
        report = import_project(call.config, call.project, source, bar.update)
    call.answer(report)


@command(("store", "labels", "split"))
def export(
    call: Call[Config],
    folder: Path = typer.Argument(..., help="new folder to write to"),
    by: str = typer.Option("slice", help="slice | case: what becomes one of CLAM's slides"),
) -> None:
    """Write embeddings, labels and splits in CLAM's layout."""
    from featstore.interop.project import export_project
    from featstore.progress import CaseBar

    with CaseBar() as bar:
        report = export_project(call.config, call.project, folder, by, bar.update)
    call.answer(report)
