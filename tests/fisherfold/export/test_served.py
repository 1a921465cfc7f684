"""What engines cannot run, and how many ranks their storage keeps."""

from pathlib import Path

import pytest
from tiny_families import save_family

from fisherfold.export.served import CHECKS, kept_rank_share
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.run.errors import InputError
from fisherfold.run.params import FactorizeParams
from fisherfold.run.targets import TARGETS

LAYER = LinearLayer("layer", 64, 64, False, False, "layer")
EXPERT = LinearLayer("experts.up.0", 64, 64, False, False, "experts.up.0", stack="experts.up")


def test_every_target_has_a_check():
    assert CHECKS.keys() == TARGETS.keys()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "minicpm3"])
def test_what_vllm_runs(tmp_path: Path, family: str):
    CHECKS["vllm"](FactorizeParams(), save_family(tmp_path, family), [LAYER])


@pytest.mark.parametrize(
    ("family", "layer", "says"),
    [
        ("mixtral", EXPERT, "Set prepare.experts: dense"),
        ("mamba", LAYER, "the attention of 'mamba' in transformers"),
        ("gpt2", LAYER, "'gpt2' in transformers wants its attention's result in another form"),
        ("roberta", LAYER, "takes the logits of 'roberta' for the output embedding's product"),
        ("bart", LAYER, "without its head, for which transformers has no class of 'bart'"),
    ],
)
def test_what_vllm_cannot_run(tmp_path: Path, family: str, layer: LinearLayer, says: str):
    with pytest.raises(InputError, match=rf"factorize\.target = vllm: .*{says}"):
        CHECKS["vllm"](FactorizeParams(), save_family(tmp_path, family), [layer])


@pytest.mark.parametrize(
    ("storage", "round_to", "rank"),
    [
        ("factors", 1, 19),
        ("factors", 8, 16),
        ("factors", 32, 0),
        ("pivoted", 1, 22),
    ],  # 128 r, 128 r − r² + 64 of 0.6 · 64²
)
def test_ranks_that_fit(storage: str, round_to: int, rank: int):
    assert kept_rank_share([Site("layer", (LAYER,))], storage, round_to, ratio=0.4) == rank / 64
