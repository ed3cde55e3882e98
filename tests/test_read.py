"""Foreign files: read to the bit without torch, refused where they want anything called."""

import builtins
import collections
import json
import os
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mim_jax import UserError
from mim_jax.convert.read import LEGACY, read


class Calls:
    """What is pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touches(path) -> list:
    """Payloads that would make the file."""
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
        with pytest.raises(UserError, match="is refused, and nothing in it was run: it asks"):
            read(file)
        assert not made.exists()
    pickle.loads(pickle.dumps(touches(made)[2]))  # the payload is one
    assert made.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a file of weights: it begins with b''"),
        (b"cos\nsystem\n(S'true'\ntR.", "is not a file of weights"),
        (b"<!DOCTYPE html><html>", "is not a file of weights: it begins with b'<!DOCTYPE html>"),
        (pickle.dumps([1]), "it is a pickle, but not one of torch's"),
        (b"PK\x03\x04 and no more", "is damaged or cut off"),
        (b"\x80\x02\x8a\nl\xfc\x9cF", "is damaged or cut off"),
        (struct.pack("<Q", 9) + b'{"a": 1}', "is damaged or cut off"),
    ],
)
def test_what_holds_no_weights(tmp_path, content, sentence):
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
def test_what_torch_saved(tmp_path, new):
    torch = pytest.importorskip("torch")
    state = tensors(torch)
    path = tmp_path / "state.pth"
    save = {"model": collections.OrderedDict(state), "epoch": 7, "optimizer": {"state": [{}]}}
    for tree, beside in ((state, {}), (save, {"epoch": 7})):
        torch.save(tree, path, _use_new_zipfile_serialization=new)
        arrays, metadata = read(path)
        assert metadata == beside
        assert list(arrays) == list(state)
        for name, array in arrays.items():
            theirs = state[name].detach()
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
        with pytest.raises(UserError, match="damaged or cut off"):
            read(path)


def test_a_tensor_that_reaches_beyond_its_storage(tmp_path):
    """Its memory would be read, whatever lies there."""
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
    """As encoder.pkl: a module of a package that is not there when it is read."""
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
    header = json.dumps({"x": dict(dtype="F32", shape=[4], data_offsets=[0, 16])}).encode()
    (tmp_path / "short").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="damaged or cut off"):
        read(tmp_path / "short")
