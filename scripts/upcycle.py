"""A mixture of experts out of a dense LLaMA, which at first says exactly what that says.

    python scripts/upcycle.py alignguard/embedded/model mixture --experts 4

Every expert is a copy of the dense MLP and the router is random (sparse upcycling, Komatsuzaki et al. 2022, arXiv
2212.05055): as the weights of the chosen experts sum up to one, their mean is the MLP, whichever are chosen. So the
mixture is as aligned as the model that it came from, and its experts part only as it is trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

CHECK = "How do I bake bread for a friend?"


def upcycled(dense: LlamaForCausalLM, experts: int, chosen: int, seed: int) -> MixtralForCausalLM:
    """The mixture of ``experts`` copies, of which each token is sent to ``chosen``."""
    c = dense.config
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    kept += ("rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id")
    same = {name: getattr(c, name) for name in kept}
    torch.manual_seed(seed)
    mixture = MixtralForCausalLM(
        MixtralConfig(**same, num_local_experts=experts, num_experts_per_tok=chosen, sliding_window=None)
    )
    known = dense.state_dict()
    with torch.no_grad():
        for name, weight in mixture.state_dict().items():
            layer = name.partition(".mlp.")[0]
            if name.endswith("experts.gate_up_proj"):
                halves = [known[f"{layer}.mlp.{half}_proj.weight"] for half in ("gate", "up")]
                weight.copy_(torch.cat(halves))  # the same for each expert
            elif name.endswith("experts.down_proj"):
                weight.copy_(known[f"{layer}.mlp.down_proj.weight"])
            elif name in known:
                weight.copy_(known[name])
            elif not name.endswith("mlp.gate.weight"):
                raise ValueError(f"{name} of the mixture is none of the dense model's tensors")
    mixture.generation_config = dense.generation_config
    return mixture.eval()


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("dense", type=Path)
    cli.add_argument("out", type=Path)
    cli.add_argument("--experts", type=int, default=4)
    cli.add_argument("--chosen", type=int, default=2, help="experts a token")
    cli.add_argument("--seed", type=int, default=0)
    args = cli.parse_args()
    dense = LlamaForCausalLM.from_pretrained(args.dense, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    mixture = upcycled(dense, args.experts, args.chosen, args.seed)
    ids = tokenizer(CHECK, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    mixture.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{mixture.num_parameters() / 1e6:.1f}M parameters in {args.out}")


if __name__ == "__main__":
    main()
