"""The commands for what a run has made: compare, verify, chat, export, report."""

import json as json_text
import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

from fisherfold.run.errors import CorruptArtifact
from flows.commands.options import Json, project_here, workspace_here

RunName = Annotated[str | None, Argument(metavar="RUN", help="Its number, a folder or metrics.json, a DVC experiment.")]


def compare(first: RunName = None, second: RunName = None, json: Json = False) -> int:
    """Compare two runs: what differs in their parameters and figures (default: the last two)."""
    if first and not second:
        raise BadParameter("Name two runs, or none for the last two.")
    from flows.compare import compare as compare_runs
    from flows.compare import print_comparison
    from flows.history import find_run, last_two

    workspace = project_here() if first else workspace_here()
    names = (first, second) if first and second else last_two(workspace_here())
    found = compare_runs(*(find_run(workspace, name) for name in names))
    if json:
        print(json_text.dumps(found, indent=1))
    else:
        print_comparison(found)
    return 0


def verify(
    model: Annotated[Path | None, Argument(metavar="FOLDER", help="A model's; default: all of artifacts/.")] = None,
) -> int:
    """Check digests and lineage of artifacts/, or of a model folder alone."""
    from flows.verify import print_model, print_outputs

    return print_model(model) if model else print_outputs(workspace_here())


def chat(
    model: Annotated[
        Path | None, Argument(metavar="FOLDER", help="Of a compressed model; default: this project's.")
    ] = None,
    dense: Annotated[str | None, Option(metavar="MODEL", help="What it was made from: a folder or a hub name.")] = None,
    prompt: Annotated[list[str], Option(metavar="TEXT", help="Answer this and end; again for more.")] = [],  # noqa: B006
    tokens: Annotated[int, Option(min=1, help="Of an answer, at most.")] = 128,
) -> int:
    """Ask the dense and the compressed model the same, and see both answers side by side."""
    workspace = project_here()
    folder = model or workspace_here().out("factorize") / "model"
    if not folder.is_dir():
        raise CorruptArtifact(f"{folder} is not there. Make it: fisherfold run")
    from flows.chat import chat as chat_with
    from flows.chat import typed_prompts
    from flows.verbosity import silence_libraries

    silence_libraries()
    if not prompt and sys.stdin.isatty():
        print("Type a prompt; an empty line ends it.")
    return chat_with(folder, dense, workspace, iter(prompt) if prompt else typed_prompts(), tokens)


def export(
    form: Annotated[
        Literal["dense", "gguf"], Argument(help="An ordinary Hugging Face folder, or a file for llama.cpp.")
    ],
    target: Annotated[Path, Argument(metavar="TARGET", help="What to write; it must not exist.")],
    model: Annotated[
        Path | None, Option(metavar="FOLDER", help="Of a compressed model; default: this project's.")
    ] = None,
) -> int:
    """Write the compressed model multiplied out, for tools that know dense models alone."""
    folder = model or workspace_here().out("factorize") / "model"
    if not folder.is_dir():
        raise CorruptArtifact(f"{folder} is not there. Make it: fisherfold run")
    from fisherfold.export.multiplied_out import export as write
    from flows.verbosity import silence_libraries

    silence_libraries()
    write(folder, target, form)
    print(f"{target}: as large and as slow as the dense model, with the compressed one's answers")
    return 0


def report(show: Annotated[bool, Option("--open/--no-open", help="Open it in a browser.")] = True) -> int:
    """Open the report of the last run, and print where it lies."""
    workspace = workspace_here()
    if not (workspace.out("report") / "index.html").exists():
        raise CorruptArtifact(f"{workspace.root} holds no finished run. Make one: fisherfold run")
    from flows.report_page import write_page

    page = write_page(workspace)
    print(page)
    if show:
        import webbrowser

        if not webbrowser.open(page.as_uri()):
            print("No browser could be started here: open the file yourself.", file=sys.stderr)
    return 0
