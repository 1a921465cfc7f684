"""The command `fisherfold`: its commands, its exit status, and what becomes of errors and interruptions."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

from typer import Context, Exit, Option, Typer
from typer.core import TyperGroup

from fisherfold.run.errors import FisherfoldError, ParameterError
from flows.commands import looking, running, store, using
from flows.machine_errors import cure

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 well, 1 failed, 2 bad command line or parameters, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without our signs ends nothing
    try:
        app(args=arguments, prog_name="fisherfold")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Commands(TyperGroup):
    """What a command returns is the exit status; an error that is the user's to read is told in one line."""

    def invoke(self, context: Context) -> Any:
        signals: list[int] = []
        try:
            with _noting(signals):
                status = super().invoke(context)
        except Exception as error:
            if not signals:
                raise Exit(_explain(error)) from None
        except KeyboardInterrupt:
            pass
        else:
            raise Exit(status or 0)
        from fisherfold.run.progress import WATCHED

        if WATCHED not in os.environ:  # else the run that started this process says so itself
            print("interrupted: finished units are kept; run again to go on.", file=sys.stderr)
        raise Exit(INTERRUPTED)


@contextmanager
def _noting(signals: list[int]) -> Iterator[None]:
    """Inside, a request to end is what Ctrl-C is: what was started is ended, what is finished is kept.

    It is noted, for an interruption inside some libraries' compiled code comes out as another exception.
    """

    def interrupt(received: int, _: object) -> NoReturn:
        signals.append(received)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: Exception) -> int:
    """Tell the user of an error that is theirs to read; any other goes on."""
    if isinstance(error, FisherfoldError):
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParameterError) else 1
    told = cure(error)
    if told is None:
        raise error
    print(f"error: {told}", file=sys.stderr)
    return 1


app = Typer(
    cls=Commands,
    help="Low-rank compression of language models, weighted by the Fisher information.",
    rich_markup_mode=None,  # rich would double the time of `--help`
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fisherfold {version('fisherfold')}")
        raise Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Low-rank compression of language models, weighted by the Fisher information."""


for command in (
    running.run,
    running.sweep,
    running.serve,
    running.stage,
    running.check,
    looking.status,
    looking.plan,
    looking.doctor,
    using.compare,
    using.verify,
    using.chat,
    using.export,
    using.report,
):
    app.command()(command)
app.add_typer(store.store, name="store")


if __name__ == "__main__":
    sys.exit(main())
