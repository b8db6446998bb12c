"""Files that nobody meant to write: cut, damaged, crafted. Each is refused with its name, or read right.

python -m pytest tests/test_fuzz.py
FUZZ_CASES=100000 python -m pytest tests/test_fuzz.py        so many for each property, others in every run
"""

import io
import json
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, configuration, given, settings
from hypothesis import strategies as st

import checkpoint
import cli
import evaluate
import export_hf
import sample
import train_gpt2
from cli import UserError
from data.shards import TokenStream, find_shards, open_shard
from model import load_hf
from train_gpt2 import Config, parse_config, parse_value, read_log, read_toml, records_until, to_toml

configuration.set_hypothesis_home_dir(tempfile.gettempdir())
CASES = int(os.environ.get("FUZZ_CASES", 0))


def fuzz(cases):
    """Settings for a property: the same cases in every run, unless FUZZ_CASES asks for others."""
    return settings(
        max_examples=CASES or cases,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("with a space, and [brackets]")


def refused(function, path):
    """None if function(path) raises a UserError that names the file, else what it returns."""
    try:
        return function(path)
    except UserError as error:
        assert Path(path).name in str(error), error
        return None


# -----------------------------------------------------------------------------
# shards


def llmc(tokens, magic=20240520, version=1, count=None):
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    return header.ljust(1024, b"\0") + np.asarray(tokens, dtype="<u2").tobytes()


def npy(tokens):
    file = io.BytesIO()
    np.save(file, np.asarray(tokens, dtype="<u2"))
    return file.getvalue()


TOKENS = (np.arange(700) * 9973 % 65536).astype("<u2")


@pytest.mark.parametrize("name, whole", [("a.bin", llmc(TOKENS)), ("a.npy", npy(TOKENS))])
def test_a_shard_cut_at_any_byte_is_refused(folder, name, whole):
    path = folder / name
    path.write_bytes(whole)
    assert open_shard(path).tolist() == TOKENS.tolist()
    for size in reversed(range(len(whole))):
        os.truncate(path, size)
        assert refused(open_shard, path) is None, size


@pytest.mark.parametrize("name, whole, header", [("a.bin", llmc(TOKENS), 12), ("a.npy", npy(TOKENS), 128)])
def test_a_shard_with_any_bit_of_its_header_flipped_is_refused_or_read_right(folder, name, whole, header):
    path = folder / name
    for bit in range(8 * header):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        tokens = refused(open_shard, path)
        assert tokens is None or name == "a.npy" and tokens.tolist() == TOKENS.tolist(), (bit, bytes(damaged[:128]))


near = st.one_of(st.integers(-3, 3), st.integers(-(2**31), 2**31 - 1))


@fuzz(1500)
@given(st.binary(max_size=60), st.just(20240520) | near, st.just(1) | near, st.just(0) | near)
def test_llmc_shards_are_read_right_or_refused(folder, body, magic, version, too_many):
    """Mostly right headers, against a reading of the format's description."""
    count = len(body) // 2 + too_many
    assume(-(2**31) <= count < 2**31)
    path = folder / "x_train_1.bin"
    path.write_bytes(llmc([], magic, version, count) + body)
    sound = magic == 20240520 and version == 1 and count > 0 and 2 * count == len(body)
    tokens = refused(open_shard, path)
    assert (tokens is not None) == sound
    if sound:
        assert tokens.tolist() == [low + 256 * high for low, high in zip(body[::2], body[1::2], strict=True)]


starts = st.sampled_from([b"", b"\x93NUMPY\x01\0", b"\x93NUMPY\x02\0", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x04\x95"])


@fuzz(1500)
@given(start=starts, rest=st.binary(max_size=200), name=st.sampled_from(["a.bin", "a.npy", "a", "a.bin.npy"]))
def test_any_bytes_are_no_shard_with_a_header(folder, start, rest, name):
    (folder / name).write_bytes(start + rest)
    assert refused(open_shard, folder / name) is None


@fuzz(1500)
@given(
    header=st.text(max_size=60)
    | st.builds(
        "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}".format,
        st.sampled_from(["'<u2'", "'>u2'", "'|O'", "'<u4'", "[('a', '<u2')]", "'<U3'", "'V2'", "1", "'M8[s]'", "()"]),
        st.sampled_from(["False", "True", "0", "None"]),
        st.sampled_from(["(3,)", "(1, 3)", "()", "(-3,)", "(10**9,)", f"({2**62},)", "3", "(3.0,)", "(True,)", "(0,)"]),
    ),
    body=st.binary(max_size=12),
)
def test_npy_headers_are_read_right_or_refused(folder, header, body):
    header = header.encode("latin-1", "replace") + b"\n"
    path = folder / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        tokens = refused(open_shard, path)
    if tokens is not None:
        assert b"'<u2'" in header and tokens.tolist() == np.frombuffer(body, "<u2").tolist() and tokens.ndim == 1


@fuzz(500)
@given(body=st.binary(max_size=60))
def test_headerless_shards_are_any_even_number_of_bytes(folder, body):
    path = folder / "train.bin"
    path.write_bytes(body)
    tokens = refused(lambda p: open_shard(p, "nanogpt"), path)
    assert (tokens is None) == (len(body) % 2 == 1 or not body)
    assert tokens is None or tokens.tobytes() == body


@fuzz(500)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    T=st.integers(1, 70) | st.integers(1, 10**30),
    vocab_size=st.sampled_from([257, 50257, 65536]),
    seed=st.integers(0, 2**32),
)
def test_a_stream_is_its_shards_in_order_or_refused(folder, sizes, T, vocab_size, seed):
    tokens = np.random.default_rng(seed).integers(0, vocab_size + 2, sum(sizes)).clip(max=65535).astype("<u2")
    paths = [folder / f"s_train_{i}.bin" for i in range(len(sizes))]
    for path, part in zip(paths, np.split(tokens, np.cumsum(sizes)[:-1]), strict=True):
        path.write_bytes(llmc(part))
    try:
        stream = TokenStream(paths, T, vocab_size)
    except UserError as error:
        assert "too few" in str(error) and sum(sizes) <= T
        return
    assert stream.windows == (sum(sizes) - 1) // T
    for w in range(stream.windows):
        expected = tokens[w * T : w * T + T + 1]
        if expected.max() < vocab_size:
            assert stream.window(w).tolist() == expected.tolist()
        else:
            with pytest.raises(UserError, match="s_train_.*token id"):
                stream.window(w)


patterns = st.text(st.sampled_from("ab*?[]!-/.{}~ \0\n\\") | st.characters(), max_size=20)


@fuzz(800)
@given(pattern=patterns)
def test_any_pattern_finds_files_or_is_refused(folder, pattern):
    (folder / "tree" / "a").mkdir(parents=True, exist_ok=True)
    (folder / "tree" / "a" / "b").touch()
    try:
        found = find_shards(f"{folder / 'tree'}/{pattern}", "train", "train_data")
    except UserError as error:
        assert str(error).startswith("train_data")
    else:
        assert found and all(p.is_file() for p in found)


def test_names_links_and_folders(tmp_path):
    """Whatever a file is called and however it is reached, it is read; what is no file is passed over or refused."""
    whole = llmc(TOKENS)
    for name in ("two words", "-dash", "naïve 日本", "[ab]*?", "line\nbreak", "~", "100%"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}_train_1.bin").write_bytes(whole)
        (folder / f"{name}_train_2.bin").mkdir()
        (folder / f"{name}_train_3.bin").symlink_to("nowhere")
        (folder / f"{name}_train_4.bin").symlink_to(f"{name}_train_4.bin")
        (folder / f"{name}_train_5.bin").symlink_to(f"{name}_train_1.bin")
        os.mkfifo(folder / f"{name}_train_6.bin")  # to open it would wait for ever
        found = find_shards(str(folder), "train", "train_data")
        assert [p.name[-5] for p in found] == ["1", "5"]
        assert all(open_shard(p).tolist() == TOKENS.tolist() for p in found)
        assert find_shards(str(found[0]), "train", "train_data") == found[:1]
    (tmp_path / "link").symlink_to(tmp_path / "two words")
    assert len(find_shards(str(tmp_path / "link"), "train", "train_data")) == 2
    for wrong in ("100%/100%_train_2.bin", "100%/100%_train_3.bin", "100%/100%_train_6.bin", "x" * 300, "x/" * 3000):
        with pytest.raises(UserError, match="^train_data: "):
            find_shards(str(tmp_path / wrong), "train", "train_data")
    for name in ("f.bin", "f.npy"):
        (tmp_path / name).mkdir()
        assert refused(open_shard, tmp_path / name) is None


def test_huge_files_are_mapped_not_read(tmp_path):
    """4 GB that take no room on the disk."""
    count = 2**31 - 1
    with open(tmp_path / "huge.bin", "wb") as file:
        file.write(llmc([], count=count))
        file.truncate(1024 + 2 * count)
    tokens = open_shard(tmp_path / "huge.bin")
    assert len(tokens) == count and tokens[-1] == 0
    os.truncate(tmp_path / "huge.bin", 1024 + 2 * count + 2)
    assert refused(open_shard, tmp_path / "huge.bin") is None


def without_root(function):
    """What function() answers, or the message of its UserError, in a child process that permissions hold for."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            answer = str(function())
        except UserError as error:
            answer = f"refused: {error}"
        except BaseException as error:
            answer = repr(error)
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def shared_folder():
    """A folder that everybody may look into; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_what_may_not_be_read_is_refused_by_name(shared_folder, trained):
    readers = {"a.bin": (open_shard, llmc(TOKENS)), "a.npy": (open_shard, npy(TOKENS))}
    readers |= {"a.toml": (read_toml, b"seed = 1"), "checkpoint_1": (checkpoint.load, trained)}
    for name, (reader, content) in readers.items():
        path = shared_folder / name
        path.write_bytes(content)
        path.chmod(0o644)
        assert not without_root(lambda: reader(path)).startswith("refused"), name  # noqa: B023
        path.chmod(0)
        answer = without_root(lambda: reader(path))  # noqa: B023
        assert answer.startswith("refused: ") and name in answer and "ermission denied" in answer, answer
    # neither may a checkpoint pass for damaged, which another start might write over
    answer = without_root(lambda: checkpoint.newest_sound(shared_folder))
    assert answer.startswith("refused: ") and "checkpoint_1" in answer, answer
    inner = shared_folder / "inner"
    inner.mkdir()
    (inner / "a_train_1.bin").write_bytes(llmc(TOKENS))
    for mode in (0o000, 0o444, 0o111):
        inner.chmod(mode)
        for pattern in (inner, inner / "*", inner / "a_train_2.bin"):
            answer = without_root(lambda: find_shards(str(pattern), "train", "train_data"))  # noqa: B023
            assert answer.startswith("refused: train_data"), (mode, answer)


# -----------------------------------------------------------------------------
# configurations

KINDS = {f.name: f.type for f in Config.__dataclass_fields__.values()}
words = st.sampled_from([*KINDS, "max_step", "Seed", "seed.x", "'seed'", "[seed]", "[[x]]", "", "\ufeffseed"])
scalars = st.sampled_from(
    "true false 1 0 -1 1.5 1e400 inf nan -inf 0x10 1_000 '' 'auto' \"\\u0000\" 'bytes' [] [1] {} {a=1} "
    "1979-05-27 2024-13-45 07:32:00 = # ''' \"\"\" \\".split()
    + ["9" * 400, "9" * 5000, "[" * 3000, "{a=" * 1000, str(2**64), str(2**63), "1e-320"]
)
lines = st.builds("{} = {}".format, words, scalars | st.text(max_size=8)) | st.text(max_size=20) | words


tomls = st.lists(lines, max_size=4).map(lambda text: "\n".join(text).encode(errors="replace"))


@fuzz(1500)
@given(tomls | st.binary(max_size=40))
def test_any_toml_is_a_configuration_or_refused(folder, content):
    path = folder / "a.toml"
    path.write_bytes(content)
    values = refused(read_toml, path)
    for name, value in (values or {}).items():
        assert type(value) is KINDS[name] and parse_value(name, value, is_flag=False) == value
    if values:  # what was read can be written and read again
        path.write_text(to_toml(Config(**values)), encoding="utf-8")
        assert read_toml(path) == asdict(Config(**values))


texts = st.text() | st.sampled_from(["\x7f", "\\", '"', "'''", "\u2028", "\r\n", "\x1b[0m"])


@st.composite
def configs(draw):
    """Any configuration whose values are within their bounds."""
    values = {}
    for name in draw(st.sets(st.sampled_from(sorted(KINDS)), max_size=6)):
        limits = Config.__dataclass_fields__[name].metadata
        if limits["choices"]:
            values[name] = draw(st.sampled_from(limits["choices"]))
        elif KINDS[name] is int:
            values[name] = draw(st.integers(limits["least"], int(min(limits["most"], 2**63 - 1))))
        elif KINDS[name] is float:
            values[name] = draw(st.floats(limits["least"], limits["most"]))
        else:
            values[name] = draw(st.booleans() if KINDS[name] is bool else texts)
    return values


@fuzz(800)
@given(configs())
def test_every_configuration_survives_its_file(folder, values):
    try:
        config = Config(**{name: parse_value(name, value) for name, value in values.items()})
    except UserError as error:
        assert "\0" in str(values) or "\\x00" in str(values), error  # no path has it
        return
    path = folder / "a.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert read_toml(path) == asdict(config)


flags = st.sampled_from([f"--{name}" for name in KINDS] + ["--max-steps", "-h1", "--", "-1", "--max_step", "--config"])
values = scalars | st.text(max_size=8).filter(lambda text: "\0" not in text) | st.just("\udcff")
arguments = st.lists(st.builds("{}={}".format, flags, values) | flags | values, max_size=4)


@fuzz(1200)
@given(arguments)
def test_any_command_line_is_a_configuration_or_refused(arguments):
    assume(not {"-h", "--help"} & {a.split("=")[0] for a in arguments} and "-h1" not in arguments)
    try:
        config = parse_config(arguments)
    except UserError as error:
        assert str(error)
    else:
        assert all(parse_value(name, value) == value for name, value in asdict(config).items())
        to_toml(config).encode()


# -----------------------------------------------------------------------------
# checkpoints


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The bytes of a real checkpoint, of a model so small that reading it takes no time."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_gpt2.SIZES, "tiny", (1, 1, 4))
        train_gpt2.main([*flags, "--max_steps=2", "--attention=softmax", "--val_every=0", f"--run_dir={run_dir}"])
    return (run_dir / "checkpoint_2").read_bytes()


def same(a, b):
    """Whether two checkpoints hold the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def read(path):
    """All that a resumed run reads, on the way that it takes."""
    state = checkpoint.load(path)
    with checkpoint.reading(path):
        model, config = checkpoint.load_model(state), train_gpt2.saved_config(state)
        train_gpt2.load_optimizer(train_gpt2.make_optimizer(model, config), state["optimizer"])
    return state


def test_a_checkpoint_cut_anywhere_is_refused(folder, trained):
    path = folder / "checkpoint_2"
    path.write_bytes(trained)
    assert read(path)["step"] == 2
    sizes = {*range(0, 1024), *range(1024, len(trained), 61), *range(len(trained) - 1024, len(trained))}
    for size in sorted(sizes, reverse=True):
        os.truncate(path, size)
        assert refused(read, path) is None and not checkpoint.is_sound(path), size


@fuzz(1000)
@given(data=st.data(), place=st.sampled_from(["anywhere", "end"]), n=st.integers(1, 3))
def test_a_checkpoint_with_flipped_bits_is_refused_or_read_right(folder, trained, data, place, n):
    damaged, path = bytearray(trained), folder / "checkpoint_2"
    for _ in range(n):
        first = 0 if place == "anywhere" else 8 * (len(trained) - 4000)
        bit = data.draw(st.integers(first, 8 * len(trained) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    state = refused(read, path)
    if state is not None:
        assert same(state, torch.load(io.BytesIO(trained), weights_only=True))


JUNK = [None, True, -1, 0, 2**70, 10**9, 1.5, float("nan"), "", "x", (), [], {}, [[]], {"x": 1}, torch.zeros(())]
JUNK += [torch.ones(3, 3), torch.ones(1).expand(10**6, 10**6), torch.ones(4, dtype=torch.int8)]


@fuzz(400)
@given(data=st.data())
def test_a_checkpoint_of_another_structure_is_refused(folder, trained, data):
    """With sound checksums: keys that are missing, values of another kind, as another program might write them."""
    state = torch.load(io.BytesIO(trained), weights_only=True)
    parent, place = state, []
    while not place or isinstance(parent, dict | list) and parent and data.draw(st.booleans()):
        place.append(data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent)))))
        holder, parent = parent, parent[place[-1]]
    if data.draw(st.booleans()):
        del holder[place[-1]]
    else:
        holder[place[-1]] = data.draw(st.sampled_from(JUNK))
    path = folder / "checkpoint_2"
    torch.save(state, path)
    state = refused(read, path)
    if state is not None:  # what a model is made of is as it was; the rest is within its bounds
        whole = torch.load(io.BytesIO(trained), weights_only=True)
        assert all(same(state[key], whole[key]) for key in ("model", "gpt_config")), place
        assert state["step"] >= 0 and train_gpt2.saved_config(state)


@fuzz(600)
@given(st.binary(max_size=80))
def test_any_pickle_in_a_sound_archive_is_refused(folder, program):
    path = folder / "checkpoint_2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    with warnings.catch_warnings(record=True) as heard:
        assert refused(read, path) is None
    assert not heard


class Malice:
    """Unpickled, it calls what it likes, here something that leaves a trace."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_checkpoint_runs_no_code(trained, flags, tmp_path, monkeypatch, capsys):
    """As a pickle alone and within a sound checkpoint, through every program that reads one."""
    trace, run = tmp_path / "trace", tmp_path / "run"
    run.mkdir()
    path = run / "checkpoint_2"
    programs = [
        (sample.main, ["--checkpoint", path, "--prompt", "x"]),
        (sample.main, ["--run_dir", run, "--prompt", "x"]),
        (evaluate.main, ["--run_dir", run]),
        (export_hf.main, ["--run_dir", run, "--out", tmp_path / "out"]),
        (train_gpt2.main, [*flags, "--run_dir", run, "--resume", "auto"]),
        (train_gpt2.main, [*flags, "--resume", path]),
    ]
    calls = [
        (os.mkdir, str(trace)),
        (os.system, f"mkdir {trace}"),
        (exec, f"import os; os.mkdir({str(trace)!r})"),
        (eval, f"__import__('os').mkdir({str(trace)!r})"),
        (torch.save, {}, str(trace)),
        (torch._utils._rebuild_tensor_v2, Malice(os.mkdir, str(trace))),
    ]
    for call in calls:
        malice = Malice(*call)
        for protocol in (2, 4):
            files = {"a pickle": pickle.dumps(malice, protocol=protocol)}
            for place in ("model", "optimizer", "gpt_config", "config", "rng", "anything"):
                state = torch.load(io.BytesIO(trained), weights_only=True) | {place: malice}
                file = io.BytesIO()
                torch.save(state, file, pickle_protocol=protocol)
                files[place] = file.getvalue()
            for place, content in files.items():
                path.write_bytes(content)
                assert refused(read, path) is None, (call, place)
                assert not trace.exists(), (call, place)
    # the test can fail: whoever trusts the file runs the code
    path.write_bytes(files["optimizer"])
    with pytest.raises(Exception):  # noqa: B017
        torch.load(path, weights_only=False)
    assert trace.exists()
    trace.rmdir()
    monkeypatch.chdir(tmp_path)
    state = torch.load(io.BytesIO(trained), weights_only=True) | {"optimizer": Malice(os.mkdir, str(trace))}
    torch.save(state, path)
    for main, arguments in programs:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: main([str(argument) for argument in arguments]))  # noqa: B023
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "not a checkpoint of this version of the program" in err, err
        assert not trace.exists() and "Traceback" not in err


def test_a_malicious_npy_shard_runs_no_code(tmp_path):
    objects = np.array([Malice(os.mkdir, str(tmp_path / "trace"))], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "b.npz", objects)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    (tmp_path / "c.npy").write_bytes(pickle.dumps(objects[0]))
    for name in "abc":
        assert refused(open_shard, tmp_path / f"{name}.npy") is None
    assert not (tmp_path / "trace").exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "trace").exists()


