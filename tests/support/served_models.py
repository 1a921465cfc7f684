"""Compressed checkpoints of small random models that serving engines take: heads of 32, which their attention kernels want.

python tests/support/served_models.py FOLDER      # every family and storage below FOLDER, as FOLDER/llama-pivoted/…
"""

import sys
from pathlib import Path

import torch
from tiny import VOCABULARY, as_truncated
from tiny_subspace import publish_ranks, subspace_workspace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fisherfold.linalg.group_grid import GROUP
from fisherfold.network.layers import read_layers
from fisherfold.network.sites import read_sites
from fisherfold.run.params import KroneckerParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from stages import factorize

FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},  # biases on q, k, v
    "gemma3_text": {"head_dim": 32, "tie_word_embeddings": False, "sliding_window": 16},
}
OTHERS = {
    "mistral": {"sliding_window": 16, "head_dim": 32},
    "qwen3": {"head_dim": 32},  # norms of q and k
    "phi3": {},  # q, k, v in one layer, gate and up in another
    "olmo2": {},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},  # capped logits
    "granite": {"logits_scaling": 4.0},
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },  # experts dense
}
"""Families that no line of the checkpoint's code names."""
STORAGES = {"plain": ("factors", False), "pivoted": ("pivoted", False), "shared": ("factors", True)}
"""ranks.storage and subspace.share_inputs, by name."""
DROPPED = "model.layers.1.self_attn.o_proj"
CASES = [(family, storage) for family in FAMILIES for storage in STORAGES]


def small_model(family: str) -> PreTrainedModel:
    """Two blocks of width 128 with four heads. Weights are large enough that greedy tokens differ from place to place."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=2, hidden_size=128, intermediate_size=192,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, **(FAMILIES | OTHERS)[family]
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def served_model(root: Path, family: str, storage: str, bits: int | None = None) -> Path:
    """Folder of a checkpoint with layers of several kinds: dense, dropped, of small and of large rank."""
    kind, shared = STORAGES[storage]
    workspace = subspace_workspace(root, family, shared=shared, model=small_model(family), experts=False)
    ranks = some_ranks(workspace)
    if bits:
        ranks = {name: -(-rank // GROUP) * GROUP for name, rank in ranks.items()}
        publish_statistics(workspace)
    publish_ranks(workspace, ranks, kind)
    factorize.run(workspace, as_truncated(bits=bits, dense_export=True))
    return workspace.out("factorize") / "model"


def publish_statistics(workspace: Workspace) -> None:
    """What is asked of stages capture and kronecker where the metric is the identity."""
    (workspace.out("capture") / "capture.json").write_text("{}")
    with Scratch(workspace, "kronecker", KroneckerParams(), {}) as scratch, scratch.publish():
        pass


def some_ranks(workspace: Workspace) -> dict[str, int]:
    """Ranks by site: each layer but the last is cut, to a part of what would be stored in any case; one is dropped."""
    sites = read_sites(workspace.out("subspace"))
    last = read_layers(workspace.out("subspace"))[-1].name
    ranks = {site.name: max(1, site.dense_numbers // (site.outputs + site.inputs) * 2 // 3) for site in sites}
    return {name: 0 if name == DROPPED else rank for name, rank in ranks.items() if name != last}


if __name__ == "__main__":
    for family, storage in CASES:
        print(served_model(Path(sys.argv[1]) / f"{family}-{storage}", family, storage))
