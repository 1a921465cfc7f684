"""One stage brought up to date through DVC, as a Prefect task: what it says, how it ended, and whether it was computed at all."""

import time
from collections import deque
from contextlib import suppress

from httpx import HTTPError
from prefect import State, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from fisherfold.run.files import MANIFEST, digest_file
from fisherfold.run.progress import announce, is_quiet
from fisherfold.run.workspace import STAGES, Workspace
from flows.artifacts import StageProgress, announce_event, show_results
from flows.engine_choice import offered_engine
from flows.staleness import reproduce, stale_reasons, summary
from flows.time_left import TimeLeft
from flows.watch import Stopped

CANCEL_INTERVAL = 5.0  # seconds between questions to Prefect whether the run is to be cancelled
LAST_WORDS = 30  # lines of a stage that failed without an error of its own
CACHED, RESTORED = "Cached", "Restored"


class StageView:
    """Shows in Prefect what the process of a stage does, and tells it when the run is cancelled there.

    Attributes:
        began: whether the stage itself runs; DVC restores what it computed before without it.
        error: what it said of its failure.
        last: its last lines.
    """

    def __init__(self, stage: str, time_left: TimeLeft | None) -> None:
        self.began, self.error = False, ""
        self.last: deque[str] = deque(maxlen=LAST_WORDS)
        self._log = get_run_logger()
        self._progress = StageProgress(stage)
        self._asked = time.monotonic()
        self._run = FlowRunContext.get().flow_run.id
        self._time_left = time_left

    def line(self, text: str) -> None:
        failed = text.lower().startswith("error")
        self.error = text.partition(":")[2].strip() if failed else self.error
        self.last.append(text)
        (self._log.error if failed else self._log.info)(text)

    def progress(self, entry: dict) -> None:
        self.began = True
        if "total" in entry:
            with suppress(HTTPError):  # an API that is away for a moment stops no computation
                self._progress.show(entry)

    def cancelled(self) -> bool:
        if self._time_left:
            self._time_left.look()
        if time.monotonic() - self._asked < CANCEL_INTERVAL:
            return False
        self._asked = time.monotonic()
        with suppress(HTTPError), get_client(sync_client=True) as client:
            state = client.read_flow_run(self._run).state
            return state is not None and (state.is_cancelling() or state.is_cancelled())
        return False


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def run_stage(workspace: Workspace, stage: str, place: str = "runs", time_left: TimeLeft | None = None) -> State:
    """Bring one stage up to date; state *Cached* if it is, *Restored* if DVC had its output, *Failed* if DVC could not run it.

    Args:
        workspace: the project folder.
        stage: its name.
        place: of the stage in the run, in words.
        time_left: of the run.
    """
    reasons = stale_reasons(workspace, stage).get(stage)
    if not reasons:
        return _ended(workspace, stage, Completed(name=CACHED, message=f"up to date, {_digest(workspace, stage)}"))
    say(stage, f"{place} ({summary(reasons)})")
    announce_event(workspace, stage, "started", summary(reasons))
    view = StageView(stage, time_left)
    try:
        with offered_engine(stage) as variables:
            status = reproduce(workspace, stage, view, variables, echo=not is_quiet())
    except Stopped:
        return _ended(workspace, stage, Cancelled(message=f"stage {stage!r} was cancelled; finished units are kept"))
    if status:
        return _ended(workspace, stage, Failed(message=_failure(stage, view)))
    name = "Completed" if view.began else RESTORED
    return _ended(workspace, stage, Completed(name=name, message=_digest(workspace, stage)))


def _failure(stage: str, view: StageView) -> str:
    """What is still to be said of a failure in the end."""
    if view.error:
        return f"{_explained(stage)}{view.error}"
    if KILLED in view.last:
        return (
            f"stage {stage!r} was killed by the system (signal 9), most likely for want of memory: `fisherfold plan` says what stages hold and "
            "what makes that less. What is finished is kept; `fisherfold run` goes on from there."
        )
    said = "".join(f"\n  {line}" for line in view.last) if is_quiet() else ""
    return f"stage {stage!r} failed and did not say why; `dvc repro --single-item {stage}` may tell more{said}"


def _explained(stage: str) -> str:
    return f"stage {stage!r} failed: "


def is_told(message: str) -> bool:
    """Whether the message of a run's end is on the screen already: what a stage says of its failure is, unless this is quiet."""
    return not is_quiet() and message.startswith(tuple(map(_explained, STAGES)))


def _ended(workspace: Workspace, stage: str, state: State) -> State:
    """Tell of a stage's end, and show its results if it has any."""
    if state.name in ENDS:
        say(stage, ENDS[state.name])
    if state.is_completed():
        show_results(workspace, stage)
    announce_event(workspace, stage, state.name.lower(), state.message or "")
    return state


KILLED = "Killed"  # what the shell that DVC runs a stage in says of signal 9

ENDS = {CACHED: "is up to date", RESTORED: "restored from the cache, nothing was computed"}


def say(stage: str, message: str) -> None:
    """One line in the terminal and in Prefect's log."""
    announce(stage, message)
    get_run_logger().info("%s: %s", stage, message)


def _digest(workspace: Workspace, stage: str) -> str:
    return f"manifest {digest_file(workspace.out(stage) / MANIFEST)[:16]}"
