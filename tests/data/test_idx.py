import functools
import gzip
import hashlib
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_l2l.data import idx

VALUES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
IDX = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + VALUES.tobytes()


SIZES = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), min_size=1, max_size=3)


def changed(content, change):
    place, value = change
    return content[:place] + bytes([value]) + content[place + 1 :]


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
        (IDX + b"00", "has more than 40 bytes, expected 40"),
        (b"\0\0\x08\1" + IDX[4:], "has the magic number 0x00000801, expected 0x00000803"),
        (b"\0\0\x0d\3" + IDX[4:], "has the magic number 0x00000d03, expected 0x00000803"),
        (IDX[:4] + b"\xff" * 12 + IDX[16:], "has 40 bytes, expected 792281624"),  # the product must not overflow
        (IDX[:4] + bytes(4) + b"\xff" * 8, r"states the shape \(0, 4294967295, 4294967295\)"),
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


MUTATIONS = st.lists(st.tuples(st.integers(0, len(IDX) - 1), st.integers(0, 255)), max_size=3)


@given(
    content=st.binary(max_size=64)
    | st.builds(lambda n: IDX[:n], st.integers(0, len(IDX)))
    | st.builds(lambda sizes, rest: IDX[:4] + np.array(sizes, ">u4").tobytes() + rest, SIZES, st.binary(max_size=30))
    | st.builds(lambda changes: functools.reduce(changed, changes, IDX), MUTATIONS),
    packed=st.booleans(),
    num_dims=st.sampled_from([1, 3]),
)
@example(content=IDX[:4] + bytes(8) + b"\xff" * 4, packed=False, num_dims=3)
@example(content=b"\0\0\x08\1\0\0\0\0", packed=True, num_dims=1)
def test_any_bytes_give_an_array_or_one_line(tmp_path_factory, content, packed, num_dims):
    path = tmp_path_factory.getbasetemp() / f"hostile{'.gz' if packed else ''}"
    try:
        values = idx.read_idx(write(path, content), num_dims)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert values.dtype == np.uint8 and values.ndim == num_dims
        assert values.tobytes() == content[4 + 4 * num_dims :]


@given(place=st.integers(0, len(gzip.compress(IDX)) - 1), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_a_damaged_archive_gives_the_array_or_one_line(tmp_path_factory, place, value, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.gz"
    packed = gzip.compress(IDX, mtime=0)
    path.write_bytes(changed(packed, (place, value))[: len(packed) - cut])
    try:
        assert np.array_equal(idx.read_idx(path, 3), VALUES)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_of_a_gzip_bomb_no_more_is_unpacked_than_its_header_promises(tmp_path):
    path = write(tmp_path / "images.gz", IDX + bytes(200_000_000))
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"has more than 40 bytes, expected 40 for the shape"):
        idx.read_idx(path, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_a_folder_or_a_dangling_link_in_the_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} cannot be read .Is a directory.; delete it"):
        idx.read_idx(tmp_path / name, 3)
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a cannot be read .No such file or directory.; delete it"):
        idx.read_idx(tmp_path / "a", 3)


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


class Hostile(BaseHTTPRequestHandler):
    """Answers according to the folder that is asked for."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        good = gzip.compress(FILES[self.path.split("/")[2].removesuffix(".gz")])
        if kind in ("file", "ftp"):
            self.send_response(302)
            self.send_header("Location", f"{kind}://localhost/etc/passwd")
            self.end_headers()
            return
        if kind == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if kind == "mute":
            self.server.over.wait(20)
            return
        self.send_response(200)
        if kind in ("short", "trickle"):
            self.send_header("Content-Length", str(len(good) + 7))
        if kind == "unsized":
            self.send_header("Content-Length", "many")
        self.end_headers()
        pieces = {
            "short": [good],
            "trailing": [good + b"more"],
            "bomb": [gzip.compress(bytes(2_000_000))],
            "unsized": [good],
            "endless": (bytes(100_000) for _ in range(10_000)),
            "trickle": ([b"0"] * 10_000),
        }[kind]
        try:
            for piece in pieces:
                self.wfile.write(piece)
                if kind == "trickle" and self.server.over.wait(0.05):
                    return
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def hostile():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.over = threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("file", "file://"),  # urllib refuses it
        ("ftp", "ftp"),
        ("loop", "redirect"),
        ("mute", "timed out"),
        ("short", "ended after"),
        ("trailing", "not a complete gzip file"),
        ("bomb", "more than 1000000 bytes"),
        ("unsized", "invalid literal"),
        ("endless", "the answer has more than 300000 bytes"),
        ("trickle", "it took more than 0.5 seconds"),
    ],
)
def test_a_hostile_answer_is_given_up_and_leaves_nothing(tmp_path, hostile, monkeypatch, kind, told):
    monkeypatch.setattr(idx, "_MOST_PACKED", 300_000)
    monkeypatch.setattr(idx, "_MOST_UNPACKED", 1_000_000)
    monkeypatch.setattr(idx, "_MOST_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="could not be downloaded") as caught:
        idx.download(tmp_path, [f"{hostile}{kind}/"], CHECKSUMS, timeout=1)
    assert time.monotonic() - start < 10
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert list(idx.raw_folder(tmp_path).iterdir()) == []


def test_a_file_is_never_half_there(tmp_path, mirror, monkeypatch):
    """Whenever it can be seen under its name it is complete: it is moved there after it was verified."""
    seen = []
    verify = idx._md5

    def look(part):
        seen.append([path.name for path in part.parent.iterdir()])
        return verify(part)

    monkeypatch.setattr(idx, "_md5", look)
    idx.download(tmp_path / "data", [f"{mirror}good/"], CHECKSUMS, timeout=5)
    for number, (names, name) in enumerate(zip(seen, FILES, strict=True)):
        assert f"{name}.gz" not in names and len(names) == number + 1
    assert_complete(tmp_path / "data")
