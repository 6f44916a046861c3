import errno
import gzip
import hashlib
import io
import sys
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lightning_l2l.data import cifar10_files as files

RECORD = 1 + 3 * 32 * 32
RECORDS = np.random.default_rng(0).integers(256, size=(2, RECORD), dtype=np.uint8)
RECORDS[:, 0] = [7, 0]
BATCH = RECORDS.tobytes()
BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


# ---- binary files ----


def test_a_record_is_a_label_and_three_planes_of_rows(tmp_path):
    (tmp_path / "batch.bin").write_bytes(BATCH)
    images, labels = files.read_batch(tmp_path / "batch.bin")
    assert images.shape == (2, 3, 32, 32) and images.dtype == labels.dtype == np.uint8
    assert labels.tolist() == [7, 0]
    for number, channel, row, column in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 2, 31, 30)]:
        place = 1 + 1024 * channel + 32 * row + column
        assert images[number, channel, row, column] == BATCH[number * RECORD + place]


def test_a_published_file_has_ten_thousand_records():
    assert files._FILE_BYTES == 30_730_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, expected 30730000, or fewer in whole records of 3073"),
        (BATCH[:-1], "has 6145 bytes, expected 30730000, .*"),
        (BATCH + b"0", "has 6147 bytes, expected 30730000, .*"),
        (bytes(30_730_000 + RECORD), "has more than 30730000 bytes, expected 30730000, .*"),
        (BATCH[:RECORD] + b"\x0a" + BATCH[RECORD + 1 :], "has the label 10 in record 1, expected 0 to 9"),
    ],
)
def test_a_damaged_file(tmp_path, content, message):
    path = tmp_path / "batch.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"batch.bin {message}; delete it and download it again$"):
        files.read_batch(path)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); delete it and download it again$"):
        files.read_batch(tmp_path)


def changed(content, changes):
    content = bytearray(content)
    for place, value in changes:
        content[place % len(content)] = value
    return bytes(content)


MUTATIONS = st.lists(st.tuples(st.integers(0, 2 * RECORD - 1), st.integers(0, 255)), max_size=3)


@given(
    content=st.binary(max_size=64)
    | st.builds(lambda n: BATCH[:n], st.integers(0, len(BATCH)))
    | st.builds(lambda changes: changed(BATCH, changes), MUTATIONS)
    | st.builds(lambda labels: b"".join(bytes([n]) + bytes(RECORD - 1) for n in labels), st.lists(st.integers(0, 11)))
)
@example(content=BATCH[:RECORD])
@example(content=bytes([10]) + bytes(RECORD - 1))
def test_any_bytes_give_images_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "hostile.bin"
    path.write_bytes(content)
    try:
        images, labels = files.read_batch(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert labels.max() < 10
        records = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
        assert records.tobytes() == content


# ---- folders of images ----


def pixels(seed):
    return np.random.default_rng(seed).integers(256, size=(32, 32, 3), dtype=np.uint8)


def write_images(folder, suffix="png", num=2, **options):
    """`num` different images of each class, of which those with smaller names are written last."""
    for label, name in enumerate(files.CLASSES):
        (folder / name).mkdir(parents=True)
        for number in reversed(range(num)):
            Image.fromarray(pixels(num * label + number)).save(folder / name / f"{number:04}.{suffix}", **options)


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("bmp", {}), ("ppm", {}), ("tiff", {}), ("webp", {"lossless": True})]
)
def test_images_in_the_order_of_labels_and_names(tmp_path, suffix, options):
    write_images(tmp_path, suffix, **options)
    (tmp_path / "cat/.DS_Store").write_text("no image")
    (tmp_path / "elephant").mkdir()
    images, labels = files.read_images(tmp_path)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert images.dtype == labels.dtype == np.uint8
    for number, image in enumerate(images):
        assert np.array_equal(image.transpose(1, 2, 0), pixels(number))  # [y, x, channel]


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


