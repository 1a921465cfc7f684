"""What methods need of other stages is refused before anything runs, and set where a sweep chooses the metric."""

import pytest

from fisherfold.fisher.estimators import ESTIMATORS
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params
from flows.methods import NEEDS, Need, check_methods, metric_settings


def document(settings: dict[str, str]) -> dict[str, dict[str, str]]:
    """Dotted names as blocks."""
    blocks: dict[str, dict[str, str]] = {}
    for name, value in settings.items():
        block, _, key = name.partition(".")
        blocks.setdefault(block, {})[key] = value
    return blocks


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.method}-{need.parameter}")
def test_a_method_is_refused_unless_another_parameter_is_what_it_needs(need: Need):
    others = {each.parameter: each.values[-1] for each in NEEDS if each.method == need.method and each != need}
    asked = {f"{need.block}.{need.key}": need.method, **others}
    with pytest.raises(
        ParameterError, match=rf"'{need.method}' {need.why}, and {need.parameter} is .*--set {need.parameter}="
    ):
        check_methods(Params.model_validate(document(asked)))
    for value in need.values:
        kept = {"capture.gradients": "exact"} if need.parameter == "kronecker.estimator" else {}
        check_methods(Params.model_validate(document({**asked, **kept, need.parameter: value})))


def test_factors_may_come_from_an_estimator_of_somebody_s_own(monkeypatch):
    monkeypatch.setitem(ESTIMATORS._entries, "mine", ESTIMATORS.lookup("token"))
    for name in ("mine", "every_token"):
        check_methods(Params.model_validate({"subspace": {"metric": "gfwsvd"}, "kronecker": {"estimator": name}}))


@pytest.mark.parametrize(
    ("metrics", "settings"),
    [
        (["kfac"], {}),
        (["fwsvd"], {"capture.gradients": "sums"}),
        (["gfwsvd"], {"kronecker.estimator": "sequence", "capture.gradients": "sketch"}),
        (["fwsvd", "gfwsvd"], {"kronecker.estimator": "sequence", "capture.gradients": "sketch"}),
        (["gfwsvd", "fasc"], {"kronecker.estimator": "sequence", "capture.gradients": "sketch"}),
    ],
)
def test_one_capture_serves_all_metrics_and_keeps_no_more(metrics, settings):
    assert metric_settings(metrics) == settings
