import pytest

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params
from flows.methods import GRADIENTS, check_methods


@pytest.mark.parametrize("needing", GRADIENTS, ids=lambda names: ".".join(names))
def test_a_method_that_reads_gradients_is_refused_before_a_capture_without(needing):
    block, key, method = needing
    asked = {block: {key: method}}
    with pytest.raises(ParameterError, match=f"{block}.{key} = '{method}' reads .* capture.gradients is 'none'"):
        check_methods(Params.model_validate(asked))
    for form in GRADIENTS[needing]:
        check_methods(Params.model_validate({**asked, "capture": {"gradients": form, "labels": "data"}}))


def test_a_method_that_reads_the_text_s_loss_is_refused_with_labels_of_the_model():
    asked = {"ranks": {"allocator": "zero_sum"}, "capture": {"gradients": "sums", "labels": "model"}}
    with pytest.raises(ParameterError, match=r"zero_sum.*capture\.labels=data"):
        check_methods(Params.model_validate(asked))
