"""Files of strangers: read exactly and without torch, with bounded work, never executed."""

import builtins
import collections
import gzip
import json
import os
import pickle
import struct
import sys
import tarfile
import time
import tracemalloc
import types
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from mim_jax import UserError, inspect
from mim_jax.convert import __main__ as convert
from mim_jax.convert import from_torch, pickles
from mim_jax.convert.files import load_weights, summarize
from mim_jax.convert.read import LEGACY, read


class Calls:
    """Is pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touches(path) -> list:
    """Returns payloads that would create the file."""
    return [
        Calls(os.system, f"touch {path}"),
        Calls(builtins.eval, f"open({str(path)!r}, 'w')"),
        Calls(open, str(path), "w"),
        Calls(builtins.__import__, "os"),
        Calls(pickle.loads, pickle.dumps(Calls(open, str(path), "w"))),
        Calls(collections.defaultdict, list),
    ]


def as_zip(path, payload: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)


@pytest.mark.parametrize("number", range(6))
def test_a_pickle_that_calls_anything_is_refused(tmp_path, number):
    made, file = tmp_path / "made", tmp_path / "evil.pt"
    evil = touches(made)[number]
    hidden = pickle.dumps({"model": {"weight": evil}}, 2)
    header = b"".join(pickle.dumps(x, 2) for x in (LEGACY, 1001, {}))
    as_zip(file, hidden)
    for write in (
        lambda: None,
        lambda: file.write_bytes(pickle.dumps(evil)),
        lambda: file.write_bytes(hidden),
        lambda: file.write_bytes(header + hidden),
    ):
        write()
        with pytest.raises(
            UserError, match="is refused, and no code in it was executed: it refers"
        ):
            read(file)
        assert not made.exists()
    pickle.loads(pickle.dumps(touches(made)[2]))  # the payload works
    assert made.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"cos\nsystem\n(S'true'\ntR.", "is not a file of weights"),
        (b"<!DOCTYPE html><html>", "is a web page or XML"),
        (pickle.dumps([1]), "is a pickle, but not one that torch.save wrote"),
        (b"PK\x03\x04 and no more", "is damaged or truncated"),
        (b"\x80\x02\x8a\nl\xfc\x9cF", "is damaged or truncated"),
        (struct.pack("<Q", 9) + b'{"a": 1}', "is damaged or truncated"),
    ],
)
def test_files_that_are_not_weights(tmp_path, content, sentence):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / "file")
    assert sentence in str(error.value)
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read(tmp_path / "nothing")


def tensors(torch) -> dict:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "base": base,
        "view": base[1:, ::2].T,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "half": torch.arange(5).half(),
        "brain": torch.arange(5).bfloat16(),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "flags": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("new", [True, False])
def test_files_of_torch_save(tmp_path, new):
    torch = pytest.importorskip("torch")
    state = tensors(torch)
    path = tmp_path / "state.pth"
    save = {"model": collections.OrderedDict(state), "epoch": 7, "optimizer": {"state": [{}]}}
    for tree, beside in ((state, {}), (save, {"epoch": 7})):
        torch.save(tree, path, _use_new_zipfile_serialization=new)
        arrays, metadata = read(path)
        assert metadata == beside
        prefix = "model." if beside else ""  # it is not a network: all arrays are read
        assert list(arrays) == [f"{prefix}{name}" for name in state]
        for name, tensor in state.items():
            array, theirs = arrays[f"{prefix}{name}"], tensor.detach()
            theirs = (
                theirs.float().numpy().astype(ml_dtypes.bfloat16)
                if name == "brain"
                else theirs.numpy()
            )
            assert array.dtype == theirs.dtype
            np.testing.assert_array_equal(array, theirs)
    whole = path.read_bytes()
    for length in (len(whole) // 3, len(whole) - 9):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or truncated"):
            read(path)


def test_a_tensor_that_reaches_beyond_its_storage(tmp_path):
    """It would read memory outside the file."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "state.pt"
    torch.save({"w": torch.zeros(2, 3)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in content if name.endswith("data.pkl"))
    assert content[name].count(b"K\x02K\x03\x86") == 1  # its shape, (2, 3)
    content[name] = content[name].replace(b"K\x02K\x03\x86", b"K\x02K\xff\x86")
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    with pytest.raises(UserError, match="a tensor reaches beyond its storage"):
        read(path)


@pytest.mark.parametrize("new", [True, False])
def test_a_module_of_dalle_without_its_class(tmp_path, monkeypatch, new):
    """As encoder.pkl: a module of a package that is not installed when it is read."""
    torch = pytest.importorskip("torch")
    package = types.ModuleType("dall_e.encoder")

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.device = torch.device("cpu")
            self.blocks = torch.nn.Sequential(
                collections.OrderedDict(input=torch.nn.Conv2d(3, 4, 7), pool=torch.nn.MaxPool2d(2))
            )
            self.register_buffer("count", torch.tensor(2))

    Encoder.__module__, Encoder.__qualname__, package.Encoder = "dall_e.encoder", "Encoder", Encoder
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    monkeypatch.setitem(sys.modules, "dall_e.encoder", package)
    module = Encoder()
    torch.save(module, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=new)
    monkeypatch.undo()
    arrays, _ = read(tmp_path / "encoder.pkl")
    state = module.state_dict()
    assert arrays.keys() == state.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, state[name].numpy())


