"""How moments come into files: pieces, threads, checksums, and file systems that refuse."""

import asyncio
import errno
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_optax
from helpers import assert_trees_equal, ext, hooks, orbax_hook, part_file
from paged_optax import load_moments, save_moments

PIECE = 8 * 2**20  # of xla_ffi/state/save.cc


@pytest.fixture(autouse=True)
def no_failure_is_left():
    yield
    hooks.withdraw_failure()


def noise(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@pytest.fixture
def trained():
    """An optimizer, parameters, and a state after two steps, of more than one piece."""
    tx = paged_optax.scale_by_paged_adam8bit()
    params = {"a": jnp.ones((3000, 1500)), "b": jnp.ones(7), "c": jnp.ones((99, 301))}
    state = tx.init(params)
    for i in range(2):
        grads = {
            k: jnp.asarray(noise(p.size, i).reshape(p.shape), p.dtype) for k, p in params.items()
        }
        _, state = tx.update(grads, state)
    return tx, params, jax.block_until_ready(state)


# --- Checksums -----------------------------------------------------------------------------------


def test_checksums_are_those_of_zlib():
    data = noise(5000)
    rng = np.random.default_rng(1)
    for _ in range(2000):
        begin, end = sorted(rng.integers(0, data.size, 2).tolist())
        middle, start = int(rng.integers(begin, end + 1)), int(rng.integers(2**32))
        part = data[begin:end].tobytes()
        assert hooks.crc32(part, start) == hooks.plain_crc32(part, start) == zlib.crc32(part, start)
        first, second = zlib.crc32(data[begin:middle]), zlib.crc32(data[middle:end])
        assert hooks.join_crc32(first, second, end - middle) == zlib.crc32(part)


# --- Pieces --------------------------------------------------------------------------------------

SIZES = {
    "nothing": [],
    "empty": [0, 0],
    "small": [1, 0, 4095, 4096, 4097, 3],
    "many": [1000 + i for i in range(3000)],
    "at a border": [PIECE, PIECE - 1, 2, PIECE + 4095],
    "large": [3 * PIECE + 12345, 17],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("refused", ["", "open", "fallocate", "pwrite"])
def test_arrays_are_written_whole(sizes, refused, tmp_path):
    """One after the other; also where a file system takes no short cut past the page cache."""
    arrays = [noise(nbytes, i) for i, nbytes in enumerate(SIZES[sizes])]
    path = tmp_path / "file"
    path.touch()
    if refused:
        hooks.fail_call(refused, errno.EINVAL, after=1 if refused == "open" else 0)
    sums = ext.write_arrays(str(path), arrays)
    assert path.read_bytes() == b"".join(array.tobytes() for array in arrays)
    assert sums == [zlib.crc32(array) for array in arrays]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("room", [0, 2**40])
def test_arrays_are_written_in_the_background(sizes, room, tmp_path):
    """As they were: whoever owns them may change them meanwhile."""
    arrays = [noise(nbytes, i) for i, nbytes in enumerate(SIZES[sizes])]
    before = [array.copy() for array in arrays]
    path = tmp_path / "file"
    path.touch()
    save = ext.BackgroundSave(str(path), arrays, room)
    for array in arrays:
        array[:] = 0
    assert save.finish() == [zlib.crc32(array) for array in before]
    assert path.read_bytes() == b"".join(array.tobytes() for array in before)
    with pytest.raises(ValueError, match="is finished"):
        save.finish()


@pytest.fixture(scope="module")
def many_pieces():
    """More than there are threads and buffers."""
    return noise(10 * PIECE + 4321)


def test_background_that_has_room_for_less(many_pieces, tmp_path):
    """More pieces than threads and buffers together; also where the machine has no more threads."""
    data = many_pieces
    for call, error in (("", 0), ("thread", errno.EAGAIN), ("pwrite", errno.EINTR)):
        path = tmp_path / f"file{call}"
        path.touch()
        if call:
            hooks.fail_call(call, error)
        assert ext.BackgroundSave(str(path), [data], 0).finish() == [zlib.crc32(data)]
        assert path.read_bytes() == data.tobytes()


def test_background_that_nobody_waits_for(tmp_path):
    data = noise(4 * PIECE)
    for _ in range(5):
        (tmp_path / "file").write_bytes(b"")
        save = ext.BackgroundSave(str(tmp_path / "file"), [data], 2**40)
        del save


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("call", ["open", "fallocate", "pwrite", "empty pwrite"])
def test_background_where_the_disk_is_full(call, after, many_pieces, tmp_path):
    """Any write may fail, also while others wait for the memory that it would have given back."""
    if after and "pwrite" not in call:
        pytest.skip("there is one such call")
    path = tmp_path / "file"
    path.touch()
    hooks.fail_call(call, errno.ENOSPC, after=after)
    with pytest.raises(OSError) as error:
        ext.BackgroundSave(str(path), [many_pieces], 0).finish()
    assert error.value.errno == (errno.EIO if call == "empty pwrite" else errno.ENOSPC)
    assert error.value.filename == str(path)


@pytest.mark.parametrize("call", ["open", "fallocate", "pwrite"])
def test_disk_that_is_full(call, trained, tmp_path):
    _, _, state = trained
    path = tmp_path / "m.safetensors"
    save_moments(state, path)
    before = path.read_bytes()
    hooks.fail_call(call, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left") as error:
        save_moments(state, path)
    assert error.value.errno == errno.ENOSPC and str(tmp_path) in error.value.filename
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    save_moments(state, path)
    assert path.read_bytes() == before


def test_a_name_that_is_not_utf8(trained, tmp_path):
    """Linux allows any bytes; Python shows them as surrogates."""
    tx, params, state = trained
    path = tmp_path / os.fsdecode(b"m\xff.safetensors")
    save_moments(state, path)
    restored = load_moments(tx.init(params), path)
    assert_trees_equal(tx.update(params, restored)[0], tx.update(params, state)[0])
    restored = load_moments(tx.init(params), path)
    os.truncate(path, 5000)
    with pytest.raises(Exception, match=r"m\\udcff.safetensors' .* the file is too short"):
        tx.update(params, restored)
    hooks.fail_call("open", errno.EACCES)
    with pytest.raises(PermissionError) as error:
        save_moments(tx.init(params), path)
    assert "m\udcff.safetensors" in error.value.filename


def test_a_file_system_that_writes_nothing(trained, tmp_path):
    """It must not be asked for ever."""
    hooks.fail_call("empty pwrite", 1)
    with pytest.raises(OSError, match="Input/output error"):
        save_moments(trained[2], tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refused", [0, errno.EINVAL])
def test_moments_in_several_pieces(refused, trained, tmp_path):
    """What is written and read in pieces by threads is what `export_moments` copies."""
    tx, params, state = trained
    path = tmp_path / "m.safetensors"
    save_moments(state, path)
    exported = paged_optax.export_moments(state)
    restored = load_moments(tx.init(params), path)
    again = tmp_path / "again.safetensors"
    save_moments(restored, again)  # out of the file, before any step
    assert again.stat().st_size == path.stat().st_size
    if refused:
        hooks.fail_call("direct pread", refused)
    expected, state = tx.update(params, state)
    actual, restored = tx.update(params, restored)
    assert_trees_equal(actual, expected)
    assert_trees_equal(paged_optax.moments(restored), paged_optax.moments(state))
    copy = paged_optax.export_moments(load_moments(tx.init(params), again))
    del exported["paged_optax"], copy["paged_optax"]
    assert_trees_equal(copy, exported)


def test_read_that_fails(trained, tmp_path):
    tx, params, state = trained
    path = tmp_path / "m.safetensors"
    save_moments(state, path)
    hooks.fail_call("pread", errno.EIO)
    with pytest.raises(Exception, match="Input/output error"):
        jax.block_until_ready(tx.update(params, load_moments(tx.init(params), path)))


def test_every_piece_is_summed(trained, tmp_path):
    """A bit that another one hides from a sum of pieces would be lost in silence."""
    tx, params, state = trained
    path = tmp_path / "m.safetensors"
    save_moments(state, path)
    good = path.read_bytes()
    for at in (len(good) // 7, len(good) // 2, len(good) - 40_000):
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        restored = load_moments(tx.init(params), path)
        with pytest.raises(ValueError, match="checksum|damaged"):
            save_moments(restored, tmp_path / "other.safetensors")
        with pytest.raises(Exception, match="checksum|no step stores"):
            jax.block_until_ready(tx.update(params, restored))
        paged_optax.release(restored)


def test_a_loaded_state_is_saved_in_its_own_place(trained, tmp_path):
    """Before the first update, which still reads the file."""
    tx, params, state = trained
    path = tmp_path / "m.safetensors"
    nbytes = save_moments(state, path)
    before = path.stat()
    restored = load_moments(tx.init(params), path)
    assert save_moments(restored, path) == nbytes
    assert path.stat().st_ino == before.st_ino
    both = (restored, tx.update(params, tx.init(params))[1])
    with pytest.raises(ValueError, match="has not been read yet from .*m.safetensors"):
        save_moments(both, path)
    expected, actual = tx.update(params, state), tx.update(params, restored)
    assert_trees_equal(actual[0], expected[0])
    save_moments(actual[1], path)
    assert path.stat().st_ino != before.st_ino


@pytest.mark.parametrize("newest", [1, 2, 4])
def test_saves_of_several_numbers_of_processes_are_refused(newest, trained, tmp_path):
    """The old moments must not be taken for the new ones, nor deleted."""
    tx, params, state = trained
    path = tmp_path / "m.safetensors"
    save_moments(state, path)
    names = {1: [path.name]}
    for count in (2, 4):
        names[count] = [f"m-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for name in names[count]:
            shutil.copy(path, tmp_path / name)
    for count, files in names.items():
        time = 2000 if count == newest else 1000
        for name in files:
            os.utime(tmp_path / name, (time, time))
    with pytest.raises(ValueError, match="jobs of 3 different numbers of processes") as error:
        load_moments(tx.init(params), path)
    text = str(error.value)
    assert all(files[0] in text and files[-1] in text for files in names.values())
    assert names[newest][0] in text.split("The newest are")[1]
    for name in names[2]:
        os.unlink(tmp_path / name)
    with pytest.raises(ValueError, match="jobs of 2 different numbers of processes"):
        load_moments(tx.init(params), path)
    for name in names[4]:
        os.unlink(tmp_path / name)
    restored = load_moments(tx.init(params), path)
    assert_trees_equal(tx.update(params, restored)[0], tx.update(params, state)[0])


# --- Files that are not complete -----------------------------------------------------------------


def test_what_a_killed_process_left_goes(tmp_path):
    """And what a process is still writing stays."""
    code = f"""
        import os, signal
        from helpers import part_file
        part = part_file.PartFile({str(tmp_path)!r}, ".m.safetensors")
        print("made", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        (left,) = tmp_path.iterdir()
        with part_file.replacing(str(tmp_path / "m.safetensors")):
            assert left.exists()
        process.send_signal(signal.SIGKILL)
    other = tmp_path / ".m.safetensors.of-the-user.part"
    other.touch()
    with part_file.replacing(str(tmp_path / "m.safetensors")) as path:
        assert not left.exists()
        assert os.path.exists(path)
    assert {file.name for file in tmp_path.iterdir()} == {"m.safetensors", other.name}


def test_two_threads_write_one_file(trained, tmp_path):
    """Each has a file of its own until the end, and the last one wins."""
    path = str(tmp_path / "m")
    with part_file.replacing(path) as first:
        with open(first, "w") as file:
            file.write("first")
        with part_file.replacing(path) as second:
            assert second != first
            with open(second, "w") as file:
                file.write("second")
        with open(path) as file:
            assert file.read() == "second"
    with open(path) as file:
        assert file.read() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_a_remover_has_locked(tmp_path, monkeypatch):
    """The remover has not removed it yet; the file of the one who made it is another."""
    lock, removers = fcntl.flock, []

    def late(fd, operation):
        if not removers:
            (path,) = tmp_path.iterdir()
            removers.append(path.open())
            lock(removers[0], fcntl.LOCK_EX)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    part = part_file.PartFile(str(tmp_path), ".m")
    with removers[0] as remover:
        os.unlink(remover.name)
    assert os.path.exists(part.path)
    part.close()
    assert not list(tmp_path.iterdir())


def test_the_file_that_a_link_points_to_is_replaced(trained, tmp_path):
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "m.safetensors", tmp_path / "disk" / "moments"
    link.symlink_to(file)
    for _ in range(2):  # at first it points to nothing
        nbytes = save_moments(trained[2], link)
        assert link.is_symlink() and file.stat().st_size == nbytes
        file.write_bytes(b"old")
    assert [path.name for path in file.parent.iterdir()] == ["moments"]


# --- Arrays in the form of a token ----------------------------------------------------------------


@pytest.mark.parametrize("is_token", [True, False], ids=["a token", "the user's own"])
def test_orbax_with_two_integers_cut_over_devices(is_token, tmp_path):
    """As a sharding rule may cut a token: each device has one of the two."""
    import orbax.checkpoint as ocp

    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices("cpu")[:2])
    cut = jax.NamedSharding(mesh, jax.P("x"))
    tx = paged_optax.scale_by_paged_adam8bit()
    params = jax.device_put({"w": jnp.ones((64, 64))}, cut)
    _, state = tx.update(params, tx.init(params))
    token = jax.device_put(state.token.value if is_token else jnp.arange(2, dtype=jnp.int32), cut)
    saved = {"mine": token}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "c", saved)["mine"]
    assert restored.sharding == cut
    if not is_token:
        assert restored.tolist() == [0, 1]
        return
    again = state._replace(token=type(state.token)(jnp.asarray(np.asarray(restored))))
    assert_trees_equal(paged_optax.moments(again), paged_optax.moments(state))


# --- Other file systems --------------------------------------------------------------------------


def save_and_restore(state, fresh, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "c", {"state": state})
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "c", {"state": fresh})["state"]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system")
@pytest.mark.parametrize("room", [0, 2**60])
def test_orbax_where_moments_cannot_be_moved(room, trained, tmp_path, monkeypatch):
    """What is written before Orbax has made its folder is copied from another file system."""
    pytest.importorskip("orbax.checkpoint")
    tx, params, state = trained
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("no second file system")
        left = pathlib.Path(other, ".paged_optax-0.99999999-0.part")  # of a process that is gone
        left.touch()
        seen = []

        def folder_of(info):
            seen.append(sorted(os.listdir(other)))
            return other

        monkeypatch.setattr(orbax_hook, "_existing_folder", folder_of)
        monkeypatch.setattr(ext, "available_host_bytes", lambda: room)
        restored = save_and_restore(state, tx.init(params), tmp_path)
        assert seen == [[left.name]] and os.listdir(other) == []
    expected, actual = (tx.update(params, x)[0] for x in (state, restored))
    assert_trees_equal(actual, expected)


@pytest.mark.parametrize("call", ["fallocate", "pwrite"])
def test_orbax_where_the_disk_is_full(call, trained, tmp_path):
    """An error, no checkpoint, nothing left, and a state that can be saved again."""
    pytest.importorskip("orbax.checkpoint")
    tx, params, state = trained
    hooks.fail_call(call, errno.ENOSPC)
    with pytest.raises(Exception, match="No space left"):
        save_and_restore(state, tx.init(params), tmp_path)
    assert not (tmp_path / "c").exists() and not any(
        name.startswith(".paged_optax-") for _, _, names in os.walk(tmp_path) for name in names
    )
    restored = save_and_restore(state, tx.init(params), tmp_path)
    expected, actual = (tx.update(params, x)[0] for x in (state, restored))
    assert_trees_equal(actual, expected)


class Elsewhere:
    """A path of other storage: not one that `open` knows."""

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)

    def __fspath__(self):
        return f"elsewhere:/{self._folder}"

    def __truediv__(self, name):
        return Elsewhere(self._folder / name)

    def __lt__(self, other):
        return self._folder < other._folder

    def __getattr__(self, name):
        return getattr(self._folder, name)

    def glob(self, pattern):
        return [Elsewhere(path) for path in self._folder.glob(pattern)]


@pytest.mark.parametrize("room", [0, 2**60])
def test_orbax_on_other_storage(room, trained, tmp_path, monkeypatch):
    """Moments go through the paths that Orbax gives, and back through a local copy."""
    tx, params, state = trained
    monkeypatch.setattr(ext, "available_host_bytes", lambda: room)
    info = types.SimpleNamespace(parent_dir=Elsewhere(tmp_path))
    value = state.token.value
    for token, copied in orbax_hook._copy_all([value], [info]).items():
        asyncio.run(orbax_hook._commit(token, copied))
    (file,) = (tmp_path / "paged_optax").iterdir()
    save_moments(state, tmp_path / "local.safetensors")
    assert file.stat().st_size > 2 * 3000 * 1500
    values = [value]
    orbax_hook._restore(values, [info])
    restored = tx.init(params)
    restored = restored._replace(count=state.count, token=type(restored.token)(values[0]))
    expected, actual = (tx.update(params, x)[0] for x in (state, restored))
    assert_trees_equal(actual, expected)


def test_urls_are_refused(trained):
    tx, params, state = trained
    with pytest.raises(ValueError, match="gs://bucket/m is not in a local file system.*Orbax"):
        save_moments(state, "gs://bucket/m")
    with pytest.raises(ValueError, match="not in a local file system"):
        load_moments(tx.init(params), "s3://bucket/m")
