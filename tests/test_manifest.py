"""Tests of data/manifest.py and data/tars.py: which files are images, and the cache of scans."""

import errno
import io
import os
import shutil
import tarfile

import pytest

from mim_jax import UserError
from mim_jax.data import manifest
from mim_jax.data.decode import BadImageError
from mim_jax.data.folder import Folder
from mim_jax.data.manifest import printable, scan
from mim_jax.data.sources import open_sources
from tests.images import (
    BAD,
    GOOD,
    NO_IMAGES,
    PIXEL,
    UNREAD,
    jpeg,
    npy,
    open_tree,
    pixels,
    plant,
    tar,
    tif,
)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def tree(tmp_path):
    return open_tree(tmp_path / "tree")


def names_of(root):
    return os.fsdecode(scan(root).names).split("\0")[:-1]


# --- Trees. ---


def test_images_are_recognized_by_content_and_other_files_listed(tree):
    assert sorted(names_of(tree)) == sorted(GOOD | BAD)
    unread = dict(scan(tree).unread)
    assert set(unread) == set(UNREAD)
    for name, reason in UNREAD.items():
        assert reason in unread[name], name


def test_sizes_and_modes_are_read_from_headers(tree):
    scanned = scan(tree)
    rows = dict(zip(names_of(tree), scanned.rows, strict=True))
    assert [rows["two/thin.png"][key] for key in ("width", "height")] == [1, 500]
    assert scanned.modes[rows["one/cmyk.jpg"]["mode"]] == "CMYK"
    assert scanned.modes[rows["one/sixteen bits.png"]["mode"]] == "I;16"
    assert scanned.modes[rows["array.npy"]["mode"]] == "uint8 array"
    assert rows["one/cmyk.jpg"]["bytes"] == len(GOOD["one/cmyk.jpg"])


def test_broken_links_and_special_files_are_listed(tmp_path):
    plant(tmp_path, {"a.png": PIXEL, "elsewhere/real.png": PIXEL})
    (tmp_path / "link.png").symlink_to("../.git/annex/objects/1")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "good.png").symlink_to("a.png")
    os.mkfifo(tmp_path / "pipe")
    assert sorted(names_of(tmp_path)) == ["a.png", "elsewhere/real.png", "good.png"]
    expected = {"link.png": "a broken link", "itself": "a broken link"}
    assert dict(scan(tmp_path).unread) == expected | {"pipe": "not a regular file"}
    plant(tmp_path / "objects", {"1": PIXEL})
    (tmp_path / "link.png").unlink()
    (tmp_path / "link.png").symlink_to("objects/1")
    assert "link.png" in names_of(tmp_path)


def test_a_broken_link_that_is_repaired_elsewhere_is_seen(tmp_path):
    plant(tmp_path / "set", {"a.png": PIXEL})
    (tmp_path / "set/link.png").symlink_to("../fetched.png")
    assert names_of(tmp_path / "set") == ["a.png"]
    plant(tmp_path, {"fetched.png": PIXEL})  # as git-annex and DVC do it
    assert sorted(names_of(tmp_path / "set")) == ["a.png", "link.png"]


def test_folders_keep_their_names_beside_links_to_them(tmp_path):
    plant(tmp_path, {"m/1.png": PIXEL})
    (tmp_path / "a").symlink_to("m")
    (tmp_path / "z").symlink_to("m")
    assert names_of(tmp_path) == ["m/1.png"]
    assert {name for name, _ in scan(tmp_path).unread} == {"a", "z"}


def test_folders_of_operating_systems_are_skipped(tmp_path):
    junk = ("@eaDir", "__MACOSX", "lost+found", ".ipynb_checkpoints", "$RECYCLE.BIN", ".git")
    junk += ("RECYCLER", "@Recycle", "@Recently-Snapshot", "Network Trash Folder")
    plant(tmp_path / "set", {f"{name}/a/x.png": PIXEL for name in junk} | {"cat/1.png": PIXEL})
    plant(tmp_path / "set", {f"cat/{name}/x.png": PIXEL for name in junk})
    members = {f"{name}/x.png": PIXEL for name in junk} | {f"./dog/{j}/x.png": PIXEL for j in junk}
    tar(tmp_path / "set/more.tar", members | {"dog/2.png": PIXEL, "dog/._2.png": b"x"})
    assert sorted(names_of(tmp_path / "set")) == ["cat/1.png", "dog/2.png"]
    assert not scan(tmp_path / "set").unread