def test_safetensors(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {"a.b": np.arange(6, dtype=np.float16).reshape(2, 3), "c": np.array(4)}
    numpy.save_file(arrays, tmp_path / "w.safetensors", metadata={"format": "pt"})
    ours, metadata = read(tmp_path / "w.safetensors")
    assert metadata == {"format": "pt"}
    for name, array in arrays.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_array_equal(ours[name], array)
    numpy.save_file({"c": np.arange(3, dtype=ml_dtypes.bfloat16).view(np.uint16)}, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes().replace(b'"U16"', b'"BF16"', 1)  # one byte longer
    size = struct.unpack("<Q", whole[:8])[0] + 1
    (tmp_path / "w").write_bytes(struct.pack("<Q", size) + whole[8:])
    assert read(tmp_path / "w")[0]["c"].dtype == ml_dtypes.bfloat16
    assert read(tmp_path / "w")[0]["c"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("offsets", "content"),
    [
        ([[0, 16]], 8),  # cut off
        ([[0, 16]], 32),  # a rest
        ([[0, 16], [32, 48]], 48),  # a hole
        ([[0, 16], [8, 24]], 24),  # an overlap
        ([[-16, 0]], 16),
        ([[16, 0]], 16),
        ([[0, 8]], 8),  # not of its shape
    ],
)
def test_safetensors_whose_arrays_do_not_fill_the_file(tmp_path, offsets, content):
    header = {
        f"x{i}": dict(dtype="F32", shape=[4], data_offsets=places)
        for i, places in enumerate(offsets)
    }
    text = json.dumps(header).encode()
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + bytes(content))
    with pytest.raises(UserError, match="w is damaged or truncated"):
        read(tmp_path / "w")


# Hostile pickles, written opcode by opcode.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    digits = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def sizes(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(shape=(2,), strides=(1,), offset=0, key="0") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += integer(1) + b"tQ"
    view = storage + integer(offset) + sizes(shape) + sizes(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"\x89}tR"


def checkpoint(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(key + value for key, value in pairs) + b"u."


def nested(levels: int, opening: bytes, double: bytes, closing: bytes) -> bytes:
    """Returns an object that contains the one below it twice, by the memo, at each level."""
    steps = [b"q\x00" + double.replace(b"?", b"h\x00") + closing for _ in range(levels)]
    return opening + b"".join(steps)


SHARED_DICTS = nested(
    60, b"}" + text("w") + tensor() + b"s", b"0}(" + text("a") + b"?" + text("b") + b"?", b"u"
)
DEEP_DICTS = nested(5000, b"}" + text("w") + tensor() + b"s", b"0}(" + text("a") + b"?", b"u")
SHARED_TUPLES = nested(90, b")", b"0??", b"\x86")
LONG_LIST = b"](" + b"N" * 5000 + b"eq\x01" + b"cbuiltins\nset\n(h\x01tR0" * 1000
HOSTILE = {
    "a stride of 0": (checkpoint((text("w"), tensor((2**20, 2**14), (0, 0)))), "takes more than"),
    "a huge shape": (checkpoint((text("w"), tensor((2**47, 2**47), (1, 1)))), "takes more than"),
    "a negative stride": (checkpoint((text("w"), tensor((2,), (-1,)))), "of unknown form"),
    "a negative offset": (checkpoint((text("w"), tensor(offset=-4))), "of unknown form"),
    "a shape of text": (
        checkpoint((text("w"), tensor().replace(sizes((2,)), text("2")))),
        "of unknown form",
    ),
    "beyond its storage": (checkpoint((text("w"), tensor((9,)))), "beyond its storage"),
    "shared dicts": (checkpoint((text("w"), SHARED_DICTS)), "nested too deeply or"),
    "deep dicts": (checkpoint((text("w"), DEEP_DICTS)), "nested too deeply or"),
    "shared tuples as a key": (checkpoint((SHARED_TUPLES, text("x"))), "contains no weights"),
    "a memo of 2**27": (checkpoint((text("w"), b"Nr\x00\x00\x00\x08")), "contains no weights"),
    "a text of 2**62 bytes": (
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
        "is damaged or truncated",
    ),
    "bytes of 2**62": (
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        "is damaged or truncated",
    ),
    "a huge number": (
        checkpoint((text("w"), b"\x8b" + struct.pack("<i", 4000) + b"\x11" * 4000)),
        "more than 4096 bits",
    ),
    "calls that read a long list": (checkpoint((LONG_LIST, b"N")), "calls read more than"),
    "no end": (b"\x80\x02}", "is damaged or truncated"),
    "nothing on the stack": (b"\x80\x020000.", "is damaged or truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_bounded(tmp_path, case):
    """A few hundred bytes that would use gigabytes or never finish."""
    payload, sentence = HOSTILE[case]
    header = b"".join(pickle.dumps(x, 2) for x in (LEGACY, 1001, {}))
    with zipfile.ZipFile(tmp_path / "w", "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", bytes(8))
    keys = ["0"] if b"FloatStorage" in payload else []
    (tmp_path / "legacy").write_bytes(
        header + payload + pickle.dumps(keys, 2) + struct.pack("<q", 2) + bytes(8)
    )
    tracemalloc.start()
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "w")
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    start = time.perf_counter()
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "legacy")
    assert time.perf_counter() - start < 20


def test_the_number_of_opcodes_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    as_zip(tmp_path / "w", b"\x80\x02" + b"N0" * 600 + b"}.")
    with pytest.raises(UserError, match="it has more than 1,000 opcodes"):
        read(tmp_path / "w")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_deflated_members_are_bounded(tmp_path, member):
    """Zeros of 128 MiB are 128 KiB in the file."""
    content = {"data.pkl": checkpoint((text("w"), tensor())), "data/0": bytes(8)}
    content[member] = bytes(2**27)
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(f"archive/{name}", value)
    assert (tmp_path / "w").stat().st_size < 2**18
    with pytest.raises(UserError, match=r"w is refused.*(16|64)[.0-9]* MiB"):
        read(tmp_path / "w")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_member_that_is_longer_than_it_states(tmp_path, member):
    """Its size in the archive is 8 bytes, and it decompresses to 128 MiB."""
    content = {"data.pkl": checkpoint((text("w"), tensor())), "data/0": bytes(8)}
    del content[member]
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in (*content.items(), (member, bytes(2**27))):
            archive.writestr(f"archive/{name}", value)
    whole = bytearray((tmp_path / "w").read_bytes())
    place = whole.rindex(b"PK\x01\x02") + 24  # of the uncompressed size, in the last entry
    whole[place : place + 4] = struct.pack("<I", 8)
    (tmp_path / "w").write_bytes(whole)
    tracemalloc.start()
    with pytest.raises(UserError, match="w is damaged or truncated: Bad CRC-32"):
        read(tmp_path / "w")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_other_compression_is_refused(tmp_path):
    """bzip2 and LZMA decompress without a limit."""
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("archive/data.pkl", checkpoint((text("w"), tensor())))
    with pytest.raises(UserError, match="another method than deflate"):
        read(tmp_path / "w")


def test_many_and_long_names_are_refused(tmp_path):
    """Patterns are searched in every name, in time that may grow with the square of its length."""
    long, tree = "blocks." * 100_000, {f"{i}.w": np.zeros(0, np.float32) for i in range(2**14 + 1)}
    safetensors.save_file({long: np.zeros(1, np.float32)}, tmp_path / "long")
    safetensors.save_file(tree, tmp_path / "many")
    as_zip(tmp_path / "w", checkpoint((text(long), tensor())))
    for name, sentence in (
        ("long", "name blocks.* is longer than 256 characters"),
        ("w", "name blocks.* is longer than 256 characters"),
        ("many", "more than 16,384 arrays"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path / name)


def test_a_long_header_is_refused(tmp_path):
    (tmp_path / "w").write_bytes(struct.pack("<Q", 2**24) + b"{" + b" " * 2**24)
    with pytest.raises(UserError, match="its header is longer than 8 MiB"):
        read(tmp_path / "w")


def test_files_of_a_folder_share_the_limit(tmp_path):
    """Each of 40 files would use 10 MiB."""
    shape, names = (10, 2**18), [f"{i}.bin" for i in range(40)]
    for name in names:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", checkpoint((text(name), tensor(shape, (0, 0)))))
            archive.writestr("archive/data/0", bytes(4))
    index = json.dumps({"weight_map": {name: name for name in names}})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="its content takes more than"):
        load_weights(tmp_path)


def test_a_pipe_is_not_read(tmp_path):
    """Opening it would wait forever for a writer."""
    os.mkfifo(tmp_path / "w")
    with pytest.raises(UserError, match="w is a pipe, not a file"):
        read(tmp_path / "w")
    os.mkfifo(tmp_path / "config.json")
    safetensors.save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"config\.json is not a file"):
        load_weights(tmp_path)


@pytest.mark.parametrize("count", [-1, 3, 2**60])
def test_storages_that_do_not_fit_into_a_file(tmp_path, count):
    header = b"".join(pickle.dumps(x, 2) for x in (LEGACY, 1001, {}))
    payload = checkpoint((text("w"), tensor())) + pickle.dumps(["0"], 2)
    (tmp_path / "w").write_bytes(header + payload + struct.pack("<q", count) + bytes(8))
    with pytest.raises(UserError, match="w is damaged or truncated: its storages do not fit"):
        read(tmp_path / "w")


def test_what_weights_only_reads_beside_weights(tmp_path):
    """A scheduler's Counter, dtypes, bytes, new integers; and scalars of NumPy."""
    torch = pytest.importorskip("torch")
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    beside = dict(
        milestones=collections.Counter([30, 60, 60]),
        dtype=torch.float16,
        text=b"x",
        array=bytearray(b"x"),
        number=1j,
        unsigned=torch.arange(3).to(torch.uint16),
        eight=torch.ones(3).to(torch.float8_e4m3fn),
        parts={torch.float32: 1, ("a", 1): 2},
        layout=torch.strided,
        device=torch.device("cuda:1"),
        size=torch.Size([1, 2]),
        sparse=torch.eye(2).to_sparse(),
        quantized=quantized,
        complex=torch.ones(2, dtype=torch.complex64),
        meta=torch.ones(2, device="meta"),
    )
    for new in (True, False):
        for name, value in beside.items():
            if name in ("unsigned", "eight") and not new:
                continue  # torch cannot read them in the old format
            path = tmp_path / f"{name}.pth"
            torch.save(
                {"w": torch.ones(2), "beside": value}, path, _use_new_zipfile_serialization=new
            )
            torch.load(path, weights_only=True)  # which torch holds for safe
            arrays, _ = read(path)
            assert arrays["w"].tolist() == [1, 1]
            if name in ("unsigned", "eight", "complex"):
                assert arrays["beside"].astype(complex).tolist() == value.to(torch.cfloat).tolist()
    torch.save({"w": torch.ones(2), "best": np.float64(0.5)}, path)
    assert read(path)[0]["w"].tolist() == [1, 1]


def test_true_reasons(tmp_path):
    np.savez(tmp_path / "a.npz", **{"Transformer/encoderblock_0/LayerNorm_0/scale": np.ones(8)})
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", b"\x80\x02}.")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.npz", "a.npz")
    contents = {
        "a.h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "a.npy": b"\x93NUMPY" + bytes(64),
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab",
        "a.pth.gz": gzip.compress(bytes(64)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, reason in (
        ("a.npz", "is a NumPy archive"),
        ("a.docx", "is a zip archive, but not one that torch.save wrote"),
        ("script.pt", "is a TorchScript archive"),
        ("a.tar", "is a tar archive: unpack it"),
        ("a.h5", "is an HDF5 file"),
        ("a.npy", "is a single NumPy array"),
        ("lfs.pth", "is a pointer of Git LFS, not the file itself: run git lfs pull"),
        ("a.pth.gz", "is compressed by gzip: unpack it"),
    ):
        with pytest.raises(UserError, match=reason):
            read(tmp_path / name)


# Names of checkpoints.


def vit_state(value: float = 0.0, tokens: int = 5) -> dict[str, np.ndarray]:
    """Returns a ViT by timm's names, filled with a value."""
    d = 12
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, tokens, d), "patch_embed.proj.bias": (d,)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 8, 8), "norm.weight": (d,), "norm.bias": (d,)}
    for i in range(2):
        for name, o, c in (("attn.qkv", 3 * d, d), ("attn.proj", d, d), ("mlp.fc1", 4 * d, d)):
            shapes |= {f"blocks.{i}.{name}.weight": (o, c), f"blocks.{i}.{name}.bias": (o,)}
        shapes |= {f"blocks.{i}.mlp.fc2.weight": (d, 4 * d), f"blocks.{i}.mlp.fc2.bias": (d,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (d,), f"blocks.{i}.{name}.bias": (d,)}
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


def named(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": x for name, x in state.items()}


STATE = vit_state()
CHECKPOINTS = {
    **{
        prefix: {"model": named(prefix, STATE)}
        for prefix in (
            *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone."),
            *("_fsdp_wrapped_module.", "_forward_module.module.", "encoder.", "model.encoder."),
            *("net.backbone._orig_mod.", "student_module.vit."),
        )
    },
    **{
        key: {key: STATE, "optimizer": {"state": {0: {"exp_avg": np.zeros(3)}}}}
        for key in ("model", "state_dict", "net", "model_state_dict", "model_ema", "weights", "x")
    },
    "a wrapper inside": {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): x
        for name, x in STATE.items()
    },
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_wrappers_and_containers(case):
    expected, _ = from_torch(STATE, heads=3)
    params, network = from_torch(CHECKPOINTS[case], heads=3)
    assert (network.layout, network.entry) == ("timm_vit", "")
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all("optimizer" in name for name in network.left_out)


@pytest.mark.parametrize(
    ("checkpoint", "entry", "value"),
    [
        ({"model": vit_state(1), "model_ema": vit_state(2)}, "model_ema", 2),
        ({"state_dict_ema": vit_state(2), "state_dict": vit_state(1)}, "state_dict_ema", 2),
        ({"model": vit_state(1), "ema": {"module": vit_state(2)}}, "ema", 2),
        (vit_state(1) | named("ema_model.", vit_state(2)), "ema_model", 2),
        ({"student": vit_state(1), "teacher": vit_state(2)}, "teacher", 2),
        ({"encoder": vit_state(1), "target_encoder": vit_state(2)}, "target_encoder", 2),
    ],
)
def test_an_average_is_preferred_and_named(checkpoint, entry, value, tmp_path):
    torch = pytest.importorskip("torch")
    params, network = from_torch(checkpoint, heads=3)
    assert params["encoder"]["cls_token"].max() == value
    assert network.entry == entry
    assert len(network.left_out) == len(STATE)
    saved = jax.tree.map(torch.tensor, checkpoint)
    torch.save(saved, tmp_path / "w.pth")
    params, network, _ = load_weights(tmp_path / "w.pth", heads=3)
    assert params["encoder"]["cls_token"].max() == value
    assert f"from its entry {entry}, encoder: " in summarize(params, network)
    assert len(network.left_out) == len(STATE)


def test_several_networks_without_a_preference():
    checkpoint = {"first": vit_state(1), "second": vit_state(2)}
    with pytest.raises(UserError, match="several networks: first, second; set --entry to one"):
        from_torch(checkpoint, heads=3)
    params, _ = from_torch(checkpoint, heads=3, entry="second")
    assert params["encoder"]["cls_token"].max() == 2
    with pytest.raises(UserError, match="no network in the entry third: first, second"):
        from_torch(checkpoint, heads=3, entry="third")
    params, _ = from_torch({"model": vit_state(1), "ema": vit_state(2)}, heads=3, entry="model")
    assert params["encoder"]["cls_token"].max() == 1
    with pytest.raises(UserError, match=r"module\.cls_token and cls_token have the same name"):
        from_torch(STATE | named("module.", STATE), heads=3)


@pytest.mark.parametrize("size", [None, (16, 16)])
def test_unexpected_arrays_are_the_reason(size):
    """Registers, a distillation token: positions then fit no grid, which is not the reason."""
    for name, count in (("reg_token", 4), ("dist_token", 1)):
        state = vit_state(tokens=5 + count) | {name: np.zeros((1, count, 12))}
        with pytest.raises(UserError, match=f"decoder: 1 unexpected: {name}\\.$"):
            from_torch(state, size=size, heads=3)
    with pytest.raises(UserError, match="4 positions, but none for the class token"):
        from_torch(vit_state(tokens=4), heads=3)


def test_names_and_shapes_of_strangers_are_bounded():
    state = {name.replace("blocks.1.", "blocks.99999999999."): x for name, x in STATE.items()}
    with pytest.raises(UserError, match=r"12 missing: blocks\.1\..*12 unexpected: blocks\.9999"):
        from_torch(state, heads=3)
    table = {"rel_pos_bias.relative_position_bias_table": np.zeros((999**2 + 3, 3), np.float32)}
    beit = {k: x for k, x in STATE.items() if k != "pos_embed" and "qkv.bias" not in k} | table
    for i in range(2):
        beit |= {f"blocks.{i}.attn.{x}_bias": np.zeros(12, np.float32) for x in "qv"}
    with pytest.raises(UserError, match="images of 500 x 500 patches are too large"):
        from_torch(beit)
    with pytest.raises(UserError, match="positions are for 4 patches, but the images have 9 x 9"):
        from_torch(vit_state(), heads=3, grid=(9, 9))
    many = {f"blocks.{i}.norm1.weight": np.ones(12, np.float32) for i in range(2, 1000)}
    with pytest.raises(UserError, match="the network has 1,000 blocks, more than 256"):
        from_torch(STATE | many, heads=3)


@pytest.mark.parametrize("kind", ["int8", "bool", "complex64"])
def test_weights_are_floating_point_numbers(kind):
    """Quantized weights without their scales would be wrong, and nothing would be reported."""
    name = "blocks.1.mlp.fc1.weight"
    with pytest.raises(UserError, match=f"{name} has the type {kind}"):
        from_torch(STATE | {name: STATE[name].astype(kind)}, heads=3)


def test_names_are_escaped(tmp_path, capsys):
    """Control characters would act on the terminal, and invalid UTF-8 cannot be printed."""
    torch = pytest.importorskip("torch")
    evil = "head\x1b[2J\x1b]0;title\x07\n\u202ename"
    state = {name: torch.tensor(x) for name, x in STATE.items()}
    path, printed = os.fsdecode(os.fsencode(tmp_path) + b"/w\xe9\n.pth"), ""
    for tree in (
        {"model": state, evil: torch.ones(2), "epoch": 3, "\x1bkey": "\x1bvalue"},
        {evil: torch.ones(2)},
    ):
        torch.save(tree, path)
        for command in (
            lambda: inspect.main([path]),
            lambda: convert.main([path, f"{path}x", "--to=timm", "--heads=3"]),
        ):
            command()
            captured = capsys.readouterr()
            printed += captured.out + captured.err
    assert not [line for line in printed.splitlines() if not line.isprintable()]
    for escaped in (r"w\udce9\n.pth", r"head\x1b[2J", r"\x1bkey: "):
        assert escaped in printed


CONFIG = dict(hidden_size=12, num_attention_heads=3, image_size=16, patch_size=8)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "[1]", "must be a JSON object, not a list"),
        ("config.json", "{", "cannot read"),
        ("config.json", b"\xff\xfe{}", "cannot read"),
        ("config.json", "[" * 100_000, "cannot read"),
        ("config.json", dict(hidden_size=3), "it lacks num_attention_heads"),
        ("config.json", CONFIG | dict(num_attention_heads="3"), "num_attention_heads = 3 must be"),
        ("config.json", CONFIG | dict(num_attention_heads=0), "num_attention_heads = 0 must be"),
        ("config.json", CONFIG | dict(num_attention_heads=True), "num_attention_heads = True"),
        ("config.json", CONFIG | dict(image_size=None), "image_size = None must be"),
        ("config.json", CONFIG | dict(image_size=[16]), "image_size = "),
        ("config.json", CONFIG | dict(image_size={"height": 16}), "image_size = "),
        ("config.json", CONFIG | dict(image_size=10**6), "the positions are for 4 patches"),
        ("config.json", CONFIG | dict(patch_size=0), "patch_size = 0 must be"),
        ("config.json", CONFIG | dict(layer_norm_eps="1e-6"), "layer_norm_eps = 1e-6 must be"),
        ("config.json", CONFIG | dict(layer_norm_eps=float("nan")), "layer_norm_eps = nan"),
        ("config.json", CONFIG | dict(hidden_act=["gelu"]), "must be gelu"),
        ("preprocessor_config.json", "[]", "must be a JSON object, not a list"),
        ("preprocessor_config.json", dict(image_mean="half"), "mean = half must be a list"),
        ("preprocessor_config.json", dict(image_mean=["0.5"]), "mean = 0.5 must be a number"),
        ("model.safetensors.index.json", "[]", "must be a JSON object, not a list"),
        ("model.safetensors.index.json", dict(weight_map=["a"]), "must have a weight_map"),
        ("model.safetensors.index.json", dict(weight_map={"a": 1}), "must have a weight_map"),
        ("model.safetensors.index.json", dict(weight_map={"a": "../b"}), "must have a weight_map"),
        ("model.safetensors.index.json", dict(weight_map={"a": "b"}), "b: No such file"),
    ],
)
def test_unexpected_types_in_folders_of_hugging_face(file, content, sentence, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if "index" not in file:
        numpy.save_file(STATE, tmp_path / "model.safetensors")
        load_weights(tmp_path)
    content = json.dumps(content) if isinstance(content, dict) else content
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        load_weights(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "record",
    ["[]", "3", "{", '{"facts": []}', '{"heads": "3"}', '{"grid": 7}', '{"facts": {"layers": 5}}'],
)
def test_unexpected_types_in_our_record(record, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(STATE, tmp_path / "w.safetensors", metadata={"mim_jax": record})
    if record.startswith(('{"heads', '{"grid', '{"facts": {')):
        sentence = "heads = 3 must be|positions are for 4 patches|layers = 5 must be a list"
        with pytest.raises(UserError, match=sentence):
            load_weights(tmp_path / "w.safetensors")
    else:
        assert load_weights(tmp_path / "w.safetensors")[1].metadata == {}