# -----------------------------------------------------------------------------
# other people's weights and other texts


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The tiny model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "checkpoint_2").write_bytes(trained)
    export_hf.main(["--checkpoint", str(folder / "checkpoint_2"), "--out", str(folder / "hf")])
    return folder / "hf"


@fuzz(400)
@given(data=st.data())
def test_a_config_json_is_one_of_gpt2_or_refused(exported, data):
    whole = (exported / "config.json").read_text()
    hf = json.loads(whole)
    key = data.draw(st.sampled_from(sorted(hf) + ["n_inner"]))
    values = [None, True, 0, -1, 1, 2, 3, 10**6, 10**9, 10**30, 0.5, "", "x", [], [[]], {}, "gone"]
    hf[key] = data.draw(st.sampled_from(values))
    if hf[key] == "gone":
        del hf[key]
    text = data.draw(st.sampled_from([json.dumps(hf)] * 9 + ["[]", "3", "", "{", "[" * 10**5, "\xff"]))
    try:
        (exported / "config.json").write_text(text, encoding="latin-1")
        model = refused(lambda folder: load_hf(str(folder), "softmax", 1.5), exported)
        if model is not None:
            assert model.wte.weight.shape == (384, 4) and model.config.vocab_size <= 384
    finally:
        (exported / "config.json").write_text(whole)