def test_names_of_any_bytes(tmp_path):
    """Latin-1 and control characters, in trees and tars; they can be printed anywhere."""
    raw = [b"caf\xe9.png", b"bell\x07.png", "grün.png".encode()]
    for name in raw:
        plant(tmp_path / "set", {os.fsdecode(name): PIXEL})
    plant(tmp_path / "set", {os.fsdecode(b"\xe9.txt"): b"words"})
    tar(tmp_path / "set/more.tar", {os.fsdecode(b"in/d\xe9chir\xe9.png"): PIXEL})
    source, _ = open_sources(f"folder:{tmp_path / 'set'}", ("all", "all"))
    names = {source.name_of(i) for i in range(len(source.examples))}
    assert names == {"caf\\xe9.png", "bell\\x07.png", "grün.png", "in/d\\xe9chir\\xe9.png"}
    assert source.unread == [("\\xe9.txt", "not an image of a known format")]
    assert all(source.examples[i]["image"] == PIXEL for i in range(4))
    assert printable("a\nb\x1b[31m") == "a\\nb\\x1b[31m"


@pytest.mark.parametrize("name", ["x[1]", "a*b?", "~", "~user", "{a,b}", "100%", "#1", "a b", "é"])
def test_paths_of_any_characters(tmp_path, name, monkeypatch):
    root = plant(tmp_path / name, {f"{name}/{name}.png": PIXEL, f"{name}/2.png": PIXEL})
    table = root / f"{name}.csv"
    table.write_text(f'"{name}/{name}.png",cat\n"{name}/2.png",dog\n')
    (source,) = open_sources(f"folder:{root}", ("all",), labels=str(table))
    assert {source.name_of(i) for i in range(2)} == {f"{name}/{name}.png", f"{name}/2.png"}
    monkeypatch.chdir(tmp_path)
    if not name.startswith("~"):  # which is the home folder, as in a shell
        assert len(Folder(name).names) == 2


# --- The cache. ---


@pytest.fixture
def opened(monkeypatch):
    """Names of the files whose headers were read."""
    names, describe = [], manifest.describe

    def noted(root, tars, file, large):
        names.append(file.name)
        return describe(root, tars, file, large)

    monkeypatch.setattr(manifest, "describe", noted)
    return names


def test_a_cached_scan_opens_nothing(tree, opened):
    first = scan(tree)
    assert len(opened) == len(GOOD | BAD | NO_IMAGES) - 1  # all but the tar
    opened.clear()
    again = scan(tree)
    assert not opened
    assert again.names == first.names
    assert (again.rows == first.rows).all()
    assert again[3:] == first[3:]


def test_new_deleted_and_completed_files_are_seen(tree, opened):
    before = scan(tree)
    opened.clear()
    plant(tree, {"one/two/new.jpg": jpeg(20)})
    (tree / "array.npy").unlink()
    (tree / "empty.jpg").write_bytes(jpeg(21))  # a copy that is complete now
    names = names_of(tree)
    assert set(opened) == {"one/two/new.jpg", "empty.jpg"} | set(NO_IMAGES) - {"cut.tar"}
    assert "array.npy" not in names
    assert {"one/two/new.jpg", "empty.jpg"} <= set(names)
    assert before.rows.shape == (len(names) - 1,)


