"""GPT-2, with softmax or alpha-entmax attention.

The architecture is OpenAI's (pre-LN, tanh GELU, learned positions, tied embedding), and so are the names of modules
and weights: they travel to and from the Hugging Face layout by transposing the four matrices of a block.
In the shapes below: B sequences, T tokens each, C channels, H heads of D = C/H, V the vocabulary.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adasplash_kernels import SOFTMAX, causal_entmax_attention, causal_entmax_attention_qkvpacked
from cli import UserError
from cross_entropy import ROWS, head_loss
from mlp import add_mlp
from qkv import queries_keys_values, queries_keys_values_packed
from residual import add_product, norm

SIZES = {  # layers, heads, channels
    "tiny": (4, 4, 128),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True)
class GPTConfig:
    """What rebuilds a model, besides its weights."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int  # the longest sequence, in tokens
    vocab_size: int
    attention: str = "softmax"  # or "entmax"
    alpha: float = 1.5  # of entmax; 1 is softmax, 2 is sparsemax

    def __post_init__(self):
        """Raises ValueError for what makes no model."""
        sizes = (self.n_layer, self.n_head, self.n_embd, self.n_positions, self.vocab_size)
        sound = all(type(size) is int and 0 < size <= 2**30 for size in sizes)
        if not sound or self.n_embd > 2**20 or self.n_embd % self.n_head:
            raise ValueError(f"no GPT-2 has {self}")
        if self.attention not in ("softmax", "entmax") or type(self.alpha) is bool or not 1 <= self.alpha <= 2:
            raise ValueError(f"no attention is {self.attention!r} with alpha {self.alpha!r}")


# -----------------------------------------------------------------------------
# modules


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.alpha = config.alpha  # see GPT.set_alpha
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.entmax = config.attention == "entmax"

    def forward(self, qkv, past=None):
        """What c_attn gives, as (B, T, 3, H, D) or as three (B, H, T, D) -> (B, T, C), for c_proj.

        past: None, or a list that holds this layer's keys and values so far and is extended.
        """
        q, k, v = qkv if isinstance(qkv, tuple) else qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            past[:] = k, v
        if not self.entmax:  # with a cache T may be 1: the newest token, which sees all keys
            y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2])
        elif past is None:
            y = causal_entmax_attention_qkvpacked(qkv, self.alpha)
        else:
            y = causal_entmax_attention(q, k, v, self.alpha)
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        """x: the residual stream, (B, T, C), before this block -> after it. past: see Attention."""
        attn = self.attn
        qkv = attn.c_attn(self.ln_1(x)).unflatten(2, (3, attn.n_head, -1))
        x = x + attn.c_proj(attn(qkv, past))
        return x + self.mlp(self.ln_2(x))

    def fold(self, bias):
        """The weights and biases that fused() takes, where the stream before this block has that bias.

        After attention, with heads' outputs y, it is x + y W^T, and its bias the one before + W v_bias + c_proj.bias.
        """
        attn, mlp = self.attn, self.mlp
        qkv_weight, qkv_bias = folded(self.ln_1, attn.c_attn)
        q_bias, _, v_bias = qkv_bias.chunk(3)  # of which only the first changes what is attended to: see qkv.py
        # as a product of matrices: of vectors the compiler would make one kernel for all blocks, too large for Triton
        middle_bias = bias + attn.c_proj(v_bias[None])[0]
        fc_weight, fc_bias = folded(self.ln_2, mlp.c_fc)
        end_bias = middle_bias + mlp.c_proj.bias
        return [
            qkv_weight, q_bias, attn.c_proj.weight, middle_bias, fc_weight, fc_bias, mlp.c_proj.weight, end_bias
        ]  # fmt: skip

    def fused(self, x, bias, B, weights):
        """What forward() does, up to rounding, with fewer passes over memory.

        The stream is x (B T, C) + bias (C), before and after: biases that layers add to all rows alike are kept apart,
        so that x is only added to by matrix products. The gain and bias of a norm are taken into the layer that
        follows. weights: from fold().
        """
        qkv_weight, q_bias, proj_weight, middle_bias, fc_weight, fc_bias, out_weight, end_bias = weights
        attn, eps = self.attn, self.ln_1.eps
        x, h = norm(x, bias, eps)
        project = queries_keys_values_packed if attn.entmax else queries_keys_values
        y = attn(project(h.unflatten(0, (B, -1)), rounded(qkv_weight), q_bias, attn.n_head)).flatten(0, 1)
        x = add_product(x, y, rounded(proj_weight))
        x, h = norm(x, middle_bias, eps)
        return add_mlp(x, h, rounded(fc_weight), fc_bias, rounded(out_weight)), end_bias


