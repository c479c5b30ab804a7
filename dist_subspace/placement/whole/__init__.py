"""Every tensor whole, on one process, in plain torch: `deepspeed.preset: none`. DeepSpeed is not imported."""
