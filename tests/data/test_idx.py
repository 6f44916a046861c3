import functools
import gzip
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from lightning_l2l.data import idx

VALUES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
IDX = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + VALUES.tobytes()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_read(tmp_path, name):
    values = idx.read_idx(write(tmp_path / name, IDX), num_dims=3)
    assert values.dtype == np.uint8
    assert np.array_equal(values, VALUES)


def test_write(tmp_path):
    idx.write_idx(tmp_path / "images", VALUES)
    assert (tmp_path / "images").read_bytes() == IDX


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, expected a header of 16"),
        (IDX[:15], "has 15 bytes, expected a header of 16"),
        (IDX[:-1], r"has 39 bytes, expected 40 for the shape \(2, 3, 4\)"),
        (IDX + b"0", "has 41 bytes, expected 40"),
        (b"\0\0\x08\1" + IDX[4:], "has the magic number 0x00000801, expected 0x00000803"),
        (b"\0\0\x0d\3" + IDX[4:], "has the magic number 0x00000d03, expected 0x00000803"),
        (
            IDX[:4] + b"\xff" * 12 + IDX[16:],
            "has 40 bytes, expected 792281624",
        ),  # the product must not overflow
    ],
)
def test_damaged(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name} {message}.*; delete it and download it again$"):
        idx.read_idx(path, num_dims=3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-9],  # truncated
        lambda packed: packed[:12] + b"\xff\xff\xff\xff" + packed[16:],
        lambda packed: packed[:-8] + b"\0\0\0\0" + packed[-4:],  # checksum
        lambda packed: b"<html>not here</html>",
    ],
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(IDX)))
    with pytest.raises(ValueError, match=r"images.gz is not a complete gzip file .*; delete it and download"):
        idx.read_idx(path, num_dims=3)


def test_find_packed_or_unpacked(tmp_path):
    assert idx.find_idx(tmp_path, "labels") is None
    folder = idx.raw_folder(tmp_path)
    folder.mkdir(parents=True)
    packed = write(folder / "labels.gz", IDX)
    assert idx.find_idx(tmp_path, "labels") == packed
    unpacked = write(folder / "labels", IDX)
    assert idx.find_idx(tmp_path, "labels") == unpacked


FILES = {name: f"content of {name}".encode() * 100 for name in idx.CHECKSUMS}
CHECKSUMS = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path):
    """An address on this machine with folders of good files, wrong content, cut off files, HTML pages."""
    root = tmp_path / "mirror"
    for name, content in FILES.items():
        versions = {
            "good": gzip.compress(content),
            "wrong": gzip.compress(b"something else"),
            "cut": gzip.compress(content)[:-12],
            "page": b"<html>come back later</html>",
        }
        for folder, packed in versions.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{name}.gz").write_bytes(packed)
    handler = functools.partial(QuietHandler, directory=root)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def assert_complete(root):
    folder = idx.raw_folder(root)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in FILES)
    for name, content in FILES.items():
        assert gzip.decompress((folder / f"{name}.gz").read_bytes()) == content


@pytest.mark.parametrize("first", ["good", "wrong", "cut", "page", "absent"])
def test_download_takes_the_first_mirror_that_works(tmp_path, mirror, first):
    root = tmp_path / "data"
    idx.download(root, [f"{mirror}{first}/", f"{mirror}good/"], CHECKSUMS, timeout=5)
    assert_complete(root)


def test_download_leaves_files_that_are_there(tmp_path, mirror):
    folder = idx.raw_folder(tmp_path)
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        write(folder / name, content)
    idx.download(tmp_path, [], CHECKSUMS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_download_from_nowhere(tmp_path, mirror):
    mirrors = [f"{mirror}wrong/", f"{mirror}cut/", f"{mirror}absent/", "http://127.0.0.1:9/"]
    with pytest.raises(RuntimeError) as caught:
        idx.download(tmp_path, mirrors, CHECKSUMS, timeout=5)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in [*mirrors, "404", "MD5", "complete gzip", "refused"])
    assert all(f"{name}.gz" in message for name in FILES)
    assert str(idx.raw_folder(tmp_path)) in message
    assert list(idx.raw_folder(tmp_path).iterdir()) == []


def test_download_into_a_folder_that_cannot_be_made(tmp_path, mirror):
    (tmp_path / "data").write_text("a file in the way")
    with pytest.raises(RuntimeError, match=r"could not be downloaded .*by hand"):
        idx.download(tmp_path / "data", [f"{mirror}good/"], CHECKSUMS, timeout=5)
