"""How sparse attention is, against dense float64 entmax: python -m pytest tests/test_sparsity.py"""

import json
import math
import warnings

import conftest
import entmax
import numpy as np
import pytest
import torch
from matplotlib.image import imread

import evaluate
import sparsity
from adasplash_kernels.reference import attention_weights
from cli import UserError
from data.shards import TokenStream
from model import GPT, GPTConfig
from train_gpt2 import Machine
from train_gpt2 import main as train

CPU = Machine(torch.device("cpu"))
PACKAGE = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}


def sharpen(weights, n_layer, n_embd):
    """Change a GPT's initial weights (a state_dict) so that its entmax has many zeros, and they cluster in tiles."""
    generator = torch.Generator().manual_seed(5)
    walk = torch.randn(weights["wpe.weight"].shape, generator=generator).cumsum(0)
    weights["wpe.weight"].copy_(walk / 10)
    for i in range(n_layer):
        # their standard deviation was 0.02 * n_embd**0.5
        weights[f"h.{i}.attn.c_attn.weight"][: 2 * n_embd] *= 100 / n_embd**0.5


def sharp_model(alpha, T, n_layer=2, n_head=3):
    config = GPTConfig(n_layer, n_head, 8 * n_head, T, 257, "entmax", alpha)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(3))
    sharpen(model.state_dict(), n_layer, config.n_embd)
    return model