PNG = encoded(Image.fromarray(pixels(0)), "PNG")
JPEG = encoded(Image.fromarray(pixels(0)), "JPEG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read as an image \(no format fits it\)"),
        (b"<html>come back later</html>", r"cannot be read as an image \(no format fits it\)"),
        (PNG[:-600], r"cannot be read as an image \(.*\)"),
        (JPEG[:-300], r"cannot be read as an image \(image file is truncated .*\)"),
        (PNG[:60] + bytes(40) + PNG[100:], r"cannot be read as an image \(.*\)"),
        (encoded(Image.new("RGB", (32, 31)), "PNG"), "is PNG of 32 x 31 pixels and mode RGB, expected an image of 32"),
        (encoded(Image.new("RGB", (20_000, 100)), "PNG"), "is PNG of 20000 x 100 pixels and mode RGB"),
        (encoded(Image.new("L", (32, 32)), "PNG"), "is PNG of 32 x 32 pixels and mode L, expected .* mode RGB"),
        (encoded(Image.new("RGB", (32, 32)), "EPS"), "is EPS of 32 x 32 pixels and mode RGB, expected an image of"),
    ],
)
def test_a_damaged_image_is_named(tmp_path, content, message):
    write_images(tmp_path, num=1)
    (tmp_path / "deer/0001.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"deer/0001.png {message}.*; delete or replace it$"):
        files.read_images(tmp_path)


def test_of_an_image_of_another_size_only_the_header_is_read(tmp_path):
    write_images(tmp_path, num=1)
    header = PNG[:16] + (10_000).to_bytes(4, "big") * 2 + PNG[24:29]
    header += zlib.crc32(header[12:]).to_bytes(4, "big")
    (tmp_path / "deer/bomb.png").write_bytes(header + PNG[33:])
    with pytest.raises(ValueError, match=r"bomb\.png is PNG of 10000 x 10000 pixels and mode RGB"):
        files.read_images(tmp_path)


def test_a_folder_in_the_place_of_an_image(tmp_path):
    write_images(tmp_path, num=1)
    (tmp_path / "ship/more").mkdir()
    with pytest.raises(ValueError, match=r"ship/more cannot be read as an image \(Is a directory\); delete or replace"):
        files.read_images(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root, num=1)
    return root


@given(
    packed=st.sampled_from([PNG, JPEG]),
    changes=st.lists(st.tuples(st.integers(0, len(PNG) - 1), st.integers(0, 255)), max_size=4)
    | st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=2),
    cut=st.just(0) | st.integers(0, len(PNG)),
)
def test_any_damage_to_an_image_gives_an_image_or_one_line(folder, packed, changes, cut):
    path = folder / "truck/0001.image"
    path.write_bytes(changed(packed, changes)[: len(packed) - cut])
    try:
        images, _ = files.read_images(folder)
        assert images.shape == (11, 3, 32, 32)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 800


@pytest.mark.parametrize("empty", [True, False])
def test_a_class_without_images(tmp_path, empty):
    write_images(tmp_path, num=1)
    (tmp_path / "frog/0000.png").unlink()
    if not empty:
        (tmp_path / "frog").rmdir()
    with pytest.raises(FileNotFoundError, match="frog has no images; put those of the class there, one folder for"):
        files.read_images(tmp_path)


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ImportError, match=r"has image files, .* needs Pillow .*; pip install 'lightning_l2l\[images\]'$"
    ):
        files.read_images(tmp_path)


def test_image_folders_are_found_by_their_classes(tmp_path):
    assert files.find_image_folder(tmp_path) is None
    (tmp_path / "train/other").mkdir(parents=True)
    assert files.find_image_folder(tmp_path) is None
    (tmp_path / "train/dog").mkdir()
    assert files.find_image_folder(tmp_path) == tmp_path
    (tmp_path / "cifar10/train/cat").mkdir(parents=True)
    assert files.find_image_folder(tmp_path) == tmp_path / "cifar10"


# ---- the archive ----


@pytest.fixture
def small(monkeypatch):
    """As if each published file had two images."""
    monkeypatch.setattr(files, "_FILE_BYTES", len(BATCH))


