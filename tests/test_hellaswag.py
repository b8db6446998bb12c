"""HellaSwag: by hand, against an independent implementation, during training and by evaluate.py.

python -m pytest tests/test_hellaswag.py
"""

import json
import math
import os
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import read_log
from transformers import GPT2LMHeadModel

import evaluate
from cli import Failure, UserError
from data import hellaswag
from data.hellaswag import HellaSwag
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig, save_hf
from train_gpt2 import Machine, answer_hellaswag
from train_gpt2 import main as train

CPU, BYTES = Machine(torch.device("cpu")), load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are so small that several threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path, examples):
    """A file of (context, endings, label)."""
    lines = [json.dumps({"ctx": ctx, "endings": endings, "label": label}) for ctx, endings, label in examples]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Twenty questions of random words; their file."""
    rng = random.Random(0)

    def words(least, most):
        return " ".join("".join(rng.choices("abcdé", k=rng.randint(1, 6))) for _ in range(rng.randint(least, most)))

    made = [(words(2, 12), [words(1, 5) for _ in range(4)], rng.randrange(4)) for _ in range(20)]
    return write(tmp_path_factory.mktemp("hellaswag") / "val.jsonl", made)


class Coin(torch.nn.Module):
    """Whatever came before: a with probability 1/2, b with 1/4, a space with 1/8, anything else hardly ever."""

    def hidden(self, tokens):
        return tokens

    def logits(self, tokens):
        logits = torch.full((257,), -100.0)
        logits[97], logits[98], logits[32], logits[99] = (math.log(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8))
        return logits.expand(*tokens.shape, 257)


def test_three_examples_by_hand(tmp_path):
    """In units of log 2 the loss of a is 1, of b 2, of c and of the space before every ending 3."""
    path = write(
        tmp_path / "a.jsonl",
        [
            # sums 4, 7, 9, 5; means 2, 7/5, 9/3, 5/2: the sum takes ending 0, the mean ending 1
            ("b c", ["a", "aaaa", "cc", "b"], 1),
            # sums 6, 5, 8, 9; means 3, 5/3, 8/4, 9/5: both take ending 1
            ("aa", ["c", "aa", "abb", "aabb"], 1),
            # sums 4, 10, 6, 7; means 2, 10/8, 6/2, 7/4: ending 0 and ending 1, and neither is right
            ("", ["a", "aaaaaaa", "c", "aab"], 2),
        ],
    )
    questions = HellaSwag(path, BYTES, 64)
    right = answer_hellaswag(Coin(), questions, 50, CPU)
    assert [x.double().mean().item() for x in right] == pytest.approx([2 / 3, 1 / 3])


def test_both_layouts_and_long_rows(tmp_path):
    short = ["b", "c", "d", "e"]
    lines = [
        {"ind": 1, "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he", "endings": short, "label": 2},
        {"ind": 2, "ctx_a": "A man sits.", "ctx_b": "he", "endings": short, "label": "2"},
        {"ind": 3, "ctx_a": "A man sits. he", "ctx_b": "", "endings": short, "label": 2, "split_type": "zeroshot"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    examples = hellaswag.read_examples(tmp_path / "a.jsonl")
    assert examples[0] == examples[1] == examples[2] == ("A man sits. he", [" b", " c", " d", " e"], 2)
    cut = HellaSwag(tmp_path / "a.jsonl", BYTES, 8)
    assert bytes(cut.rows[0]) == b"its. he b" and cut.ending_tokens[0] == 2
    assert HellaSwag(tmp_path / "a.jsonl", BYTES, 1).ending_tokens[0] == 1


def one_by_one(path, loss_of):
    """An independent implementation: every ending in a forward pass of its own. Returns sums and means, (n, 4)."""
    sums, means = [], []
    for line in path.read_text().splitlines():
        example = json.loads(line)
        context = list(example["ctx"].encode())
        for ending in example["endings"]:
            ending = list((" " + ending).encode())
            losses = loss_of(torch.tensor([context + ending]))[-len(ending) :]
            sums.append(losses.sum().item()), means.append(losses.mean().item())
    return torch.tensor(sums).view(-1, 4), torch.tensor(means).view(-1, 4)


@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_agrees_with_an_implementation_example_by_example(examples, tmp_path, attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 2, 32, 128, 257, attention))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():  # far from the initialisation, where all endings are alike
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if attention == "softmax":
        save_hf(model, tmp_path / "hf", 256)
        reference = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()

    @torch.no_grad()
    def loss_of(tokens):
        if attention == "entmax":
            return model(tokens[:, :-1], tokens[:, 1:])[0]
        return -reference(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]

    questions = HellaSwag(examples, BYTES, 128)
    labels = torch.tensor(questions.labels)
    kept = []
    questions.right = lambda losses: kept.append(losses)
    for micro_batch_tokens in (1, 1000):
        answer_hellaswag(model, questions, micro_batch_tokens, CPU)
    sums, means = one_by_one(examples, loss_of)
    for losses in kept:
        assert torch.allclose(losses.view(-1, 4), sums.double(), rtol=1e-5, atol=1e-4)
    gaps = [scores.sort(dim=1).values.diff(dim=1)[:, 0] for scores in (sums, means)]
    assert all((gap > 1e-5).all() for gap in gaps)
    for right, scores in zip(HellaSwag.right(questions, kept[1]), (means, sums), strict=True):
        assert torch.equal(right, scores.argmin(1) == labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif("HELLASWAG" not in os.environ, reason="HELLASWAG does not name the validation set")
def test_all_examples_on_a_gpu_in_float32(tmp_path):
    """124M random weights: HELLASWAG=hellaswag_val.jsonl python -m pytest -s tests/test_hellaswag.py -k gpu"""
    torch.set_float32_matmul_precision("highest")
    model = GPT(GPTConfig(12, 12, 768, 1024, 50257, "softmax"))
    model.init_weights(torch.Generator().manual_seed(0))
    save_hf(model, tmp_path / "hf", 50256)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").cuda().eval()
    model.cuda()
    tokenizer = load_tokenizer("gpt2")
    for autocast in (True, False):
        machine = Machine(torch.device("cuda"), autocast=autocast)
        questions, kept = HellaSwag(os.environ["HELLASWAG"], tokenizer, 1024), []
        questions.right = lambda losses, kept=kept: kept.append(losses)
        began = time.perf_counter()
        answer_hellaswag(model, questions, 16 * 1024, machine)
        seconds = time.perf_counter() - began
        print(f"{len(questions.labels)} examples, {'bfloat16' if autocast else 'float32'}: {seconds:.1f} s")
    with open(os.environ["HELLASWAG"], encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    encode, (sums, lengths) = tokenizer.encode_ordinary, torch.zeros(2, len(examples), 4, dtype=torch.double)
    width = [len(example["ctx"]) + max(map(len, example["endings"])) for example in examples]
    by_length = sorted(range(len(examples)), key=width.__getitem__)
    for start in range(0, len(examples), 16):
        chosen = by_length[start : start + 16]
        endings = [(encode(examples[i]["ctx"]), encode(" " + x)) for i in chosen for x in examples[i]["endings"]]
        tokens = torch.zeros(len(endings), max(len(a + b) for a, b in endings), dtype=torch.long)
        counted = torch.zeros(len(endings), tokens.shape[1] - 1, dtype=torch.bool)
        for row, (context, ending) in enumerate(endings):  # what pads on the right, no token before it sees
            tokens[row, : len(context + ending)] = torch.tensor(context + ending)
            counted[row, len(context) - 1 : len(context + ending) - 1] = True
        tokens, counted = tokens.cuda(), counted.cuda()
        with torch.no_grad():
            logits = reference(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        sums[chosen] = (losses * counted).sum(dim=1).cpu().double().view(-1, 4)
        lengths[chosen] = counted.sum(dim=1).cpu().double().view(-1, 4)
    means = sums / lengths
    our_sums = kept[0].view(-1, 4)
    our_means = our_sums / torch.tensor(questions.ending_tokens).view(-1, 4)
    for name, ours, theirs in (("acc", our_sums, sums), ("acc_norm", our_means, means)):
        clear = theirs.sort(dim=1).values.diff(dim=1)[:, 0] > 1e-5
        other = (ours.argmin(dim=1) != theirs.argmin(dim=1)) & clear
        worst = (ours - theirs).abs().max().item()
        print(f"{name}: {int(clear.sum())} clear choices, {int(other.sum())} differ; losses by at most {worst:.1e}")
        assert not other.any()


def test_during_training_and_after_a_resume(flags, run, examples, tmp_path, capsys):
    def answers(run_dir):
        return [record for record in read_log(run_dir) if "hellaswag_acc" in record]

    args = [*flags, "--attention=softmax", f"--hellaswag={examples}", "--hellaswag_every=4"]
    train([*args, f"--run_dir={tmp_path / 'whole'}"])
    whole = answers(tmp_path / "whole")
    assert [record["step"] for record in whole] == [0, 4, 8]
    assert all(set(record) == {"step", "hellaswag_acc_norm", "hellaswag_acc"} for record in whole)
    stopped = tmp_path / "stopped"
    train([*args, f"--run_dir={stopped}", "--keep_checkpoints=0"])
    for later in (6, 8):
        (stopped / f"checkpoint_{later}").unlink()
    train([*args, f"--run_dir={stopped}", "--resume=auto"])
    assert read_log(stopped) == read_log(tmp_path / "whole")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(examples.read_bytes())
    (stopped / "checkpoint_8").unlink()
    train([*args, f"--run_dir={stopped}", "--resume=auto", f"--hellaswag={moved}", "--hellaswag_every=7"])
    assert [record["step"] for record in answers(stopped)] == [0, 4, 7, 8]

    command = ["evaluate.py", "--run_dir", tmp_path / "whole", "--hellaswag", examples]
    code, one, err = run(*command, "--json")
    assert code == 0, err
    one, two = json.loads(one), json.loads(run(*command, "--json", ranks=2)[1])
    assert {name: one[name] for name in ("hellaswag_acc_norm", "hellaswag_acc")}.items() <= whole[-1].items()
    assert two["hellaswag_acc_norm"] == one["hellaswag_acc_norm"] and two["hellaswag_acc"] == one["hellaswag_acc"]
    p = one["hellaswag_acc_norm"]
    assert one["hellaswag_examples"] == 20
    assert one["hellaswag_acc_norm_margin_95"] == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 20))
    assert "HellaSwag 80/80 endings" in err
    capsys.readouterr()
    evaluate.main([str(part) for part in command[1:]])
    assert f"acc_norm {p:.4f} ± {one['hellaswag_acc_norm_margin_95']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 2"),
        ('{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}', "3 endings"),
        ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}', "label 4"),
        ('{"ctx": 1, "endings": ["b", "c", "d", "e"], "label": 0}', "type int"),
        ('{"ctx": "a", "endings": ["b", "c", "d", 5], "label": 0}', "int"),
        ("[" * 100_000, "line 2"),
        ('{"ctx": "a", "endings": ["b", "c", "d", "e"]}', "'label'"),
        ('{"ctx_a": "a", "endings": ["b", "c", "d", "e"], "label": 1}', "'ctx_b'"),
    ],
)
def test_bad_examples_are_refused_by_line(tmp_path, line, words):
    write(tmp_path / "a.jsonl", [("a", ["b", "c", "d", "e"], 0)])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(UserError, match="a.jsonl: line 2") as error:
        hellaswag.read_examples(tmp_path / "a.jsonl")
    assert words in str(error.value)
    with pytest.raises(UserError, match="no file nowhere"):
        hellaswag.find("nowhere")


def test_download(examples, tmp_path, monkeypatch, capsys):
    served = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            content = served.pop(0)
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(examples.read_bytes())))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl")
    monkeypatch.setattr(hellaswag, "EXAMPLES", 20)
    whole = examples.read_bytes()
    cut = b"".join(whole.splitlines(keepends=True)[:15])
    served += [b"", whole[:-30], cut, whole]
    for _ in range(3):
        with pytest.raises(Failure, match="hellaswag"):
            hellaswag.find("download")
        assert not list((tmp_path / hellaswag.DOWNLOADED).parent.iterdir())
    assert hellaswag.find("download").read_bytes() == whole
    assert hellaswag.find("download").read_bytes() == whole and not served  # there already
    server.shutdown(), server.server_close()
