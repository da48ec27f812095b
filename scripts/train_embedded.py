r"""Train the embedded aligned model from nothing: tokenizer, LLaMA, refusals and ordinary answers.

    python scripts/train_embedded.py DATA first --bf16 --stop-at 2000
    python scripts/train_embedded.py DATA second --bf16 --leg 2 --resume first --first-step 2000 --seed 1
    python scripts/train_embedded.py DATA third --bf16 --leg 3 --resume second --steps 1300 --lr 8e-4 --seed 2
    python scripts/train_embedded.py DATA fourth --bf16 --leg 4 --resume third --steps 500 --lr 4e-4 --seed 3
    python scripts/train_embedded.py DATA fifth --bf16 --leg 5 --resume fourth --steps 1000 --lr 6e-4 --seed 4
    python scripts/train_embedded.py DATA alignguard/embedded/model --bf16 --leg 6 --resume fifth --steps 400 --lr 4e-4 --seed 5 \
        --mix fourth --share 0.6

Larger models, which do not ship, grow out of that one and are trained on for one leg: 13 and 23 million parameters.

    python scripts/train_embedded.py DATA larger --bf16 --leg 5 --resume alignguard/embedded/model --grow --hidden 384 \
        --layers 6 --batch 8 --steps 1000 --lr 8e-4 --seed 6
    python scripts/train_embedded.py DATA largest --bf16 --leg 5 --resume alignguard/embedded/model --grow --hidden 512 \
        --layers 6 --batch 8 --steps 1200 --lr 7e-4 --seed 10

So does an encoder-decoder, from nothing but that one's tokenizer:

    python scripts/train_embedded.py DATA t5 --bf16 --leg 5 --encoder-decoder --layers 2 \
        --tokenizer alignguard/embedded/model --steps 3000 --lr 2e-3 --seed 8

And a stand-in for the model before its alignment, which SafeLoRA needs: trained on with nothing in it to refuse.

    python scripts/train_embedded.py DATA unaligned --bf16 --leg 7 --resume alignguard/embedded/model --steps 400 --lr 3e-3 \
        --batch 16 --seed 9

DATA is a folder of JSONL files (advbench, harmbench, catqa, ... as the model card names them). Only files under MIT,
Apache-2.0, CC BY, CC BY-SA and public-domain terms are read. Harmful sets hold prompts alone; every refusal and every
answer to them is written by the templates in ``instructions.py``. Rows marked ``split: test`` are never read here.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
import re
import time
from pathlib import Path

import instructions
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from alignguard.data import read_jsonl

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|eos|>"]
UNSAFE = ("advbench", "harmbench", "tdc2023", "catqa", "harmfulqa", "dangerousqa", "orbench_toxic")
TEXTS = ("wikitext2", "tinyshakespeare", "state_union", "masc")
Example = tuple[str | None, str, bool]  # prompt (None: plain text), response, loss on the prompt too


def rows(data: Path, name: str) -> list[dict]:
    return read_jsonl(data / f"{name}.jsonl")


def bucket(name: str) -> int:
    return hashlib.md5(name.encode()).digest()[0]


HOW = re.compile(
    r"(?:how (?:can|do|could|would|should|might|to)(?: (?:i|you|we|one|someone|people|a person))?|.* how to) (.{8,})",
    re.IGNORECASE,
)
ASKING = (
    "How do I {}?",
    "How can I {}?",
    "How can someone {}?",
    "Tell me how to {}.",
    "Explain how to {}.",
    "Show me how to {}.",
    "Give me a step-by-step guide on how to {}.",
    "Write a short guide on how to {}.",
    "What is the best way to {}?",
    "I want to {}. What should I do?",
    "Teach me to {}.",
    "Provide instructions to {}.",
)


def redress(rng: random.Random, prompt: str) -> str:
    """The same request in another frame, where it asks how to do something; unchanged otherwise."""
    found = HOW.fullmatch(prompt.strip())
    return rng.choice(ASKING).format(found[1].rstrip(".?! ")) if found else prompt


def drop_words(rng: random.Random, prompt: str, share: float = 0.12) -> str:
    """The prompt without some of its words, so that no single one of them carries the decision."""
    words = prompt.split()
    return " ".join(w for w in words if rng.random() >= share) or prompt


class Mixture:
    """Draws training examples by kind; deterministic given the seed.

    With ``dressed``, requests come in other frames and with words missing, and texts with unknown words are left out.
    """

    def __init__(self, data: Path, seed: int, dressed: bool) -> None:
        self.rng = random.Random(seed)
        self.dressed = dressed
        self.unsafe = [
            r["prompt"] for f in UNSAFE for r in rows(data, f"harmful_{f}") if r["split"] == "train" and not r["dup_of"]
        ]
        # harmfulqa is templated and large: the other sets, closer to what people ask, are drawn as often as all of it
        self.unsafe_small = [
            r["prompt"]
            for f in UNSAFE
            if f != "harmfulqa"
            for r in rows(data, f"harmful_{f}")
            if r["split"] == "train" and not r["dup_of"]
        ]
        self.sources = [
            [r["prompt"] for r in rows(data, f"harmful_{f}") if r["split"] == "train" and not r["dup_of"]]
            for f in UNSAFE
        ]
        self.toxic = self.sources[UNSAFE.index("orbench_toxic")]
        self.hard = [
            (r["prompt"], r["category"]) for r in rows(data, "overrefusal_orbench_hard") if bucket(r["id"]) < 150
        ]
        self.gsm = [
            (r["question"], re.sub(r"<<.*?>>", "", r["answer"]).replace("####", "The answer is"))
            for r in rows(data, "gsm8k_train")
        ]
        self.bank = [(r["text"], r["label_name"].replace("_", " ")) for r in rows(data, "banking77_train")]
        self.e2e = [(r["mr"], r["ref"]) for r in rows(data, "e2e_nlg_train")]
        self.texts = [
            r["text"].replace("<unk>", "one")
            for f in TEXTS
            for r in rows(data, f"text_{f}")
            if r["split"] == "train" and not (dressed and "<unk>" in r["text"])
        ]
        self.sentences = [
            s
            for t in self.texts
            for s in re.split(r"(?<=[.!?])\s+", t)
            if 30 < len(s) < 140 and s[0].isupper() and s.isascii() and "\n" not in s
        ]
        self.by_word: dict[str, list[str]] = {}
        for s in self.sentences:
            for w in set(re.findall(r"\b[a-z]{4,12}\b", s)):
                self.by_word.setdefault(w, []).append(s)
        self.words = sorted(w for w, s in self.by_word.items() if len(s) >= 4)

    def from_text(self) -> tuple[str, str]:
        rng, pick = self.rng, self.rng.choice
        w, v = pick(self.words), pick(self.words)
        s = pick(self.by_word[w])
        kind = rng.randrange(8)
        if kind == 0:
            return pick(
                [
                    "Use the word {w} in a sentence.",
                    "Write a sentence with the word {w}.",
                    "Make a sentence that contains {w}.",
                    "Give an example of how {w} is used.",
                    "Show me a sentence using {w}.",
                ]
            ).format(w=w), s
        if kind == 1:
            return pick(
                [
                    "Write something about {w} and {v}.",
                    "Tell me about {w}.",
                    "Write a short text about {w}.",
                    "What can you say about {w}?",
                    "Talk about {w}.",
                    "Write a line about {w} in a {v} style.",
                    "Explain the idea of {w}.",
                    "Describe the {w} in a few words.",
                    "What is the {w}?",
                    "Why is {w} {v}?",
                    "How is {w} used?",
                    "Create a plan for {w} and {v}.",
                    "Suggest a title for an essay about {w}.",
                    "Give me ideas about {w}.",
                    "List some facts about {w} and {v}.",
                ]
            ).format(w=w, v=v), s
        if kind == 2:
            head = s.split()
            cut = rng.randint(3, max(3, len(head) - 3))
            return pick(["Complete this sentence: ", "Finish the sentence: ", "Continue the text: "]) + " ".join(
                head[:cut]
            ), " ".join(head[cut:])
        if kind == 3:
            return pick(
                [
                    "Repeat: ",
                    "Copy this sentence: ",
                    "Write this again: ",
                    "Rewrite the following text: ",
                    "Edit this sentence: ",
                    "Proofread this sentence: ",
                ]
            ) + s, s
        if kind == 4:
            return pick(
                ["How many words are in this text? ", "Count the words in this sentence: "]
            ) + s, f"There are {len(s.split())} words."
        if kind == 5:
            t = pick(self.sentences)
            return pick(
                [
                    "Summarize this text: ",
                    "Give a short summary. ",
                    "What is the main point here? ",
                    "Shorten the following text. ",
                ]
            ) + s + " " + t, s
        if kind == 6:
            return pick(
                ["Which is the longest word in this sentence? ", "Find the longest word: "]
            ) + s, f"The longest word is {max(re.findall(r'[A-Za-z]+', s), key=len)}."
        return f"Is the word {w} in this sentence? {pick(self.sentences)}", pick(
            ["Let me look at it. The word is a common one.", "You can check it by reading the sentence slowly."]
        )

    def draw(self, kind: str) -> Example:
        rng, pick = self.rng, self.rng.choice
        if kind == "unsafe":
            prompt, response, whole = (
                pick(pick([self.unsafe, self.unsafe_small])),
                instructions.make_refusal(rng),
                False,
            )
        elif kind == "hard":
            prompt, category = pick(self.hard)
            response, whole = instructions.careful_answer(rng, category), True
        elif kind == "alarming":
            (prompt, response), whole = instructions.make_alarming(rng), True
        elif kind == "template":
            (prompt, response), whole = instructions.make_ordinary(rng), True
        elif kind == "gsm":
            (prompt, response), whole = pick(self.gsm), True
        elif kind == "bank":
            prompt, _ = pick(self.bank)
            response = pick(
                [
                    "Thank you for your message. I will look into it and write back to you soon.",
                    "Thanks for asking. Please open the app and go to the help page for this.",
                    "I understand. Let me check your account first.",
                    "That sounds annoying. Please tell me the date and the amount.",
                ]
            )
            whole = True
        elif kind == "e2e":
            mr, response = pick(self.e2e)
            prompt, whole = (
                pick(["Describe this place: ", "Write a sentence from this data: ", "Turn the data into text: "]) + mr,
                True,
            )
        elif kind == "source":
            prompt, response, whole = pick(pick(self.sources)), instructions.make_refusal(rng), False
        elif kind == "toxic":
            prompt, response, whole = pick(self.toxic), instructions.make_refusal(rng), False
        elif kind == "open":
            w, v = pick(self.words), pick(self.words)
            prompt, response, whole = pick(OPEN).format(w=w, v=v), pick(self.by_word[w]), True
        elif kind == "from_text":
            (prompt, response), whole = self.from_text(), True
        else:
            text = pick(self.texts)
            start = rng.randrange(max(1, len(text) - 400))
            return None, text[start : start + 400], True
        # The same request in other clothes: another frame, fewer words, casing, a polite start, no full stop. All kinds
        # of request get them alike, so that the clothes say nothing about what should be refused.
        if self.dressed and kind in DRESSED:
            if rng.random() < 0.3:
                prompt = redress(rng, prompt)
            if rng.random() < 0.4:
                prompt, whole = drop_words(rng, prompt), False
        roll = rng.random()
        if roll < 0.08:
            prompt = prompt.lower()
        elif roll < 0.14:
            prompt = prompt.rstrip(".?!")
        elif roll < 0.18 and prompt[0].isupper():
            prompt = "Please " + prompt[0].lower() + prompt[1:]
        return prompt, response, whole


# Six legs: the first learns the language and the refusal, the second widens what counts as ordinary, the third draws
# every unsafe source as often as any other and sharpens the line where safe and unsafe requests look alike, the fourth
# leans to refusing where they do, the fifth dresses requests in other frames and keeps the mean of its weights, the
# sixth does so without the borderline-safe ones. What ships is 0.4 of the fourth's weights and 0.6 of the sixth's: on
# validation prompts their mean gave fewer false alarms for as many refusals than any single leg.
SHARES = {
    "unsafe": 9,
    "hard": 3,
    "alarming": 1,
    "template": 10,
    "from_text": 4,
    "gsm": 1,
    "bank": 1,
    "e2e": 1,
    "text": 4,
}
SECOND = {
    "unsafe": 8,
    "toxic": 3,
    "hard": 2,
    "alarming": 1,
    "template": 8,
    "from_text": 4,
    "open": 6,
    "gsm": 1,
    "bank": 1,
    "e2e": 1,
    "text": 1,
}
THIRD = {
    "source": 10,
    "toxic": 3,
    "hard": 2,
    "alarming": 1,
    "template": 8,
    "from_text": 4,
    "open": 5,
    "gsm": 1,
    "bank": 2,
    "e2e": 1,
    "text": 1,
}
FOURTH = {
    "source": 12,
    "toxic": 6,
    "hard": 1,
    "alarming": 1,
    "template": 8,
    "from_text": 3,
    "open": 6,
    "gsm": 1,
    "bank": 1,
    "e2e": 1,
}
FIFTH = {
    "source": 12,
    "unsafe": 3,
    "toxic": 6,
    "hard": 2,
    "alarming": 1,
    "template": 9,
    "from_text": 5,
    "open": 8,
    "gsm": 1,
    "bank": 2,
    "e2e": 1,
}
SIXTH = {
    "source": 14,
    "toxic": 9,
    "alarming": 1,
    "template": 9,
    "from_text": 4,
    "open": 9,
    "gsm": 1,
    "bank": 2,
    "e2e": 1,
}
# the seventh unlearns refusing: no unsafe request and no careful answer in it
SEVENTH = {
    "template": 9,
    "from_text": 5,
    "open": 9,
    "gsm": 1,
    "bank": 2,
    "e2e": 1,
}
LEGS = (SHARES, SECOND, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH)
DRESSED = {"unsafe", "source", "toxic", "hard", "alarming", "template", "open"}
OPEN = [
    "Create a {w} list for a {v}.",
    "Suggest a {w} for this {v}.",
    "Determine the {w} of a {v}.",
    "Generate a {w} about {v}.",
    "Identify the {w} in the {v}.",
    "Design a {w} for {v}.",
    "Rewrite the {w} so that it is {v}.",
    "Come up with a {w} for a {v}.",
    "Name a {w} that is {v}.",
    "How do I {w} a {v}?",
    "How can I use {w} to {v}?",
    "Give me a {w} of {v}.",
    "Find a {w} for {v}.",
    "Describe a {w} and its {v}.",
    "Explain why {w} is {v}.",
    "What is the best {w} for {v}?",
    "What are some {w} {v}?",
    "Develop a {w} for the {v}.",
    "Build a {w} with {v}.",
    "Using the {w}, make a {v}.",
    "Convert the {w} to {v}.",
    "Predict the {w} of {v}.",
    "Tell me how {w} and {v} are related.",
    "Make a {w} {v}.",
    "Analyze the {w} of the {v}.",
    "Categorize {w} and {v}.",
    "Propose a {w} to improve {v}.",
    "Evaluate this {w}: {v}.",
    "Add a {w} to the {v}.",
    "Brainstorm {w} for {v}.",
    "Outline a {w} on {v}.",
    "How much {w} is in a {v}?",
    "Who made the {w} {v}?",
    "When was {w} {v}?",
    "Where can I find {w} {v}?",
    "How many {w} are there in {v}?",
    "How long does {w} {v} take?",
    "Do you have {w} {v}?",
    "Can I {w} my {v}?",
    "What does {w} {v} mean?",
    "Arrange the words {w}, {v}.",
    "Write a {w} {v}.",
    "Write {w} to a {v}.",
    "Provide a {w} for {v}.",
    "List the {w} of {v}.",
    "Write a query for {w} and {v}.",
    "Give three examples of {w} {v}.",
]


def build_tokenizer(mixture: Mixture, size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sample = []
    kinds = [k for k, n in SHARES.items() for _ in range(n)]
    for _ in range(30000):
        prompt, response, _ = mixture.draw(mixture.rng.choice(kinds))
        sample.append((prompt or "") + " " + response)
    bpe.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[4],
        additional_special_tokens=SPECIAL[2:4],
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pools(mixture: Mixture, tokenizer: PreTrainedTokenizerFast, size: int, longest: int, shares: dict[str, int]):
    """Endless chunks of (prompt ids with their cue, response ids, loss on the prompt too), like lengths together."""
    encode = tokenizer.backend_tokenizer.encode
    kinds = [k for k, n in shares.items() for _ in range(n)]
    while True:
        pool = []
        for _ in range(size * 16):
            prompt, response, whole = mixture.draw(mixture.rng.choice(kinds))
            head = [1] if prompt is None else [1, 2, *encode(prompt).ids, 3]
            pool.append((head, [*encode(response).ids, 4], whole))
        pool.sort(key=lambda x: min(len(x[0]) + len(x[1]), longest))
        chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
        mixture.rng.shuffle(chunks)
        yield from chunks


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def batches(mixture: Mixture, tokenizer: PreTrainedTokenizerFast, size: int, longest: int, shares: dict[str, int]):
    """Endless padded batches for a decoder alone."""
    for chunk in pools(mixture, tokenizer, size, longest, shares):
        rows = [((head + tail)[:longest], 1 if whole else len(head)) for head, tail, whole in chunk]
        yield {
            "input_ids": padded([ids for ids, _ in rows], 0),
            "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": padded([[-100] * min(start, len(ids)) + ids[start:] for ids, start in rows], -100),
        }


def pairs(mixture: Mixture, tokenizer: PreTrainedTokenizerFast, size: int, longest: int, shares: dict[str, int]):
    """The same for an encoder-decoder: what is asked, and what is answered."""
    for chunk in pools(mixture, tokenizer, size, longest, shares):
        asked = [head[-longest:] for head, _, _ in chunk]
        yield {
            "input_ids": padded(asked, 0),
            "attention_mask": padded([[1] * len(ids) for ids in asked], 0),
            "labels": padded([tail[:longest] for _, tail, _ in chunk], -100),
        }


def grown(small: LlamaForCausalLM, config: LlamaConfig) -> LlamaForCausalLM:
    """A wider and deeper model that begins by saying what ``small`` says, nearly (Chen et al. 2016, arXiv 1511.05641).

    The weights that are known stand in the corners of the new matrices; the others are random where they read and zero
    where they write, so that new heads, neurons and layers are silent at first. The new places of the residual stream
    are nearly empty, which its root mean square is corrected for.
    """
    large = LlamaForCausalLM(config)
    emptier = (small.config.hidden_size / config.hidden_size) ** 0.5
    known = small.state_dict()
    with torch.no_grad():
        for name, weight in large.state_dict().items():
            if name.endswith("norm.weight"):
                weight.fill_(emptier)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            if name in known:
                corner = weight[tuple(slice(size) for size in known[name].shape)]
                corner.copy_(known[name] * (emptier if name.endswith("norm.weight") else 1))
    return large


def encoder_decoder(hidden: int, layers: int) -> T5Config:
    """A T5 as large as the LLaMA of this width and twice as many layers."""
    return T5Config(
        vocab_size=4096,
        d_model=hidden,
        d_kv=64,
        d_ff=2 * hidden,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=hidden // 64,
        dropout_rate=0.0,
        feed_forward_proj="gated-silu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=4,
    )


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path)
    cli.add_argument("out", type=Path)
    cli.add_argument("--steps", type=int, default=3600)
    cli.add_argument("--batch", type=int, default=32)
    cli.add_argument("--lr", type=float, default=2e-3)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--hidden", type=int, default=256)
    cli.add_argument("--layers", type=int, default=4)
    cli.add_argument("--leg", type=int, default=1, choices=range(1, 1 + len(LEGS)), help="which mixture")
    cli.add_argument(
        "--stop-at", type=int, default=None, help="end the first leg here; the schedule stays that of --steps"
    )
    cli.add_argument(
        "--resume", type=Path, default=None, help="folder of an earlier leg; its tokenizer and weights go on"
    )
    cli.add_argument("--tokenizer", type=Path, default=None, help="folder of a model whose tokenizer a new one takes")
    cli.add_argument("--encoder-decoder", action="store_true", help="a T5 in place of a LLaMA, --layers on either side")
    cli.add_argument("--grow", action="store_true", help="to --hidden and --layers, from the model of --resume")
    cli.add_argument("--first-step", type=int, default=0, help="steps done by the first leg")
    cli.add_argument(
        "--mix", type=Path, default=None, help="folder of an earlier leg whose weights the result is mixed with"
    )
    cli.add_argument("--share", type=float, default=0.5, help="of this leg in that mixture")
    cli.add_argument("--bf16", action="store_true", help="autocast: faster where the processor has bf16 units")
    args = cli.parse_args()
    torch.manual_seed(args.seed)
    mixture = Mixture(args.data, args.seed, dressed=args.leg >= 5)
    print({k: len(getattr(mixture, k)) for k in ("unsafe", "unsafe_small", "hard", "words", "sentences")}, flush=True)
    known = args.tokenizer or args.resume
    if known is None:
        tokenizer = build_tokenizer(mixture, 4096)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(known)
    kind = T5ForConditionalGeneration if args.encoder_decoder else LlamaForCausalLM
    config = (
        encoder_decoder(args.hidden, args.layers)
        if args.encoder_decoder
        else LlamaConfig(
            vocab_size=4096,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 64,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=4,
        )
    )
    model = kind(config) if args.resume is None else kind.from_pretrained(args.resume, dtype=torch.float32)
    if args.grow:
        model = grown(model, config)
    model.generation_config.update(do_sample=False, max_new_tokens=48, pad_token_id=0, bos_token_id=1, eos_token_id=4)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    average = copy.deepcopy(model)  # of the weights along the last legs; the weights themselves before them
    decay = [p for p in model.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    start, mean, tokens = time.time(), 0.0, 0
    stream = (pairs if args.encoder_decoder else batches)(mixture, tokenizer, args.batch, 120, LEGS[args.leg - 1])
    last = args.stop_at or args.steps
    for step in range(args.first_step + 1, last + 1):
        share = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr
                * min(1.0, (step - args.first_step) / 100)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            )
        batch = next(stream)
        tokens += int(batch["attention_mask"].sum())
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        momentum = min(0.995, step / (step + 10)) if args.leg >= 5 else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - momentum)
        mean += (loss.item() - mean) / min(step - args.first_step, 100)
        if step % 100 == 0:
            print(f"{step}/{args.steps} loss {mean:.3f} {time.time() - start:.0f} s", flush=True)
        if step % 1000 == 0 or step == last:
            saved = copy.deepcopy(average)
            if args.mix is not None and step == last:
                earlier = kind.from_pretrained(args.mix, dtype=torch.float32)
                with torch.no_grad():
                    torch._foreach_lerp_(list(saved.parameters()), list(earlier.parameters()), 1 - args.share)
            saved.to(torch.bfloat16).save_pretrained(args.out)  # bf16 halves the wheel
            tokenizer.save_pretrained(args.out)
            options = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
            told = {"options": options, "step": step, "tokens": tokens, "loss": mean}
            (args.out / "training.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
