"""GPT-2 against Hugging Face's, weights in and out, generation.

python -m pytest tests/test_model.py
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel

from cli import UserError
from model import GPT, GPTConfig, load_hf, pick, save_hf

TINY = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 96, "vocab_size": 257}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A random GPT-2 of Hugging Face's, with weights large enough that every part matters."""
    torch.manual_seed(1)
    hf = GPT2LMHeadModel(GPT2Config(**TINY, bos_token_id=256, eos_token_id=256))
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(folder)
    return folder


def new_model(attention="softmax", alpha=1.5, **changes):
    model = GPT(GPTConfig(**TINY | changes, attention=attention, alpha=alpha))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_logits_equal_hugging_face(hf_folder):
    ours, hf = load_hf(str(hf_folder), "softmax", 1.5), GPT2LMHeadModel.from_pretrained(hf_folder).eval()
    tokens = torch.randint(257, (3, 96), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = hf(tokens).logits
        got = ours.logits(ours.hidden(tokens))
        assert expected.std() > 0.5
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        loss = ours(tokens[:, :-1], tokens[:, 1:]).mean()
        torch.testing.assert_close(loss, hf(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-5)


def test_alpha_changes_as_if_built_with_it():
    """In a compiled model too, which compiles for 1, for all in between, and for 1.5."""
    counter = CompileCounterWithBackend("aot_eager")
    changing = peaked(new_model("entmax", 1.5))
    compiled = torch.compile(changing, dynamic=False, fullgraph=True, backend=counter)
    tokens = torch.randint(257, (2, 41), generator=torch.Generator().manual_seed(2))
    losses = []
    for alpha in (1.0, 1 + 1e-9, 1.05, 1.2, 1.4, 1.5, 1.5):
        changing.set_alpha(alpha)
        loss = compiled(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        expected = peaked(new_model("entmax", alpha))(tokens[:, :-1], tokens[:, 1:]).mean()
        torch.testing.assert_close(loss, expected)
        losses.append(loss.item())
    assert len({round(loss, 5) for loss in losses}) == 5 and counter.frame_count == 3
    assert losses[0] == pytest.approx(peaked(new_model())(tokens[:, :-1], tokens[:, 1:]).mean().item())


def peaked(model):
    """A model that attends to few tokens, so that alpha matters."""
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight *= 30
    return model


def test_queries_and_keys_scaled_at_the_start():
    plain, scaled = new_model(), GPT(GPTConfig(**TINY))
    scaled.init_weights(torch.Generator().manual_seed(0), 0.5)
    C = TINY["n_embd"]
    for name, parameter in plain.named_parameters():
        expected = parameter.detach().clone()
        if "c_attn.weight" in name:
            expected[: 2 * C] *= 0.5
        assert torch.equal(dict(scaled.named_parameters())[name], expected), name


def test_weights_go_out_and_back_bit_for_bit(hf_folder, tmp_path):
    save_hf(load_hf(str(hf_folder), "softmax", 1.5), tmp_path, 256)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(hf_folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    expected = GPT2LMHeadModel.from_pretrained(hf_folder)
    for (name, a), (_, b) in zip(loaded.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.config.eos_token_id == 256


def test_sharded_weights_and_openai_names(hf_folder, tmp_path):
    GPT2LMHeadModel.from_pretrained(hf_folder).save_pretrained(tmp_path / "parts", max_shard_size="200kB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    # the hub's gpt2 has no "transformer." in front and carries its causal masks along
    bare = {k.removeprefix("transformer."): v for k, v in load_file(hf_folder / "model.safetensors").items()}
    (tmp_path / "bare").mkdir()
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 96, 96)}, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    expected = load_hf(str(hf_folder), "softmax", 1.5).state_dict()
    for folder in ("parts", "bare"):
        got = load_hf(str(tmp_path / folder), "softmax", 1.5).state_dict()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_function": "relu"}, "activation_function = relu"),
        ({"model_type": "llama"}, "model_type = llama"),
        ({"n_embd": 128}, "another shape"),
        ({"n_layer": 4}, "lack h.3"),
    ],
)
def test_other_architectures_are_refused(hf_folder, tmp_path, change, message):
    config = json.loads((hf_folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((hf_folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        load_hf(str(tmp_path), "softmax", 1.5)


def test_a_folder_without_weights_is_refused(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="init_from"):
            load_hf(str(source), "softmax", 1.5)


def test_initialisation():
    model = new_model(n_layer=8, n_embd=256)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter[:257].std().item() == pytest.approx(std, rel=0.03), name
    again = new_model(n_layer=8, n_embd=256)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_padded_vocabulary_is_out_of_reach(attention):
    model = new_model(attention)
    assert model.wte.weight.shape[0] == 384
    tokens = torch.randint(257, (2, 33))
    losses = model(tokens[:, :-1], tokens[:, 1:])
    assert losses.shape == (2, 32) and losses.dtype == torch.float32
    with torch.no_grad():
        model.wte.weight[257:] = 100.0
    with_other_padding = model(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(with_other_padding, losses)
    with_other_padding.sum().backward()
    assert (model.wte.weight.grad[257:] == 0).all()
    drawn = list(model.generate([256], 40, temperature=5.0, generator=torch.Generator().manual_seed(0)))
    assert len(drawn) == 40 and max(drawn) <= 256


@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_no_token_sees_a_later_one(attention):
    model = new_model(attention)
    tokens = torch.randint(257, (1, 50))
    changed = tokens.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 257
    with torch.no_grad():
        a, b = model.logits(model.hidden(tokens)), model.logits(model.hidden(changed))
    assert torch.equal(a[:, :30], b[:, :30])
    assert (a[:, 30:] != b[:, 30:]).any()


@pytest.mark.parametrize("attention, alpha", [("softmax", 1.5), ("entmax", 1.5), ("entmax", 1.3), ("entmax", 1.0)])
@pytest.mark.parametrize("prompt_length", [1, 40, 96, 200])
def test_cache_gives_the_same_text(hf_folder, attention, alpha, prompt_length):
    model = load_hf(str(hf_folder), attention, alpha)
    prompt = torch.randint(257, (prompt_length,), generator=torch.Generator().manual_seed(3)).tolist()
    for temperature in (0, 1):
        texts = []
        for kv_cache in (True, False):
            generator = torch.Generator().manual_seed(4)
            # 120 tokens slide beyond the 96 positions
            texts.append(list(model.generate(prompt, 120, temperature, generator=generator, kv_cache=kv_cache)))
        assert texts[0] == texts[1] and len(texts[0]) == 120
    assert len(set(texts[0])) > 20


def test_greedy_text_equals_hugging_face(hf_folder):
    ours, hf = load_hf(str(hf_folder), "softmax", 1.5), GPT2LMHeadModel.from_pretrained(hf_folder).eval()
    prompt = [5, 9, 200, 31]
    expected = hf.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert list(ours.generate(prompt, 60, temperature=0)) == expected[0, 4:].tolist()


def draws(logits, n=4000, **settings):
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    counts = torch.zeros(len(logits))
    for _ in range(n):
        counts[pick(logits, generator=generator, **settings)] += 1
    return counts / n


def test_pick():
    logits = torch.tensor([0.1, 0.3, 0.05, 0.4, 0.15]).log()
    assert draws(logits, n=5, temperature=0).tolist() == [0, 0, 0, 1, 0]
    torch.testing.assert_close(draws(logits), logits.exp(), atol=0.03, rtol=0)
    squared = logits.exp() ** 2
    torch.testing.assert_close(draws(logits, temperature=0.5), squared / squared.sum(), atol=0.03, rtol=0)
    torch.testing.assert_close(draws(logits, top_k=2), torch.tensor([0, 3 / 7, 0, 4 / 7, 0]), atol=0.03, rtol=0)
    # 0.4 + 0.3 reach 0.65, so these two are the nucleus; a tiny nucleus keeps the likeliest
    torch.testing.assert_close(draws(logits, top_p=0.65), torch.tensor([0, 3 / 7, 0, 4 / 7, 0]), atol=0.03, rtol=0)
    assert draws(logits, n=20, top_p=0.0).tolist() == [0, 0, 0, 1, 0]
    # the nucleus is taken of what top_k leaves: 0.4 of 0.7 reaches a half
    assert draws(logits, n=20, top_k=2, top_p=0.5).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("attention, alpha", [("softmax", 1.5), ("entmax", 1.5), ("entmax", 1.3)])
def test_one_graph_without_a_break(attention, alpha):
    model = new_model(attention, alpha)
    tokens = torch.randint(257, (2, 65))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    losses, expected = compiled(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), model.h[0].attn.c_attn.weight)
    (expected,) = torch.autograd.grad(expected.sum(), model.h[0].attn.c_attn.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ("softmax", "entmax"))
def test_fused_blocks_do_as_blocks(attention):
    """In float64 the stream after them, less what is kept beside it, and all gradients."""
    model = new_model(attention).double()
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases too are to matter
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 41, 64, dtype=torch.float64, requires_grad=True)
    expected, rows, bias = x, x.flatten(0, 1), torch.zeros(64, dtype=torch.float64)
    for block in model.h:
        expected, (rows, bias) = block(expected), block.fused(rows, bias, 2, block.fold(bias))
    got, weights, tensors = (rows + bias).view_as(x), torch.randn_like(x), [x, *model.h.parameters()]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((weights * y).sum(), tensors) for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_positions_beyond_1024():
    model = new_model(n_positions=1500)
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(1, 1500).long(), torch.ones(1, 1500).long())).all()