@pytest.mark.parametrize("same_size", [True, False])
def test_an_image_that_is_overwritten_in_place_is_seen(tmp_path, opened, same_size):
    gray, thirteen = npy(pixels(0, 13, 10, 4)), npy(pixels(1, 4, 10, 13))
    assert len(gray) == len(thirteen)
    plant(tmp_path, {"a.npy": gray, "b.npy": gray})
    scan(tmp_path)
    opened.clear()
    (tmp_path / "a.npy").write_bytes(thirteen if same_size else npy(pixels()))
    examples = Folder(tmp_path).examples("all")
    assert opened == ["a.npy"]
    read = {examples.name(i): examples[i]["image"] for i in range(2)}
    assert read["a.npy"] == (tmp_path / "a.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(b"words")
    assert names_of(tmp_path) == ["a.npy"]
    plant(tmp_path, {"a.npy": b"words"})
    with pytest.raises(BadImageError, match="changed since the folder was scanned"):
        next(examples[i] for i in range(2) if examples.name(i) == "a.npy")


def test_without_a_cache_everything_is_scanned(tree, opened, cache):
    shutil.rmtree(cache)
    cache.write_text("no folder")
    scan(tree)
    count = len(opened)
    scan(tree)
    assert len(opened) == 2 * count
    cache.unlink()


def test_a_damaged_cache_is_ignored(tree, cache):
    scan(tree)
    (cached,) = (cache / "mim_jax/manifests").iterdir()
    cached.write_bytes(cached.read_bytes()[:200])
    assert len(scan(tree).rows) == len(GOOD | BAD)


def test_a_folder_without_permission_is_listed(tree, monkeypatch):
    scandir = os.scandir

    def forbid(path):
        if str(path).endswith("/two"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(manifest.os, "scandir", forbid)
        names, unread = names_of(tree), dict(scan(tree).unread)
    assert set(names) == {name for name in GOOD | BAD if "two/" not in name or "one/" in name} - {
        name for name in GOOD | BAD if "/two/" in name
    }
    assert unread["two"] == "cannot be read: Permission denied"
    assert len(names_of(tree)) == len(GOOD | BAD)  # it is tried again


# --- Tars. ---


def test_tars_are_read_as_if_they_were_unpacked(tmp_path):
    images = {f"{i}.jpg": jpeg(i) for i in range(4)}
    tar(tmp_path / "set/train/n01.tar", images)  # a tar per class, as ImageNet has them
    tar(tmp_path / "set/train/shard-0.tar", {"./n02/a.jpg": jpeg(5), "n02/b.txt": b"words"})
    tar(tmp_path / "set/val.tar", {"n01/b.jpg": jpeg(6), "n02/._b.jpg": b"x"})
    assert set(names_of(tmp_path / "set")) == {
        *(f"train/n01/{i}.jpg" for i in range(4)),
        "train/n02/a.jpg",
        "val/n01/b.jpg",
    }
    train, validation = open_sources(
        f"folder:{tmp_path / 'set'}", ("train", "validation"), labels="folder"
    )
    assert (len(train.examples), len(validation.examples), train.num_labels) == (5, 1, 2)
    read = {train.name_of(i): train.examples[i] for i in range(5)}
    assert read["train/n01/2.jpg"] == {"image": images["2.jpg"], "label": 0}
    assert read["train/n02/a.jpg"] == {"image": jpeg(5), "label": 1}


def test_tars_in_a_tar_are_read_in_place(tmp_path):
    """ImageNet's training set is a tar of a thousand tars, the whole of ImageNet one of 21841."""
    images = {f"n0{k}": {f"n0{k}_{i}.JPEG": jpeg(9 * k + i) for i in range(3)} for k in (1, 2)}
    inner = {f"{k}.tar": tar(tmp_path / "inner.tar", images[k]).read_bytes() for k in images}
    path = tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    (source,) = open_sources(f"folder:{path}", ("all",), labels="folder")
    read = {source.name_of(i): source.examples[i] for i in range(len(source.examples))}
    assert source.class_names == ["n01", "n02"]
    assert read == {
        f"{synset}/{name}": {"image": content, "label": int(synset[-1]) - 1}
        for synset, members in images.items()
        for name, content in members.items()
    }
    inner["n03.tar"] = inner["n01.tar"][:3000]  # the others are read all the same
    tar(tmp_path / "set/train.tar", inner | {"n04/a.jpg": jpeg()})
    tar(tmp_path / "set/ILSVRC2012_img_val.tar", {"n01/v.JPEG": jpeg(3)})
    folder = Folder(tmp_path / "set", "folder")
    assert sorted(folder.splits) == ["train", "validation"]
    assert {"n01", "n02", "n04"} <= set(folder.label_names)
    ((name, reason),) = folder.unread
    assert name == "train/n03.tar"
    assert "not a complete tar file" in reason


def test_a_tar_may_be_the_whole_set_and_may_be_cut_off(tmp_path):
    path = tar(tmp_path / "set.tar", {f"{i}/{i}.jpg": jpeg(i, height=100) for i in range(10)})
    assert Folder(path, "folder").label_names == [str(i) for i in range(10)]
    path.write_bytes(path.read_bytes()[:-30_000])
    cut = scan(path)
    assert 0 < len(cut.rows) < 10
    assert cut.unread == [("", "not a complete tar file: it is truncated")]


def test_what_follows_the_end_of_a_tar_is_not_dropped_silently(tmp_path):
    """Of joined tars, and of one with a damaged header, only the first part is read."""
    first, second = (tar(tmp_path / f"{i}.tar", {f"{i}/a.jpg": jpeg(i)}) for i in range(2))
    joined = plant(tmp_path / "set", {"x.tar": first.read_bytes() + second.read_bytes()})
    assert names_of(joined) == ["0/a.jpg"]
    assert "more data follows its end" in dict(scan(joined).unread)["x.tar"]
    content = bytearray(
        tar(tmp_path / "2.tar", {f"{i}.jpg": jpeg(i) for i in range(3)}).read_bytes()
    )
    at = content.index(b"1.jpg")
    content[at + 150] ^= 255  # its checksum
    damaged = plant(tmp_path / "damaged", {"x.tar": bytes(content)})
    assert names_of(damaged) == ["x/0.jpg"]
    assert "more data follows its end" in dict(scan(damaged).unread)["x.tar"]


def test_links_in_tars_are_followed_or_listed(tmp_path):
    (tmp_path / "set").mkdir()
    links = {
        "b/hard.png": (tarfile.LNKTYPE, "a/0.png"),
        "b/soft.png": (tarfile.SYMTYPE, "../a/1.png"),
        "b/chain.png": (tarfile.SYMTYPE, "soft.png"),
        "b/broken.png": (tarfile.SYMTYPE, "nothing.png"),
        "b/outside.png": (tarfile.SYMTYPE, "/etc/hostname"),
        "b/circle.png": (tarfile.SYMTYPE, "circle.png"),
        "b/pipe": (tarfile.FIFOTYPE, ""),
    }
    with tarfile.open(tmp_path / "set/x.tar", "w") as file:
        for i in range(2):
            member = tarfile.TarInfo(f"a/{i}.png")
            member.size = len(jpeg(i))
            file.addfile(member, io.BytesIO(jpeg(i)))
        for name, (kind, target) in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)
    folder = Folder(tmp_path / "set", "folder")
    examples = folder.examples("all")
    read = {examples.name(i): examples[i]["image"] for i in range(len(examples))}
    hard, soft = {"b/hard.png": jpeg(0)}, dict.fromkeys(("b/soft.png", "b/chain.png"), jpeg(1))
    assert read == {"a/0.png": jpeg(0), "a/1.png": jpeg(1)} | hard | soft
    assert set(dict(folder.unread)) == set(links) - set(read)
    assert dict(folder.unread)["b/pipe"] == "not a regular file"


def test_the_last_of_members_with_one_name_counts(tmp_path):
    path = tar(tmp_path / "x.tar", {"a/0.png": PIXEL})
    with tarfile.open(path, "a") as file:
        member = tarfile.TarInfo("a/0.png")
        member.size = len(jpeg())
        file.addfile(member, io.BytesIO(jpeg()))
    examples = Folder(path).examples("all")
    assert [examples[i]["image"] for i in range(len(examples))] == [jpeg()]


def test_members_with_unusual_paths(tmp_path):
    tar(tmp_path / "set/x.tar", {"/abs/a.png": PIXEL, "../up.png": PIXEL, "a//b/./c.png": PIXEL})
    assert sorted(names_of(tmp_path / "set")) == ["a/b/c.png", "abs/a.png"]
    assert [reason for _, reason in scan(tmp_path / "set").unread] == [
        "its path leads out of the tar"
    ]


def test_a_large_tiff_in_a_tar_is_read_to_its_end(tmp_path):
    """The pages of a TIFF may lie behind the part that tells other images."""
    array = pixels(0, 300, 400, 5).transpose(2, 0, 1)
    content = tif(array, photometric="minisblack", metadata=None)
    assert len(content) > 2 * manifest.HEAD
    tar(tmp_path / "set/x.tar", {"a/0.tif": content})
    assert scan(tmp_path / "set").modes == ["uint8 x 5"]


def test_paths_that_are_not_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        scan(tmp_path / "nowhere")
    (tmp_path / "set.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="neither a folder nor an uncompressed tar"):
        scan(tmp_path / "set.tar.gz")


def test_tars_without_an_end(tmp_path):
    """Tars in tars in tars, and zeros that take days to read, are listed as not read."""
    content = b""
    for _ in range(500):
        file, member = io.BytesIO(), tarfile.TarInfo("inner.tar")
        member.size = len(content)
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(member, io.BytesIO(content))
        content = file.getvalue()
    (tmp_path / "deep.tar").write_bytes(content)
    (tmp_path / "long.tar").write_bytes(tarfile.TarInfo("a.png").tobuf())
    os.truncate(tmp_path / "long.tar", 2**42)
    unread = dict(scan(tmp_path).unread)
    assert "more data follows its end" in unread["long.tar"]
    assert any("recursion" in reason for reason in unread.values())