def folded(layer_norm, linear):
    """Weight and bias of a layer that follows a norm, with the norm's gain and bias taken in."""
    return linear.weight * layer_norm.weight, linear.bias + linear.weight @ layer_norm.bias


def rounded(x):
    """x in the dtype of autocast, where that is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class GPT(nn.Module):
    """The language model. Its weights are PyTorch's defaults until init_weights() or load_state_dict()."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # a multiple of 128 rows makes the last matrix product fast; loss and sampler never see the extra ones
        self.wte = nn.Embedding(-(-config.vocab_size // 128) * 128, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    @torch.no_grad()
    def init_weights(self, generator, qk_scale=1.0):
        """GPT-2's initialisation, drawn from a torch.Generator on the CPU; queries and keys times qk_scale."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # 2L projections add to the residual stream: the variance of their sum shall not grow with L
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                parameter.normal_(0, std, generator=generator)
                if name.endswith("c_attn.weight"):
                    parameter[: 2 * self.config.n_embd] *= qk_scale
            elif name.endswith("bias"):
                parameter.zero_()
        self.wte.weight[self.config.vocab_size :] = 0

    def set_alpha(self, alpha):
        """Entmax's alpha from now on, from 1 to 2; with softmax nothing changes.

        1, 1.5 and 2 have kernels of their own. All others share one that reads alpha from a tensor on the device: a
        compiled model follows as it changes, and is compiled again only for one of the three.
        """
        value = alpha = 1 if alpha < SOFTMAX else alpha
        if alpha not in (1, 1.5, 2):
            value = self.h[0].attn.alpha
            if isinstance(value, torch.Tensor):
                value.fill_(alpha)
            else:
                value = torch.tensor([alpha], dtype=torch.float32, device=self.wte.weight.device)
        for block in self.h:
            block.attn.alpha = value

    def fold(self):
        """What forward() takes in place of the blocks' parameters: 8 tensors a block (see Block.fold), float32."""
        with torch.autocast(self.wte.weight.device.type, enabled=False):
            weights, bias = [], torch.zeros_like(self.ln_f.bias)
            for block in self.h:
                weights += block.fold(bias)
                bias = weights[-1]
        return weights

    def forward(self, tokens, targets, reduction="none", weights=()):
        """tokens, targets: (B, T) int64. The cross-entropy in nats of every target, (B, T) float32, or their "mean".

        Training takes the mean, whose gradients are computed along with it (see head_loss). weights: those of fold(),
        of which matrices may have been rounded; without, a GPU makes them here, and a CPU does without.
        """
        targets = targets.flatten()
        if tokens.is_cuda or weights:
            x, bias = self.embedded(tokens).flatten(0, 1), torch.zeros_like(self.ln_f.bias)
            weights = weights or self.fold()
            for i, block in enumerate(self.h):
                x, bias = block.fused(x, bias, len(tokens), weights[8 * i : 8 * i + 8])
            x = self.ln_f(x + bias)
        else:
            x = self.hidden(tokens).flatten(0, 1)
        if reduction == "mean":
            return head_loss(rounded(x), self.wte.weight, targets, self.config.vocab_size)[0]
        blocks = zip(x.split(ROWS), targets.split(ROWS), strict=True)
        losses = [F.cross_entropy(self.logits(rows).float(), t, reduction="none") for rows, t in blocks]
        return torch.cat(losses).view_as(tokens)

    def embedded(self, tokens, start=0):
        """The residual stream before the first block, where tokens (B, T) begin at position `start`."""
        # in 16 bits from here, if any: half the traffic along it
        return rounded(self.wte(tokens) + self.wpe.weight[start : start + tokens.shape[1]])

    def hidden(self, tokens, past=None):
        """tokens: (B, T) int64 -> the last hidden states, (B, T, C).

        past: None, or one list a layer with the keys and values of the tokens before these, which grow by these.
        """
        x = self.embedded(tokens, past[0][0].shape[2] if past and past[0] else 0)
        for i, block in enumerate(self.h):
            x = block(x, past[i] if past is not None else None)
        return self.ln_f(x)

    def logits(self, x):
        """x: (B, T, C) hidden states -> (B, T, V) logits over the real vocabulary."""
        return F.linear(x, self.wte.weight)[..., : self.config.vocab_size]

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, kv_cache=True):
        """Yield new token ids one by one, continuing the list `tokens` (at least one id).

        temperature: 0 takes the likeliest token. top_k: 0 for all. generator: a CPU torch.Generator.
        Beyond n_positions tokens the oldest half of the window is dropped and the rest encoded anew, since positions
        are absolute; with and without the cache alike.
        """
        n_positions, device = self.config.n_positions, self.wte.weight.device
        window, new, past = tokens[-n_positions:], None, None
        for _ in range(max_new_tokens):
            if new is None or not kv_cache:
                past = [[] for _ in self.h] if kv_cache else None
                new = window
            x = self.hidden(torch.tensor([new], device=device), past)
            token = pick(self.logits(x[:, -1])[0].float().cpu(), temperature, top_k, top_p, generator)
            yield token
            window, new = window + [token], [token]
            if len(window) > n_positions:
                window, new = window[-max(1, n_positions // 2) :], None


def pick(logits, temperature, top_k, top_p, generator):
    """Draw a token id from logits (V,): tempered, cut to the top_k likeliest, then to the nucleus of mass top_p.

    Raises UserError where they are not finite.
    """
    tempered = logits / max(temperature, 1e-6)  # float32 could not divide by less
    if not tempered.isfinite().all():
        raise UserError("the logits of the model are not finite, it writes nothing: an earlier checkpoint may")
    if temperature < 1e-6:
        return int(logits.argmax())
    probabilities, ids = F.softmax(tempered, dim=-1).sort(descending=True, stable=True)
    if top_k > 0:
        probabilities[top_k:] = 0
    # a token stays while those before it have not yet filled top_p of what top_k left
    probabilities[probabilities.cumsum(0) - probabilities > top_p * probabilities.sum()] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


# -----------------------------------------------------------------------------
# weights in and out of the Hugging Face layout


TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # their Conv1D


def load_hf(source, attention, alpha):
    """A GPT with the weights of a Hugging Face GPT-2: a local folder, or a hub name that huggingface_hub downloads.

    The folder holds config.json and safetensors (one file, or several with their index). Raises UserError otherwise.
    """
    folder = Path(source)
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(f"init_from: no folder {source}")
        try:
            patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
            folder = Path(snapshot_download(source, allow_patterns=patterns))
        except Exception as error:  # offline, no such repository, gated: the hub has a class for each
            raise UserError(f"init_from: no folder {source}, and the hub gave {type(error).__name__}") from error
    try:
        hf = json.loads((folder / "config.json").read_text())
        index = folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
        weights = {}
        for name in files or ["model.safetensors"]:
            weights |= load_file(folder / name)
        if not isinstance(hf, dict):
            raise ValueError("config.json holds no settings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(f"init_from: {folder} is no GPT-2 with config.json and safetensors: {error}") from error
    expected = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    expected |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, value in expected.items():
        if hf.get(key, value) != value:
            raise UserError(f"init_from: {folder}/config.json has {key} = {hf[key]}, this GPT-2 needs {value}")
    try:
        sizes = {key: hf[key] for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
        config = GPTConfig(**sizes, attention=attention, alpha=alpha)
    except KeyError as error:
        raise UserError(f"init_from: {folder}/config.json has no {error}") from error
    except ValueError as error:
        raise UserError(f"init_from: {folder}/config.json: {error}") from error
    if hf.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"init_from: {folder}/config.json has n_inner = {hf['n_inner']}, this GPT-2 needs 4 n_embd")
    if config.n_layer > len(weights):
        raise UserError(f"init_from: {folder}: {len(weights)} weights are not those of {config.n_layer} layers")
    with torch.device("meta"):
        model = GPT(config)
    weights = {name.removeprefix("transformer."): tensor.float() for name, tensor in weights.items()}
    state = {}
    for name, parameter in model.named_parameters():
        tensor = weights.get(name, torch.empty(0))
        if tensor.dim() != parameter.dim():
            raise UserError(f"init_from: {folder}: the weights lack {name}, or it is of another shape")
        if name.endswith(TRANSPOSED):
            tensor = tensor.t().contiguous()
        if name == "wte.weight":
            tensor = F.pad(tensor, (0, 0, 0, len(parameter) - sizes["vocab_size"]))
        if tensor.shape != parameter.shape:
            raise UserError(f"init_from: {folder}: the weights lack {name}, or config.json gives it another shape")
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model


def save_hf(model, folder, end_of_text):
    """Write config.json and model.safetensors (float32) that GPT2LMHeadModel.from_pretrained loads, bit for bit.

    end_of_text: the id that starts and ends documents.
    """
    config, folder = model.config, Path(folder)
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().float().cpu()
        tensor = tensor[: config.vocab_size] if name == "wte.weight" else tensor
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        weights[f"transformer.{name}"] = tensor.contiguous()
    hf = {key: value for key, value in asdict(config).items() if key not in ("attention", "alpha")}
    hf |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
    hf |= {"layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    hf |= {"tie_word_embeddings": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which save_file keeps from others
