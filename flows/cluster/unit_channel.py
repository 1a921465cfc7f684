"""The process of a stage hands its units to the process of the run, which keeps one engine for all stages.

DVC runs every stage in a process of its own. An engine for each would mean workers for each, which import everything again; so a
stage asks the run for its engine, over a socket in a folder that only this user may enter. Messages in their order:

    stage → run    its `threads`                       run → stage    how many units are in work at once
    stage → run    MACHINE, if it computes             run → stage    what a worker computes with
    stage → run    units by name; the run need         run → stage    (name, files) of a finished one
                   not know what is packed in them
    stage → run    MORE                                run → stage    the next one; None after the last
    stage → run    None, or why it failed

An exception can take the place of an answer; the stage raises it. If either process ends, the other gives its work up.
"""

import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import copy_context
from multiprocessing.connection import Client, Connection, Listener

from fisherfold.run.engine import Engine, Files, Unit
from fisherfold.run.errors import EngineError, FisherfoldError
from flows.surroundings import socket_folder

MORE = "more"
MACHINE = "machine"


class RunEngine:
    """In a stage's process: the engine of its run; see `fisherfold.run.engine.Engine`.

    Raises:
        EngineError: the run has ended; and whatever its engine raises.
    """

    def __init__(self, connection: Connection, stage: str, threads: int | None) -> None:
        self._connection, self._stage = connection, stage
        self.slots = self._request(threads)

    def machine(self) -> dict[str, str]:
        return self._request(MACHINE)

    def run(self, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> Iterator[tuple[str, Files]]:
        """See `fisherfold.run.engine.Engine.run`; units are packed and sent to the run."""
        packed = {name: Unit(write_packed, (pickle.dumps((write, unit)),), unit.after) for name, unit in units.items()}
        finished = self._request(packed)
        while finished is not None:
            yield finished
            finished = self._request(MORE)

    def _request(self, what: object):
        try:
            self._connection.send(what)
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise EngineError(
                f"Stage {self._stage!r}: the run that it belongs to has ended. Finished units are kept; run again to go on."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def write_packed(name: str, unit: Unit) -> Files:
    """On a worker: unpack a unit with the function that writes it, and write it."""
    write, unpacked = pickle.loads(unit.arguments[0])
    return write(name, unpacked)


@contextmanager
def engine_of_run(address: str, stage: str, threads: int | None) -> Iterator[RunEngine]:
    """In a stage's process: the engine of the run at `address`, which is told how the block ends.

    Raises:
        EngineError: see `RunEngine`.
    """
    with Client(address) as connection:
        try:
            yield RunEngine(connection, stage, threads)
        except Exception as error:
            with suppress(ConnectionError):
                connection.send(f"{type(error).__name__}: {error}")
            raise
        with suppress(ConnectionError):
            connection.send(None)


def answer(connection: Connection, engine: Engine) -> None:
    """In the run's process: give a stage's units to `engine` until the stage ends.

    Raises:
        EOFError, ConnectionError: the stage's process has ended before its work.
        FisherfoldError: the stage failed; and whatever the engine raises.
    """
    connection.send(engine.slots)
    while isinstance(request := connection.recv(), dict) or request == MACHINE:
        if request == MACHINE:
            connection.send(engine.machine())
            continue
        for finished in engine.run(write_packed, request):
            connection.send(finished)
            connection.recv()
        connection.send(None)
    if request is not None:
        raise FisherfoldError(request)


@contextmanager
def taking_units(take: Callable[[Connection, int | None], None]) -> Iterator[str]:
    """In the run's process: the address at which a stage, if one comes, may hand over its units.

    Args:
        take: called with the connection to it and its `threads`, in a thread that has the context variables of this one; that
            thread has ended when the block has. What it raises, the stage raises.
    """
    with socket_folder() as folder, Listener(str(folder / "units"), family="AF_UNIX") as listener:
        thread = threading.Thread(target=copy_context().run, args=(_await_stage, listener, take), daemon=True)
        thread.start()
        try:
            yield listener.address
        finally:
            Client(listener.address).close()  # no stage came: the thread waits no longer
            thread.join()


def _await_stage(listener: Listener, take: Callable[[Connection, int | None], None]) -> None:
    with listener.accept() as connection, suppress(EOFError, ConnectionError):
        threads = connection.recv()
        try:
            take(connection, threads)
        except Exception as error:
            connection.send(error)
