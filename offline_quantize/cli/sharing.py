"""The commands that make a packed checkpoint ready for others: `precalib card` and `push`."""

from pathlib import Path
from typing import Annotated

import typer

from offline_quantize.cli import console
from offline_quantize.commands.push import push as run_push
from offline_quantize.commands.verify import workload


def card(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="Result of precalib eval --json; repeatable."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Id of the source on the Hub, if it is not known."),
    ] = None,
    license_id: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence of the source, as the Hub names it."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a README.md that somebody else wrote.")
    ] = False,
) -> None:
    """Write the model card anew: README.md with recipe, size, evaluations, source and licence."""
    from offline_quantize.report.card import rewrite_card

    rewrite_card(
        directory,
        evaluations=evaluations or (),
        base_model=base_model,
        license_id=license_id,
        force=force,
    )
    console.out.print(f"Card: {directory / 'README.md'}")


def push(
    directory: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hugging Face Hub.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    branch: Annotated[
        str | None, typer.Option(help="Branch to write to; main if not given.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Verify a packed checkpoint and upload it to the Hugging Face Hub in one commit."""
    with console.progress_bar(workload(directory, None)) as progress:
        address = run_push(
            directory, repository, progress, private=private, branch=branch, message=message
        )
    console.out.print(f"Uploaded: {address}")