@torch.no_grad()
def dense_weights(model, tokens, rows):
    """The weights of every head on a list of tokens, (L, H, T, T) float64; rows: entmax or softmax of (L, H, keys)."""
    model, inputs, T = model.double(), [], len(tokens)
    hooks = [block.attn.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for block in model.h]
    model(torch.tensor([tokens]), torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    q, k, _ = torch.cat(inputs).permute(2, 0, 3, 1, 4)  # (L, H, T, D) each
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    p = torch.zeros_like(scores)
    for i in range(T):
        p[:, :, i, : i + 1] = rows(scores[:, :, i, : i + 1])
    return p


def entmax_rows(alpha):
    return lambda scores: PACKAGE.get(alpha, lambda s, dim: entmax.entmax_bisect(s, alpha, dim, 60))(scores, dim=-1)


def count_naively(maps):
    """What measure() finds, from a list of (L, H, T, T) float64 weights."""
    n_layer, n_head, T, _ = maps[0].shape
    nonzero, mean, p99, empty = np.zeros((4, n_layer, n_head))
    for layer in range(n_layer):
        for head in range(n_head):
            here = [p[layer, head].numpy() for p in maps]
            pairs = [p[np.tri(T, dtype=bool)] != 0 for p in here]
            sizes = [np.count_nonzero(row) for p in here for row in p]
            tiles = [
                not p[i : i + 64, j : j + 64].any() for p in here for i in range(0, T, 64) for j in range(0, i + 1, 64)
            ]
            nonzero[layer, head], empty[layer, head] = np.mean(pairs), np.mean(tiles)
            mean[layer, head], p99[layer, head] = np.mean(sizes), np.percentile(sizes, 99, method="inverted_cdf")
    return {"nonzero_share": nonzero, "support_mean": mean, "support_p99": p99, "empty_tiles": empty}


def check(measured, expected, **tolerance):
    for name, values in expected.items():
        np.testing.assert_allclose(measured["heads"][name], values, **tolerance, err_msg=name)
        if name != "support_p99":
            assert measured[name] == pytest.approx(values.mean(), rel=tolerance.get("rtol"), abs=tolerance.get("atol"))


# -----------------------------------------------------------------------------
# measuring


# 450 tokens of 12 heads come in blocks of 48 rows, which straddle tiles; those of 1100 tokens in two groups of heads
@pytest.mark.parametrize(
    "T, alpha, n_head, n_layer",
    [(1, 1.5, 3, 2), (63, 1.5, 3, 2), (65, 2.0, 3, 2), (130, 1.25, 3, 2), (450, 1.5, 12, 1), (1100, 1.5, 12, 1)],
)
def test_counts_are_those_of_dense_weights(shards, T, alpha, n_head, n_layer):
    model = sharp_model(alpha, T, n_layer, n_head).double()
    stream, windows = TokenStream([shards / "text_val_000000.bin"], T, 257), 3 if T < 200 else 1
    measured = sparsity.measure(model, stream, windows, CPU)
    maps = [dense_weights(model, stream.window(w)[:-1].tolist(), entmax_rows(alpha)) for w in range(windows)]
    expected = count_naively(maps)
    if T > 1:
        assert 0.01 < expected["nonzero_share"].mean() < 0.8
    if T > 64:
        assert 0.02 < expected["empty_tiles"].mean() < 0.98
    check(measured, expected, rtol=1e-12)
    assert measured["sequences"] == windows and measured["sequence_length"] == T
    assert all(not block.attn._forward_pre_hooks for block in model.h)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_counts_are_those_of_the_cpu(shards):
    torch.set_float32_matmul_precision("highest")
    model, cuda = sharp_model(1.5, 130), Machine(torch.device("cuda"))
    stream = TokenStream([shards / "text_val_000000.bin"], 130, 257)
    expected = sparsity.measure(model, stream, 3, CPU)
    got = sparsity.measure(model.cuda(), stream, 3, cuda)
    for name in ("nonzero_share", "empty_tiles", "support_mean"):
        assert got[name] == pytest.approx(expected[name], rel=1e-3)
    tokens = stream.window(0)[:-1].tolist()
    maps = [sparsity.attention_map(model, tokens, 1, 2, cuda), sparsity.attention_map(model.cpu(), tokens, 1, 2, CPU)]
    for a, b in zip(*maps, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_rows_sum_to_1_and_are_the_packages(alpha, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    q, k = (4 * torch.randn(2, 6, R, 8, generator=generator, dtype=dtype) for R in (1000, 1063))
    whole = torch.full((12, 1000, 1063), math.nan, dtype=dtype)
    for heads, rows, p in attention_weights(q, k, alpha, 0.3):
        assert p.dtype == dtype and p.numel() < 2**19
        whole[heads, rows] = 0
        whole[heads, rows, : p.shape[2]] = p
    assert (whole >= 0).all() and (whole.sum(-1) - 1).abs().max() < tolerance
    scores = 0.3 * (q.double() @ k.double().mT).flatten(0, 1)
    for i in (0, 1, 31, 32, 500, 999):
        expected = entmax_rows(alpha)(scores[:, i, : 64 + i])
        torch.testing.assert_close(whole[:, i, : 64 + i].double(), expected, rtol=0, atol=tolerance)
        assert not whole[:, i, 64 + i :].any()


def test_autocast_of_the_caller_changes_no_weight():
    q, k = (4 * torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    ((_, _, expected),) = attention_weights(q, k, 1.5, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        ((_, _, p),) = attention_weights(q, k, 1.5, 0.3)
        assert torch.equal(p, expected)
        assert (q @ k.mT).dtype == torch.bfloat16


def test_weights_that_are_not_finite_are_refused(shards):
    model = sharp_model(1.5, 64)
    with torch.no_grad():
        model.h[1].attn.c_attn.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        sparsity.measure(model, TokenStream([shards / "text_val_000000.bin"], 64, 257), 1, CPU)


def test_the_maps_of_a_head(shards):
    model = sharp_model(1.5, 70).double()
    tokens = TokenStream([shards / "text_val_000000.bin"], 70, 257).window(3)[:-1].tolist()
    softmax, sparse = sparsity.attention_map(model, tokens, 1, 2, CPU)
    np.testing.assert_allclose(softmax, dense_weights(model, tokens, lambda s: s.softmax(-1))[1, 2], atol=1e-12)
    np.testing.assert_allclose(sparse, dense_weights(model, tokens, entmax_rows(1.5))[1, 2], atol=1e-12)
    assert np.count_nonzero(sparse) < np.count_nonzero(softmax) / 2 == 70 * 71 / 4


def test_the_sparsest_head():
    assert sparsity.sparsest({"heads": {"nonzero_share": [[0.5, 0.2, 0.3], [0.4, 0.3, 0.1]]}}) == (1, 2)


# -----------------------------------------------------------------------------
# evaluate.py --sparsity


def call(capsys, *args):
    return conftest.call(evaluate.main, capsys, *args)


@pytest.fixture(scope="module")
def run_dir(flags, tmp_path_factory):
    """A run of sequences of 130 tokens with many zeros."""
    folder = tmp_path_factory.mktemp("sharp") / "run"
    longer = ["--sequence_length=130", "--val_tokens=2210", "--max_steps=0", "--warmup_steps=0"]
    train([*flags, *longer, "--attention=entmax", f"--run_dir={folder}"])
    change(folder / "checkpoint_0", lambda state: sharpen(state["model"], 4, 128))
    return folder


def change(path, function):
    state = torch.load(path, weights_only=True)
    function(state)
    torch.save(state, path)


def test_evaluate_prints_draws_and_keeps_what_dense_weights_give(run_dir, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "--run_dir", run_dir, "--sparsity", "--json")
    assert code == 0, err
    result = json.loads(out)
    measured = result["sparsity"]
    state = torch.load(run_dir / "checkpoint_0", weights_only=True)
    model = GPT(GPTConfig(**state["gpt_config"]))
    model.load_state_dict(state["model"])
    stream = TokenStream([shards / "text_val_000000.bin"], 130, 257)
    maps = [dense_weights(model, stream.window(w)[:-1].tolist(), entmax_rows(1.5)) for w in range(16)]
    expected = count_naively(maps)
    assert measured["sequences"] == 16 and expected["nonzero_share"].mean() < 0.5 < 30 * expected["empty_tiles"].mean()
    check(measured, expected, rtol=0.02, atol=2e-3)  # float32 takes a few weights near zero for others
    assert json.loads((run_dir / "sparsity.json").read_text()) == {"step": 0, "alpha": 1.5} | measured
    assert (tmp_path / "sparsity.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparsity.png"]
    kept = (run_dir / "sparsity.json").read_bytes()
    code, _, err = call(capsys, "--run_dir", run_dir, "--sparsity", "--val_tokens", 130)
    assert code == 0 and (run_dir / "sparsity.json").read_bytes() == kept, err  # not of one sequence

    code, out, err = call(capsys, "--checkpoint", run_dir / "checkpoint_0", "--sparsity")
    assert code == 0, err
    first, title, names, *layers, means = out.splitlines()
    assert first.startswith(f"validation loss {result['val_loss']:.4f}") and "16 sequences of 130 tokens" in title
    assert [line.split()[0] for line in layers] == ["0", "1", "2", "3"]
    assert means.split()[:2] == ["all", f"{100 * measured['nonzero_share']:.2f}"]
    shares = [100 * share for share in measured["heads"]["nonzero_share"][2]]
    assert f"{np.mean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})" in layers[2]


def test_two_processes_find_what_one_finds(run_dir, run, tmp_path):
    args = ["--run_dir", run_dir, "--json", "--sparsity", "--out", tmp_path / "heads.png", "--prompt", "the words"]
    (_, one, _), (code, two, err) = run("evaluate.py", *args), run("evaluate.py", *args, ranks=2)
    assert code == 0, err
    assert json.loads(two)["sparsity"] == json.loads(one)["sparsity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.png", "heads_map.png"]


def test_the_map_shows_exact_zeros_in_a_colour_of_their_own(run_dir, tmp_path, capsys):
    """In the entmax panel on the right, and none in that of softmax."""
    args = ["--run_dir", run_dir, "--sparsity", "--prompt", "the words " * 2, "--out", tmp_path / "x.png"]
    code, _, err = call(capsys, *args, "--head", "3,1")
    assert code == 0 and "x_map.png: layer 3, head 1" in err
    pixels = imread(tmp_path / "x_map.png")[:, :, :3]
    grey = (np.abs(pixels - 211 / 255) < 1e-3).all(2)
    left, right = grey[:, : grey.shape[1] * 46 // 100].sum(), grey[:, grey.shape[1] * 46 // 100 :].sum()
    assert left < 100 and right > 10_000
    code, _, err = call(capsys, *args)
    shares = np.array(json.loads((run_dir / "sparsity.json").read_text())["heads"]["nonzero_share"])
    layer, head = divmod(int(shares.argmin()), 4)
    assert code == 0 and f"x_map.png: layer {layer}, head {head}" in err


def test_tokens_of_any_text_are_labels(tmp_path):
    """No formulas, and no warnings for what the font lacks."""
    with warnings.catch_warnings(action="error"):
        sparsity.draw_map(np.eye(3), np.eye(3), [" $x^$", "日\n", "\x00"], 0, 0, tmp_path / "map.png")
    assert imread(tmp_path / "map.png").shape[0] > 500


def test_a_run_that_cannot_be_written_to_costs_a_line(run_dir, tmp_path, capsys):
    (tmp_path / "run" / "sparsity.json").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint_0").write_bytes((run_dir / "checkpoint_0").read_bytes())
    code, out, err = call(capsys, "--run_dir", tmp_path / "run", "--sparsity", "--json", "--out", tmp_path / "x.png")
    assert code == 0 and "sparsity" in json.loads(out) and (tmp_path / "x.png").exists()
    assert err.count("sparsity.json: cannot be written") == 1
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--out", "x.png"], "--out goes with --sparsity"),
        (["--prompt", "x"], "--prompt goes with --sparsity"),
        (["--sparsity", "--head", "0,0"], "--head goes with --prompt"),
        (["--sparsity", "--prompt", "x", "--head", "1"], "LAYER,HEAD"),
        (["--sparsity", "--prompt", "x", "--head", "0,1,2"], "LAYER,HEAD"),
        (["--sparsity", "--prompt", "x", "--head=-1,0"], "LAYER,HEAD"),
        (["--sparsity", "--prompt", "x", "--head", "4,0"], "0,0 to 3,3"),
        (["--sparsity", "--prompt", "x", "--head", "0,4"], "0,0 to 3,3"),
        (["--sparsity", "--prompt", ""], "0 tokens"),
        (["--sparsity", "--prompt", "x" * 131], "131 tokens, the model takes 1 to 130"),
        (["--sparsity", "--prompt", "\udcff"], "not UTF-8"),
        (["--sparsity", "--out", "nowhere/x.png"], "nowhere/x.png: cannot be written"),
        (["--sparsity", "--out", "x" * 300 + ".png"], "cannot be written"),
        (["--sparsity", "--out", "folder.png"], "folder.png: is a folder"),
        (["--sparsity", "--out", "x.pdf"], ".png"),
        (["--sparsity", "--out", ""], ".png"),
    ],
)
def test_mistakes_get_one_line_before_the_work(run_dir, tmp_path, monkeypatch, capsys, wrong, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    code, out, err = call(capsys, "--run_dir", run_dir, *wrong)
    err = err.replace(f"reading {run_dir / 'checkpoint_0'}\n", "")
    assert code == 2 and out == "" and words in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("config", [{"attention": "softmax"}, {"alpha": 1.0}])
def test_softmax_has_no_sparsity(run_dir, tmp_path, capsys, config):
    (tmp_path / "checkpoint_0").write_bytes((run_dir / "checkpoint_0").read_bytes())
    change(tmp_path / "checkpoint_0", lambda state: state["gpt_config"].update(config))
    code, out, err = call(capsys, "--checkpoint", tmp_path / "checkpoint_0", "--sparsity")
    assert code == 2 and out == "" and "positive" in err and err.count("\n") == 1, err
