"""Commands on a study that exists: serve its page, read its votes, go to Mechanical Turk and back."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from capo.cli.messages import refused
from capo.errors import InputError
from capo.runtime.files import check_inside
from capo.runtime.options import whole_number
from capo.runtime.terminal import Terminal, printable

COMMANDS = ("serve", "results", "export", "import")
MTURK = "mturk"  # in a study's folder, what is exported for Mechanical Turk
HOST, PORT = "127.0.0.1", 7860
FAILURES = 1  # attention checks that a rater may fail


def arguments(command: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m capo.cli.study", description="Commands on a study's folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve the page again, without loading a model")
    serve.add_argument("folder", type=Path)
    serve.add_argument("--host", default=HOST)
    serve.add_argument("--port", type=whole_number(0, 65535), default=PORT, help="0: any free one")
    results = commands.add_parser(
        "results", help="print and write what the votes say, one table for all studies"
    )
    results.add_argument("folders", type=Path, nargs="+", metavar="folder")
    results.add_argument(
        "--failures",
        type=whole_number(0),
        default=FAILURES,
        help=f"attention checks that a rater may fail, default {FAILURES}; the others' votes do not count",
    )
    results.add_argument("--to", type=Path, help="folder of the table; by default the first study's")
    export = commands.add_parser("export", help="write pairs, images and a template for Mechanical Turk")
    export.add_argument("folder", type=Path)
    export.add_argument("--images-at", required=True, help="https address where images/ will be uploaded")
    export.add_argument("--to", type=Path, help="folder for the files; by default mturk/ in the study's")
    read = commands.add_parser("import", help="record the votes of Mechanical Turk's results")
    read.add_argument("folder", type=Path)
    read.add_argument("file", type=Path)
    return parser.parse_args(command)


def main(command: Sequence[str]) -> int:
    """Run one of the commands; return the exit code."""
    options = arguments(command)
    try:
        {"serve": _serve, "results": _results, "export": _export, "import": _import}[options.command](options)
    except Exception as error:
        return refused(error)
    return 0


def serve(study, host: str, port: int) -> None:
    """Serve the page of an open study until Ctrl-C; then close the study and print the number of votes."""
    from capo.evaluation.study.server import StudyServer

    with study, StudyServer(study, host, port) as server:
        told = [
            f"study: {server.address} (each rater: {server.address}?rater=NAME); Ctrl-C ends",
            f"votes: {study.path}",
            f"the same page without a model: python -m capo.cli.study serve {study.folder}",
        ]
        if not server.loopback:
            told.append(f"study.host={host}: whoever reaches this address sees the images and may vote")
        print(printable("\n".join(told)), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            counts = ", ".join(f"{rater} {count}" for rater, count in study.counts().items()) or "none"
            print(printable(f"\nvotes by rater, checks included: {counts}"))


def _serve(options: argparse.Namespace) -> None:
    from capo.evaluation.study.store import Study

    serve(Study(options.folder), options.host, options.port)


def _given_folder(options: argparse.Namespace, default: Path) -> Path:
    """Folder that --to names, or else `default`. Raises InputError for what is no folder."""
    if options.to is not None and options.to.exists() and not options.to.is_dir():
        raise InputError(f"--to {options.to}: it is no folder; give one, or a name that is free")
    return options.to or default


def _results(options: argparse.Namespace) -> None:
    from capo.evaluation.study.analysis import study_results
    from capo.evaluation.study.store import open_studies
    from capo.evaluation.study.tables import console_tables, with_holm, write_studies, write_study

    target = _given_folder(options, options.folders[0])
    with open_studies(options.folders) as studies:
        found = with_holm([study_results(study, options.failures) for study in studies])
    for folder, study in zip(options.folders, found, strict=True):
        write_study(folder, study)
    told = ["results", *map(str, options.folders), "--failures", str(options.failures)]
    command = f"python -m capo.cli.study {shlex.join(told)}"
    files = write_studies(target, found, command)
    console = Terminal()
    for table in console_tables(found):
        console.print(table)
    console.print(f"the table as a page, as CSV and for LaTeX: {', '.join(map(str, files))}", soft_wrap=True)


def _export(options: argparse.Namespace) -> None:
    from capo.evaluation.study.store import Study
    from capo.evaluation.study.turk import export

    if options.to is None:
        check_inside(options.folder, [MTURK])
    with Study(options.folder) as study:
        files = export(study, _given_folder(options, options.folder / MTURK), options.images_at)
    print(printable(f"for Mechanical Turk: {', '.join(map(str, files))}; upload the images first"))


def _import(options: argparse.Namespace) -> None:
    from capo.evaluation.study.store import Study
    from capo.evaluation.study.turk import import_results

    with Study(options.folder) as study:
        found = import_results(study, options.file)
    print(printable(f"{found.votes} votes recorded, {found.rejected} rejected assignments left out"))
