"""The MetaMathQA benchmark of peft's method comparison, plain LoRA and guarded LoRA side by side."""
