"""What a rank of `tests.forked_ranks` finds imported: all that a run imports."""

import gc

import deepspeed
import tokenizers
import torch
import transformers
from transformers.models.llama import modeling_llama

import dist_subspace.api
import dist_subspace.cli
import dist_subspace.interchange.merge
import dist_subspace.interchange.peft.export
import dist_subspace.training.data.batches
import dist_subspace.training.data.tokens
import dist_subspace.training.run

torch.set_num_threads(1)
IMPORTED = (deepspeed, dist_subspace, modeling_llama, tokenizers, transformers)
gc.freeze()  # is neither looked at nor copied where a fork collects garbage