def regular(name, content=BATCH, **changes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    return member, content


def link(name, target, kind=tarfile.SYMTYPE):
    return regular(name, b"", type=kind, linkname=target)


def own(name):
    """What file `name` of the good archive has in it."""
    return BATCH[:1] + name.encode().ljust(len(BATCH) - 1, b"\0")


GOOD = [regular(f"cifar-10-batches-bin/{name}", own(name)) for name in BATCHES]
FOLDER = regular("cifar-10-batches-bin", b"", type=tarfile.DIRTYPE)
README = regular("cifar-10-batches-bin/readme.html", b"<html>")
FIRST = "cifar-10-batches-bin/data_batch_1.bin"


def pack(members, path, form=tarfile.PAX_FORMAT):
    """Writes an archive whose headers may say anything: nothing is looked up or checked."""
    packed = b"".join(
        member.tobuf(form) + content + bytes(-len(content) % tarfile.BLOCKSIZE) for member, content in members
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(packed + bytes(2 * tarfile.BLOCKSIZE), compresslevel=1))
    return path


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


UNPACKED = {f"cifar-10-batches-bin/{name}": own(name) for name in BATCHES}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_unpack_takes_the_six_files_and_nothing_else(tmp_path, small, form):
    archive = pack([FOLDER, README, *reversed(GOOD)], tmp_path / "archive", form)
    files.unpack(archive, tmp_path / "data")
    assert tree(tmp_path / "data") == UNPACKED


def test_unpack_leaves_files_that_are_there(tmp_path, small):
    there = tmp_path / "data" / FIRST
    there.parent.mkdir(parents=True)
    there.write_bytes(b"my own")
    files.unpack(pack(GOOD, tmp_path / "archive"), tmp_path / "data")
    assert tree(tmp_path / "data") == {**UNPACKED, FIRST: b"my own"}


@pytest.mark.parametrize(
    "member",
    [
        regular("../x"),
        regular("cifar-10-batches-bin/../../x"),
        regular("cifar-10-batches-bin/../../cifar-10-batches-bin/data_batch_1.bin"),
        regular("/x"),
        regular("data_batch_1.bin"),
        link("cifar-10-batches-bin", "/"),
        link("cifar-10-batches-bin", ".."),
        link("x", "../x"),
        link("x", "/etc/passwd", tarfile.LNKTYPE),
        regular("x", b"", type=tarfile.FIFOTYPE),
        regular("x", b"", type=tarfile.CHRTYPE),
    ],
    ids=lambda member: f"{member[0].name}-{member[0].linkname}",
)
def test_nothing_else_in_an_archive_reaches_the_disk(tmp_path, small, member):
    before = {path for path in tmp_path.rglob("*")}
    archive = pack([member, *GOOD, member], tmp_path / "archive")
    files.unpack(archive, tmp_path / "a" / "b")
    assert tree(tmp_path / "a") == {f"b/{name}": content for name, content in UNPACKED.items()}
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(path == archive or path.is_relative_to(tmp_path / "a") for path in new)
    assert not any(path.is_symlink() for path in new)


NONE = f"it has no cifar-10-batches-bin/ with {', '.join(BATCHES)}"
HOSTILE = {
    "a symbolic link": ([link(FIRST, "/etc/passwd"), *GOOD[1:]], "data_batch_1.bin is no regular file"),
    "a hard link": ([link(FIRST, "/etc/passwd", tarfile.LNKTYPE), *GOOD[1:]], "data_batch_1.bin is no regular file"),
    "a device": ([regular(FIRST, b"", type=tarfile.BLKTYPE), *GOOD[1:]], "data_batch_1.bin is no regular file"),
    "a folder": ([regular(FIRST, b"", type=tarfile.DIRTYPE), *GOOD[1:]], "data_batch_1.bin is no regular file"),
    "one too short": ([regular(FIRST, BATCH[:-1]), *GOOD[1:]], "data_batch_1.bin has 6145 bytes, expected 6146"),
    "one too long": ([regular(FIRST, BATCH + b"0"), *GOOD[1:]], "data_batch_1.bin' has 6147 bytes, expected at most"),
    "a huge size": ([regular(FIRST, size=2**60), *GOOD[1:]], "data_batch_1.bin' has 1152921504606846976 bytes"),
    "another's huge size": ([regular("x", size=2**60), *GOOD], "'x' has 1152921504606846976 bytes, expected at most"),
    "a negative size": ([regular("x", size=-512), *GOOD], NONE),
    "one missing": (GOOD[:-1], "it has no cifar-10-batches-bin/ with test_batch.bin"),
    "all missing": ([README], NONE),
    "nothing": ([], NONE),
    "an end too early": ([*GOOD[:-1], regular("x", size=6000)], ""),
    "a huge header": ([regular("x", size=2**60, type=tarfile.XHDTYPE), *GOOD], ""),
    "headers alone": ([regular("x", b"", type=tarfile.XHDTYPE)] * 500, ""),
    "many members": ([regular(f"{number}", b"") for number in range(200)] + GOOD, "it has more than 100 members"),
    "much content": ([regular("x", bytes(6000))] * 90 + GOOD, "the unpacked content has more than 300000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_told_in_one_line(tmp_path, small, monkeypatch, name):
    monkeypatch.setattr(files, "_MOST_UNPACKED", 300_000)
    members, told = HOSTILE[name]
    archive = pack(members, tmp_path / "archive", tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match=r"archive cannot be unpacked .*; delete it and download it again$") as caught:
        files.unpack(archive, tmp_path / "data")
    assert told in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    found = tree(tmp_path / "data")  # those before the hostile one may be there, complete
    assert found.items() <= UNPACKED.items()


def test_a_name_of_many_megabytes_is_given_up(tmp_path, small, monkeypatch):
    monkeypatch.setattr(files, "_MOST_UNPACKED", 300_000)
    archive = pack([regular("././@LongLink", b"a" * 50_000_000, type=tarfile.GNUTYPE_LONGNAME)], tmp_path / "archive")
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 300000 bytes"):
        files.unpack(archive, tmp_path / "data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


PACKED = gzip.compress(
    b"".join(m.tobuf() + c + bytes(-len(c) % 512) for m, c in [FOLDER, *GOOD]) + bytes(1024), 1, mtime=0
)
PLAIN = gzip.decompress(PACKED)


@given(
    damage=st.builds(
        lambda changes, cut: changed(PACKED, changes)[: len(PACKED) - cut],
        st.lists(st.tuples(st.integers(0, len(PACKED) - 1), st.integers(0, 255)), max_size=3),
        st.just(0) | st.integers(0, len(PACKED)),
    )
    | st.builds(
        lambda changes, cut: gzip.compress(changed(PLAIN, changes)[: len(PLAIN) - cut], 1),
        st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
        st.just(0) | st.integers(0, len(PLAIN)),
    )
    | st.binary(max_size=50)
)
def test_any_damage_gives_the_files_or_one_line(tmp_path_factory, damage):
    root = tmp_path_factory.mktemp("damaged")
    (root / "archive").write_bytes(damage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_FILE_BYTES", len(BATCH))
        try:
            files.unpack(root / "archive", root / "data")
        except ValueError as error:
            assert str(error).startswith(f"{root / 'archive'} cannot be unpacked") and "\n" not in str(error)
        else:
            assert set(tree(root / "data")) == set(UNPACKED)
    assert all(len(content) == len(BATCH) for content in tree(root / "data").values())
    assert {path.name for path in root.iterdir()} <= {"archive", "data"}


def test_a_full_disk_leaves_no_half_file(tmp_path, small, monkeypatch):
    def full(source, target, *_):
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.shutil, "copyfileobj", full)
    with pytest.raises(ValueError, match=r"unpacked to .*batches-bin \(No space left on device\); make room there"):
        files.unpack(pack(GOOD, tmp_path / "archive"), tmp_path / "data")
    assert tree(tmp_path / "data") == {}


# ---- downloading it ----


@pytest.fixture
def mirror(tmp_path, small):
    """Addresses of folders with the archive and with another one, and the MD5 of the first."""
    good = pack([FOLDER, *GOOD], tmp_path / "mirror/good" / files.ARCHIVE)
    pack(GOOD[:2], tmp_path / "mirror/wrong" / files.ARCHIVE)
    return f"{(tmp_path / 'mirror').as_uri()}/", hashlib.md5(good.read_bytes()).hexdigest()


@pytest.mark.parametrize("first", ["good", "wrong", "absent"])
def test_download(tmp_path, mirror, first):
    address, checksum = mirror
    root = tmp_path / "data"
    files.download(root, [f"{address}{first}/", f"{address}good/"], checksum)
    found = tree(root)
    assert hashlib.md5(found.pop(files.ARCHIVE)).hexdigest() == checksum
    assert found == UNPACKED


def test_nothing_is_downloaded_if_all_files_are_there(tmp_path, mirror):
    files.download(tmp_path / "data", [f"{mirror[0]}good/"], mirror[1])
    (tmp_path / "data" / files.ARCHIVE).unlink()
    files.download(tmp_path / "data", [], "")


def test_an_archive_put_there_by_hand_is_used(tmp_path, mirror):
    root = tmp_path / "data"
    pack([FOLDER, *GOOD], root / files.ARCHIVE)
    checksum = hashlib.md5((root / files.ARCHIVE).read_bytes()).hexdigest()
    files.download(root, [], checksum)
    assert tree(root).items() >= UNPACKED.items()


def test_an_archive_is_verified_before_it_is_unpacked(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(files, "unpack", lambda *_: pytest.fail("unpacked"))
    root = tmp_path / "data"
    with pytest.raises(RuntimeError) as caught:
        files.download(root, [f"{mirror[0]}wrong/", "http://127.0.0.1:9/"], mirror[1], timeout=5)
    message = str(caught.value)
    assert "cifar-10-binary.tar.gz could not be downloaded" in message and "\n" not in message
    assert all(part in message for part in ["MD5", mirror[1], "refused", f"into {root} by hand"])
    assert tree(root) == {}
    pack(GOOD[:2], root / files.ARCHIVE)
    with pytest.raises(ValueError, match=rf"tar.gz cannot be used \(.* MD5 .*, expected {mirror[1]}\); delete it and"):
        files.download(root, [f"{mirror[0]}good/"], mirror[1])
    assert set(tree(root)) == {files.ARCHIVE}


def test_an_answer_without_end_is_given_up(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(files, "_MOST_PACKED", 100)
    with pytest.raises(RuntimeError, match="more than 100 bytes"):
        files.download(tmp_path / "data", [f"{mirror[0]}good/"], mirror[1])
    assert tree(tmp_path / "data") == {}
