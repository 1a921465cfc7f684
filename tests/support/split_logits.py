"""Logits of a checkpoint whose layers are split over processes by its own plan, as transformers does it (torch.distributed, gloo).

Usage, in each of the processes, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set: python split_logits.py FOLDER TOKENS OUT. TOKENS is JSON, a
list of ids; the first process writes the logits to OUT (.npy), and how many numbers of weights it holds itself to standard output.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

if __name__ == "__main__":
    folder, tokens, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([json.loads(tokens)])).logits
    held = sum(getattr(part, "_local_tensor", part).numel() for part in model.parameters())
    if torch.distributed.get_rank() == 0:
        np.save(Path(out), logits.numpy())
        print(held)
    torch.distributed.destroy_process_group()
