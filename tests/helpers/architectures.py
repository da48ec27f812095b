"""Tiny random models of every architecture and every kind of adapter, and their ΔW by peft's own merge."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**more):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
                 decoder_start_token_id=0)
    )  # fmt: skip


MODELS = {
    "llama": llama,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)),
    "t5": t5,
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)),
    "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)),
}  # fmt: skip
# No activation is computed again, which TRL asks for by itself. transformers has called that by two names.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
RECOMPUTED = {next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__): False}
TASKS = {"t5": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 9, "down_proj": 2}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "saved": {"modules_to_save": ["lm_head"]},
}


def make(model="llama", adapter="lora", dtype=torch.float64, seed=0):
    """A peft model just adapted; ``adapter="two"`` has two of them active."""
    torch.manual_seed(seed)
    fields = {"r": 2, "lora_alpha": 6, "task_type": TASKS.get(model, "CAUSAL_LM"), "target_modules": "all-linear"}
    if model == "mixtral":
        fields["target_parameters"] = EXPERTS
    config = LoraConfig(**{**fields, **ADAPTERS.get(adapter, {})})
    adapted = get_peft_model(MODELS[model](), config)
    if adapter == "two":
        adapted.add_adapter("other", LoraConfig(**{**fields, "r": 3}))
        adapted.base_model.set_adapter(["default", "other"])
    return adapted.to(dtype).eval()


@torch.no_grad()
def move(model, size=0.1, seed=1):
    """Push every trained parameter off its start."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def from_zero(model, made):
    """What ``made`` returns, a guard on the model, made while its adapter was fresh: it has moved since."""
    moved = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in moved:
                p.zero_()
        guard = made()
        for name, p in model.named_parameters():
            if name in moved:
                p.copy_(moved[name])
    return guard


@torch.no_grad()
def merged_weights(model):
    """Every weight of a peft model as peft itself merges it; the model is left alone."""
    twin = copy.deepcopy(model)
    return {
        n: p.clone() for n, p in twin.merge_and_unload(adapter_names=list(model.active_adapters)).named_parameters()
    }


def weight_of(weights, plain):
    """The (p, q) matrix of a guarded matrix's plain name among the weights of a plain model."""
    if f"{plain}.weight" in weights:
        weight = weights[f"{plain}.weight"]
        return weight.mT if ".c_" in plain else weight  # GPT-2's Conv1D
    stack, expert = plain.rsplit(".", 1)
    return weights[stack][int(expert)]


def before_alignment(tiny_llama):
    """The model before an alignment that moved every matrix, of a factory of the aligned one."""
    before = tiny_llama(torch.float64)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in before.named_parameters():
            if name.endswith("weight") and p.ndim == 2:
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return before
