"""What nearly every process of the tests imports, once for all of them: `tests.forked` forks them from one that has."""

import gc

import bitsandbytes  # noqa: F401
import deepspeed  # noqa: F401
import torch.distributed  # noqa: F401
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import dist_subspace.training.run  # noqa: F401

gc.freeze()  # is neither looked at nor copied where a fork collects garbage