@fuzz(300)
@given(size=st.integers(0, 10**6), flip=st.integers(0, 10**9))
def test_damaged_safetensors_are_refused_or_gpt2(exported, size, flip):
    """Their format has no checksums; what holds the shapes is weights."""
    path = exported / "model.safetensors"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[flip % 2000] ^= 1 << flip % 8
    try:
        path.write_bytes(whole[: size % len(whole)] if size % 2 else damaged)
        model = refused(lambda folder: load_hf(str(folder), "softmax", 1.5), exported)
        assert model is None or size % 2 == 0 and model.wpe.weight.shape == (64, 4)
    finally:
        path.write_bytes(whole)


records = ['{"step": 1, "tokens": 5}', '{"step": 2', '{"step": "x"}', "[]", "3", "", "\x00\x00", '{"tokens": 1}']
logs = st.lists(st.sampled_from(records) | st.text(max_size=10), max_size=5)


@fuzz(500)
@given(logs, st.sampled_from(["", "\n"]))
def test_a_log_is_read_up_to_its_first_damage(folder, lines, end):
    path = folder / "log.jsonl"
    path.write_bytes(("\n".join(lines) + end).encode(errors="replace") + b"\xff" * (not end))
    records, damaged = read_log(path)
    kept = records_until(records, 1, True)
    assert all(record["step"] <= 1 for record in kept) and len(kept) <= len(records) <= len(lines)
    assert damaged is None or damaged == len(records) + 1 <= path.read_text(errors="replace").count("\n")
