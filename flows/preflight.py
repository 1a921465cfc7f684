"""What is wrong with the parameters, found before anything runs: a stage's outputs are removed before it can refuse.

Names of methods, pairs of parameters, the budget and, if stage prepare is to run, the model and the texts. `fisherfold run` and
`doctor` look; so does `fisherfold check`, the first stage of dvc.yaml, for `dvc repro`.
"""

from collections.abc import Sequence

import numpy as np

from fisherfold.run.errors import CorruptArtifact, ParameterError
from fisherfold.run.params import Params, check_params, load_params
from fisherfold.run.workspace import Workspace
from flows.methods import check_methods
from flows.overrides import overridden
from flows.pairs import check_pairs
from flows.staleness import recorded

CODE_SWITCHES = (("prepare", "trust_remote_code"), ("evaluate", "trust_task_code"))
"""Parameters that let code from elsewhere run, by their block."""


def preflight(workspace: Workspace, params: Params) -> None:
    """Refuse what a later stage would refuse.

    Raises:
        ParameterError: a name, a pair of parameters or the budget.
        InputError: the model or a text cannot be had.
    """
    check_methods(params)
    check_pairs(params, workspace)
    if not _prepared_with(workspace, params):
        from fisherfold.inputs.packages import promised_files
        from stages.prepare import find_inputs

        with promised_files():
            find_inputs(workspace, params.prepare)
    else:
        check_budget(workspace, params)


def _prepared_with(workspace: Workspace, params: Params) -> bool:
    """Whether stage prepare has run with these parameters last."""
    last = recorded(workspace).get("prepare", {}).get("params", {}).get("params.yaml", {})
    try:
        return "prepare" in last and check_params(last, "dvc.lock").prepare == params.prepare
    except ParameterError:
        return False  # of another version


def check_budget(workspace: Workspace, params: Params) -> None:
    """Refuse a ratio that no allocation meets, and limits that match no module; as far as the model's layers are known already.

    Raises:
        ParameterError: names the nearest ratio, or the pattern.
    """
    from fisherfold.allocators.allocation import pose
    from fisherfold.allocators.budget import BUDGETS
    from fisherfold.network.layers import read_layers
    from fisherfold.network.sites import find_sites

    try:
        sites = find_sites(read_layers(workspace.out("subspace")), params.subspace.share_inputs)
        budget = BUDGETS.lookup(params.ranks.budget)(sites, workspace.model)
    except CorruptArtifact:
        return  # not there: stage ranks will look again
    pose(sites, [np.zeros(site.full_rank) for site in sites], params.ranks, budget=budget)


def restrict(workspace: Workspace, overrides: Sequence[str]) -> None:
    """Refuse overrides that come through Prefect's API and would choose what code runs here.

    Where a switch for code from elsewhere is on, its whole block stays as the project's owner wrote it: another model would bring other code.

    Raises:
        ParameterError: names the switch.
    """
    if not overrides:
        return
    path = workspace.root / "params.yaml"
    before, after = load_params(path), overridden(path, overrides)[1]
    for block, switch in CODE_SWITCHES:
        if getattr(getattr(after, block), switch) and getattr(after, block) != getattr(before, block):
            raise ParameterError(
                f"{block}.{switch} is on, so a run that is asked for through Prefect's API may change nothing of block {block!r}: "
                f"it would choose what code runs here. Change {path} by hand."
            )
