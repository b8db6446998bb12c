"""How sparse entmax attention is, by layer and head: counted on text, as a table and as pictures.

Counted are the causal pairs, query >= key. The support of a row is how many keys its query gives a weight that is not
exactly 0. A tile of 64 x 64 with causal pairs is empty if all its weights are exactly 0: such tiles can be left out.
Source: AdaSplash (arXiv 2502.12082, figure 4).
"""

import io
import os
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from adasplash_kernels.reference import attention_weights
from cli import Progress, UserError, replacing

SEQUENCES = 16  # validation windows: 16,384 rows a head at T = 1,024, enough for a 99th percentile
TILE = 64
DPI = 150

# -----------------------------------------------------------------------------
# measuring


@contextmanager
def watching(model, look):
    """Within, hidden() of an entmax GPT calls look(layer, q, k), with the q and k (B, H, T, D) that attention gets."""

    def on_input(layer, attention, inputs):  # of one layer at a time
        q, k, _ = inputs[0].permute(2, 0, 3, 1, 4)
        look(layer, q, k)

    handles = [block.attn.register_forward_pre_hook(partial(on_input, i)) for i, block in enumerate(model.h)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def supports(q, k, alpha):
    """q, k (B, H, T, D) -> the support of each row, (B H, T) int64 keys, and which tiles have any, (B H, n, n) bool."""
    if q.is_cuda and q.dtype == torch.float32:
        q, k = q.double(), k.double()  # in float32 TF32 would round the scores, which the kernels do not
    (B, H, T, D), n = q.shape, -(-q.shape[2] // TILE)
    sizes = torch.zeros(B * H, T, dtype=torch.int64, device=q.device)
    busy = torch.zeros(B * H, n, n, dtype=torch.bool, device=q.device)
    for heads, queries, p in attention_weights(q, k, alpha, D**-0.5):
        support = p > 0
        sizes[heads, queries] = support.sum(-1)
        # the queries may start and end inside a tile: fill it up
        edges = (0, -p.shape[2] % TILE, queries.start % TILE, -queries.stop % TILE)
        tiles = F.pad(support, edges).unflatten(2, (-1, TILE)).any(3).unflatten(1, (-1, TILE)).any(2)
        first = queries.start // TILE
        busy[heads, first : first + tiles.shape[1], : tiles.shape[2]] |= tiles
    return sizes, busy


@torch.no_grad()
def measure(model, stream, windows, machine, quiet=True):
    """Count the attention weights of an entmax GPT on a stream's first windows, the same whatever the ranks.

    Returns the same plain values on every rank: nonzero_share and empty_tiles (from 0 to 1) and support_mean (keys),
    means over all heads; sequences, sequence_length; and heads, with the same three and support_p99 (keys; the smallest
    that 99% of the rows do not exceed) as lists of one list a layer. Raises UserError if a weight is not finite.
    """
    n_layer, n_head, T = model.config.n_layer, model.config.n_head, stream.sequence_length
    n_tiles = -(-T // TILE)
    rows = torch.zeros(n_layer, n_head, T + 1, dtype=torch.int64)  # how many have a support of 0..T keys
    busy = torch.zeros(n_layer, n_head, dtype=torch.int64)  # how many tiles are not empty

    def count(layer, q, k):
        sizes, tiles = (x.cpu() for x in supports(q, k, model.config.alpha))
        rows[layer].scatter_add_(1, sizes, torch.ones_like(sizes))
        busy[layer] += tiles.sum((1, 2))

    progress = Progress(windows, "sequences", "sparsity", quiet=quiet or machine.rank > 0)
    with watching(model, count):
        for w in range(machine.rank, windows, machine.world_size):
            tokens = torch.from_numpy(stream.batch([w])[:, :-1]).to(machine.device)
            with machine.precision():
                model.hidden(tokens)
            progress.update(min(machine.world_size, windows - w))
    progress.close()
    rows, busy = (machine.sum(counts.to(machine.device)).cpu() for counts in (rows, busy))
    if rows[:, :, 0].any():  # a row sums to 1, unless it is NaN
        raise UserError("--sparsity: attention weights of this model are not finite")

    support, n_rows = (rows * torch.arange(T + 1)).sum(-1).double(), windows * T
    pairs, tiles = windows * T * (T + 1) // 2, windows * n_tiles * (n_tiles + 1) // 2
    heads = {
        "nonzero_share": support / pairs,
        "support_mean": support / n_rows,
        "support_p99": (100 * rows.cumsum(-1) < 99 * n_rows).sum(-1),
        "empty_tiles": (tiles - busy).double() / tiles,
    }
    means = {name: heads[name].mean().item() for name in ("nonzero_share", "empty_tiles", "support_mean")}
    heads = {name: values.tolist() for name, values in heads.items()}
    return means | {"sequences": windows, "sequence_length": T, "heads": heads}


def sparsest(measured):
    """The (layer, head) with the smallest share of non-zero weights, which shows best what entmax leaves out."""
    shares = np.array(measured["heads"]["nonzero_share"])
    layer, head = np.unravel_index(shares.argmin(), shares.shape)
    return int(layer), int(head)


@torch.no_grad()
def attention_map(model, tokens, layer, head, machine):
    """The weights of one head on a list of T token ids: by softmax of its scores, and by entmax; (T, T) float64."""
    kept = []

    def keep(i, q, k):
        if i == layer:
            kept.extend(x[:, head : head + 1].cpu().double() for x in (q, k))

    with watching(model, keep), machine.precision():
        model.hidden(torch.tensor([tokens], device=machine.device))
    (q, k), T = kept, len(tokens)
    scale = q.shape[3] ** -0.5
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    softmax = F.softmax((scale * q[0, 0] @ k[0, 0].mT).masked_fill(future, float("-inf")), dim=-1)
    entmax = torch.zeros(T, T, dtype=torch.float64)
    for _, rows, p in attention_weights(q, k, model.config.alpha, scale):
        entmax[rows, : p.shape[2]] = p[0]
    return softmax.numpy(), entmax.numpy()


# -----------------------------------------------------------------------------
# showing


COLUMNS = {  # of the table and of the heads' picture: title, unit, a factor for it, digits
    "nonzero_share": ("non-zero weights", "% of causal pairs", 100, 2),
    "empty_tiles": (f"empty {TILE} x {TILE} tiles", "% of causal tiles", 100, 1),
    "support_mean": ("support of a row, mean", "keys", 1, 1),
    "support_p99": ("support of a row, 99th percentile", "keys", 1, 0),
}


def table(measured):
    """What measure() found as lines of text: each layer's mean over its heads, and its least and greatest head."""
    size = f"{measured['sequences']} sequences of {measured['sequence_length']:,} tokens"
    lines = [f"attention weights on {size}: mean over the heads (least to greatest head)"]
    titles = ("non-zero, %", "empty tiles, %", "support, keys", "its 99th percentile")
    lines.append("layer" + "".join(f"{title:>25}" for title in titles))
    values = {name: factor * np.array(measured["heads"][name]) for name, (_, _, factor, _) in COLUMNS.items()}
    for layer in [*range(len(values["nonzero_share"])), "all"]:
        line = f"{layer:>5}"
        for name, (*_, digits) in COLUMNS.items():
            v = values[name] if layer == "all" else values[name][layer]
            line += f"{f'{v.mean():.{digits}f} ({v.min():.{digits}f} to {v.max():.{digits}f})':>25}"
        lines.append(line)
    return "\n".join(lines)


def draw_heads(measured, alpha, path):
    """Draw what measure() found as heat maps, layers x heads, into a PNG. Raises UserError if it cannot be written."""
    from matplotlib.figure import Figure  # half a second, which evaluate.py alone need not wait

    figure = Figure(figsize=(16, 5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    panels = ("nonzero_share", "empty_tiles", "support_p99")  # the mean support is the share, times (T + 1) / 2
    for axes, name in zip(figure.subplots(1, 3), panels, strict=True):
        title, unit, factor, _ = COLUMNS[name]
        values = factor * np.array(measured["heads"][name])
        image = axes.imshow(values, vmin=0, vmax=max(values.max(), 1), aspect="auto")
        figure.colorbar(image, ax=axes, label=unit)
        n_layer, n_head = values.shape
        axes.set(title=title, xlabel="head", ylabel="layer")
        axes.set(xticks=range(0, n_head, -(-n_head // 16)), yticks=range(0, n_layer, -(-n_layer // 16)))
    size = f"{measured['sequences']} validation sequences of {measured['sequence_length']:,} tokens"
    figure.suptitle(f"entmax attention, alpha = {alpha:g}, {size}")
    save(figure, path)


def draw_map(softmax, entmax, texts, layer, head, path):
    """Draw a head's two maps (T, T), queries x keys, side by side into a PNG: weights in colours, exact zeros in grey.

    texts: those of the T tokens, for ticks where they are few. Raises UserError if the PNG cannot be written.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    T = len(texts)
    side = min(max(6, T / 120), 24)  # inches: room for a dot a weight
    figure = Figure(figsize=(2 * side + 1, side + 0.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, p in zip(panels, ("softmax of the same scores", "entmax"), (softmax, entmax), strict=True):
        zeros = np.ma.masked_where((p != 0) | ~np.tri(T, dtype=bool), p)
        axes.imshow(zeros, cmap=ListedColormap(["lightgrey"]), interpolation="nearest")
        weights = np.ma.masked_equal(p, 0)
        image = axes.imshow(weights, norm=LogNorm(1e-4, 1), cmap="viridis_r", interpolation="nearest")
        share = np.count_nonzero(p) / (T * (T + 1) // 2)
        axes.set(title=f"{name}: {100 * share:.1f}% of the weights are not 0", xlabel="key", ylabel="query")
        if T <= 40:
            labels = [repr(text)[1:-1].replace(" ", "\u2423") for text in texts]  # a space that can be seen
            axes.set_xticks(range(T), labels, rotation=90, fontsize=8, parse_math=False)  # $ is no formula
            axes.set_yticks(range(T), labels, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=panels, label="attention weight", extend="min", shrink=0.8)
    panels[1].legend(handles=[Patch(color="lightgrey", label="exactly 0")], loc="upper right")
    figure.suptitle(f"layer {layer}, head {head}")
    save(figure, path)


def check_picture(path):
    """Find out before the work, not after it, whether a PNG can be drawn and written. Raises UserError."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("--sparsity draws with matplotlib: pip install -r requirements.txt") from error
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: should end in .png")
    if os.path.isdir(path):
        raise UserError(f"--out {path}: is a folder")
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error


def save(figure, path):
    """Write a figure as PNG, whole or not at all. Raises UserError if it cannot be written."""
    png = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # a character that the font lacks is drawn as a box
        figure.savefig(png, format="png", dpi=DPI)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(png.getvalue())
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
