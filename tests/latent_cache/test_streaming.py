"""A streamed cache gives what a mapped one gives, in an order that all processes agree on, through any fault."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from latent_cache import Download, LatentDataset, ShardOrder, StreamingLatents, open_webdataset
from latent_cache.read.shard_copies import ShardFetcher
from latent_cache.verify import verify
from latent_cache.write.build import build
from ssdd.engine import remote as remote_module
from ssdd.engine.errors import UserError
from ssdd.engine.remote import RemoteFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PAUSE", 0.0)


def batch_lists(batches, steps: int) -> list[tuple[list, list, list]]:
    return [tuple(part.tolist() for part in batch) for batch in itertools.islice(batches, steps)]


@pytest.mark.parametrize("cache", ["means", "moments"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_epoch_gives_the_samples_of_the_mapped_cache_bit_for_bit(cache, split, request, tmp_path):
    folder = request.getfixturevalue(cache)
    mapped = LatentDataset(folder, split)
    stream = StreamingLatents(f"file://{folder}", split, cache_dir=tmp_path, order=ShardOrder(window=2))
    seen = []
    for latents, labels, indices in itertools.islice(stream.batches(12, seed=1), 5):
        seen += indices.tolist()
        assert labels.tolist() == mapped.labels[indices].tolist()
        if not mapped.has_moments:
            assert torch.equal(latents, mapped.gather(indices)[0])
    assert sorted(seen) == list(range(60))
    noise = torch.randn(60, *mapped.latent_shape)
    assert torch.equal(stream.gather(range(60), noise=noise)[0], mapped.gather(range(60), noise=noise)[0])


def test_without_shuffling_the_order_is_that_of_the_cache(means, tmp_path):
    stream = StreamingLatents(str(means), cache_dir=tmp_path, order=ShardOrder(shuffle=False))
    mapped = LatentDataset(means)
    assert [index for _, _, index in stream] == list(range(60))
    assert all(torch.equal(latent, mapped[index][0]) for latent, _, index in stream)


def test_after_an_epoch_the_copy_is_a_whole_cache(means, tmp_path):
    stream = StreamingLatents(str(means), cache_dir=tmp_path)
    assert len(list(stream)) == 60
    assert not list(tmp_path.rglob("*.part"))
    assert torch.equal(LatentDataset(tmp_path, verify="full").gather([59])[0], LatentDataset(means).gather([59])[0])
    missing = verify(tmp_path)  # only the split that was read is there
    assert missing and all("/val/" in problem for problem in missing)


def test_epochs_differ_and_a_window_of_shards_is_shuffled_together(means, tmp_path):
    stream = StreamingLatents(str(means), cache_dir=tmp_path, order=ShardOrder(window=2))
    first, second = ([index for _, _, index in stream] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(60)) and first != second
    stream.set_epoch(0)
    assert [index for _, _, index in stream] == first
    shards = np.array(first) // 16
    half = 60 - sum(len(range(16 * n, min(16 * n + 16, 60))) for n in set(shards[-20:].tolist()))
    assert len(set(shards[:half].tolist())) == 2 and not set(shards[:half]) & set(shards[half:])
    assert len(set(shards[:8].tolist())) == 2


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_share_the_batches_of_one(moments, tmp_path, parts):
    def stream() -> StreamingLatents:
        return StreamingLatents(str(moments), cache_dir=tmp_path, order=ShardOrder(window=1, parts=parts))

    alone = list(itertools.islice(stream().batches(20, seed=2), 7))
    ranks = [list(itertools.islice(stream().batches(20, 2, None, rank, 2), 7)) for rank in (0, 1)]
    for whole, *both in zip(alone, *ranks, strict=True):
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*both, strict=True), strict=True))
    assert sorted(torch.cat([batch[2] for batch in alone[:3]]).tolist()) == list(range(60))


def test_a_machine_downloads_its_part_of_an_epoch(settings, tmp_path):
    build(settings(tmp_path / "cache", samples_per_shard=5, splits=["train"]))
    indices = []
    for rank in (0, 1):
        copy = tmp_path / str(rank)
        stream = StreamingLatents(str(tmp_path / "cache"), cache_dir=copy, order=ShardOrder(window=1, parts=2))
        batches = stream.batches(20, rank=rank, world=2)
        indices += [i for _ in range(3) for i in next(batches)[2].tolist()]
        assert len(list((copy / "train").glob("*.tar"))) <= 7  # half of the 12 shards, and the next one
    assert sorted(indices) == list(range(60))


@pytest.mark.parametrize("worlds", [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_saved_state_goes_on_with_exactly_the_remaining_samples(moments, tmp_path, worlds):
    def streams(world: int) -> list[StreamingLatents]:
        return [StreamingLatents(str(moments), cache_dir=tmp_path, order=ShardOrder(window=2)) for _ in range(world)]

    def read(readers: list[StreamingLatents], steps: int) -> list[list]:
        world = len(readers)
        parts = [batch_lists(reader.batches(12, 4, None, rank, world), steps) for rank, reader in enumerate(readers)]
        return [[sum(pieces, []) for pieces in zip(*batch, strict=True)] for batch in zip(*parts, strict=True)]

    before, after = worlds
    expected = read(streams(1), 8)
    interrupted = streams(before)
    assert read(interrupted, 3) == expected[:3]
    states = [reader.state_dict() for reader in interrupted]
    assert all(state == {"seed": 4, "epoch": 0, "position": 36, "window": 2, "parts": 1} for state in states)
    resumed = streams(after)
    for reader in resumed:
        reader.load_state_dict(states[0])
    assert read(resumed, 5) == expected[3:]


def test_a_state_is_for_its_kind_of_reader_but_a_start_is_for_all(means, tmp_path):
    stream, mapped = StreamingLatents(str(means), cache_dir=tmp_path, order=ShardOrder(window=2)), LatentDataset(means)
    stream.load_state_dict(stream.state_dict())
    next(stream.batches(10))
    mapped.load_state_dict(stream.state_dict())
    with pytest.raises(UserError, match="window=None, but the state to continue from belongs to window 2"):
        mapped.batches(10)
    next(mapped.batches(10, start_step=0))
    stream.load_state_dict(mapped.state_dict())
    with pytest.raises(UserError, match="window=2, but .* was saved by another kind of reader"):
        stream.batches(10)


def test_an_iteration_resumes_to_the_sample(means, tmp_path):
    stream = StreamingLatents(str(means), cache_dir=tmp_path)
    whole = [index for _, _, index in stream]
    resumed = StreamingLatents(str(means), cache_dir=tmp_path)
    begun = [index for _, _, index in itertools.islice(resumed, 23)]
    other = StreamingLatents(str(means), cache_dir=tmp_path)
    other.load_state_dict(resumed.state_dict())
    assert begun + [index for _, _, index in other] == whole
    assert sorted(index for _, _, index in other) == list(range(60))
    with pytest.raises(UserError, match="window=3, but the state to continue from belongs to window 16"):
        different = StreamingLatents(str(means), cache_dir=tmp_path, order=ShardOrder(window=3))
        different.load_state_dict(resumed.state_dict())
        next(iter(different))


def test_workers_share_an_epoch(means, tmp_path):
    stream = StreamingLatents(str(means), cache_dir=tmp_path)
    next(stream.batches(4))  # a parent whose threads have been busy
    stream.load_state_dict({"seed": 0, "epoch": 0, "position": 0, "window": 16, "parts": 1})
    loader = torch.utils.data.DataLoader(
        stream, batch_size=10, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    latents, labels, indices = (torch.cat(part) for part in zip(*loader, strict=True))
    assert sorted(indices.tolist()) == list(range(60))
    expected, classes = LatentDataset(means).gather(indices)
    assert torch.equal(latents, expected) and torch.equal(labels, classes)


def test_a_bounded_copy_stays_within_its_bytes_and_gives_the_same(means, tmp_path):
    size = (means / "train/000000.tar").stat().st_size
    free = StreamingLatents(str(means), cache_dir=tmp_path / "free", order=ShardOrder(window=1))
    bounded = StreamingLatents(
        str(means), cache_dir=tmp_path / "bounded", order=ShardOrder(window=1), download=Download(cache_bytes=3 * size)
    )
    expected = free.batches(10)
    for batch in itertools.islice(bounded.batches(10), 18):
        assert all(torch.equal(a, b) for a, b in zip(batch, next(expected), strict=True))
        assert sum(tar.stat().st_size for tar in (tmp_path / "bounded/train").glob("*.tar")) <= 3 * size
    small = StreamingLatents(str(means), cache_dir=tmp_path / "small", download=Download(cache_bytes=1000))
    with pytest.raises(UserError, match=r"cache_bytes=1000 can't hold the 4 shards .* raise it, or lower window=16"):
        next(small.batches(10))


def test_a_shard_that_another_process_deletes_before_it_is_mapped_is_fetched_again(means, tmp_path, monkeypatch):
    stream = StreamingLatents(str(means), cache_dir=tmp_path)
    tar, waits, wait = tmp_path / "train/000001.tar", [], ShardFetcher.wait

    def deleted_once(fetcher, number):
        wait(fetcher, number)
        waits.append(number)
        if waits.count(1) == 1:
            tar.unlink(missing_ok=True)

    monkeypatch.setattr(ShardFetcher, "wait", deleted_once)
    assert torch.equal(stream.gather(range(60))[0], LatentDataset(means).gather(range(60))[0])
    assert waits.count(1) == 2 and tar.is_file()


class Faults:
    """Spoils what is read of one file: by read number of it, from 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, spoil) -> None:
        self.reads, original = 0, RemoteFolder.open

        def opened(remote, asked):
            file = original(remote, asked)
            if not asked.endswith(name):
                return file
            self.reads += 1
            return spoil(file, self.reads - 1)

        monkeypatch.setattr(RemoteFolder, "open", opened)


def flipped_bit(file):
    data = bytearray(file.read())
    data[700] ^= 1
    with fsspec.open("memory://damaged", "wb") as copy:
        copy.write(bytes(data))
    return fsspec.open("memory://damaged", "rb").open()


def test_a_shard_damaged_on_the_way_is_fetched_again(means, tmp_path, monkeypatch):
    faults = Faults(monkeypatch, "000002.tar", lambda file, read: flipped_bit(file) if read < 2 else file)
    stream = StreamingLatents(str(means), cache_dir=tmp_path)
    assert torch.equal(stream.gather(range(60))[0], LatentDataset(means).gather(range(60))[0])
    assert faults.reads == 3


def test_a_shard_that_stays_damaged_is_named_by_its_url(means, tmp_path, monkeypatch):
    Faults(monkeypatch, "000002.tar", lambda file, read: flipped_bit(file))
    stream = StreamingLatents(f"file://{means}", cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"file://.*/train/000002\.tar can't be read, after 4 attempts: .*checksum"):
        list(stream)
    assert not (tmp_path / "train/000002.tar").exists() and not list(tmp_path.rglob("*.part"))


def test_a_missing_shard_and_a_missing_cache_are_named(means, tmp_path):
    broken = Path(shutil.copytree(means, tmp_path / "broken"))
    (broken / "train/000001.tar").unlink()
    with pytest.raises(UserError, match=r"train/000001\.tar is missing: upload it"):
        list(StreamingLatents(str(broken), cache_dir=tmp_path / "copy"))
    with pytest.raises(UserError, match=r"memory://nothing/manifest\.json is missing"):
        StreamingLatents("memory://nothing", cache_dir=tmp_path / "other")


def test_a_full_disk_is_told(means, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    stream = StreamingLatents(str(means), cache_dir=tmp_path)
    monkeypatch.setattr(RemoteFolder, "open", full)
    with pytest.raises(UserError, match=r"no space left in .* for .*\.tar: make room, choose another cache_dir"):
        list(stream)


def test_commands_and_unknown_protocols_are_refused(tmp_path):
    for url in ("pipe:cat /etc/passwd", "pipe://cat", "nonsense://x"):
        with pytest.raises(UserError, match="can't read|is missing"):
            StreamingLatents(url, cache_dir=tmp_path / "copy")


def test_a_folder_of_something_else_is_left_alone(means, moments, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("")
    with pytest.raises(UserError, match="is not empty, nor a copy of"):
        StreamingLatents(str(means), cache_dir=tmp_path / "thesis")
    StreamingLatents(str(means), cache_dir=tmp_path / "copy")
    with pytest.raises(UserError, match="holds another cache than"):
        StreamingLatents(str(moments), cache_dir=tmp_path / "copy")
    with pytest.raises(UserError, match="is the cache itself"):
        StreamingLatents(str(means), cache_dir=means)
    with pytest.raises(UserError, match="no split 'test'"):
        StreamingLatents(str(means), "test", cache_dir=tmp_path / "third")


def test_object_storage_is_read_through_fsspec(means, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(means), "/bucket/cache", recursive=True)
    stream = StreamingLatents("memory://bucket/cache/", cache_dir=tmp_path)
    assert torch.equal(stream.gather(range(60))[0], LatentDataset(means).gather(range(60))[0])
    memory.rm("/bucket", recursive=True)


def test_a_web_server_is_read(means, tmp_path):
    pytest.importorskip("aiohttp")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(means)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = server.stdout.readline().split(" port ")[1].split()[0]
        stream = StreamingLatents(f"http://127.0.0.1:{port}", cache_dir=tmp_path)
        assert torch.equal(stream.gather(range(60))[0], LatentDataset(means).gather(range(60))[0])
    finally:
        server.kill()
        server.wait()


def test_processes_that_share_a_folder_download_each_shard_once(means, tmp_path):
    program = (
        "import sys; from latent_cache import StreamingLatents; from ssdd.engine import remote as fetch\n"
        "original = fetch.RemoteFolder.download\n"
        "def download(self, name, *rest): sys.stdout.write(name + chr(10)); original(self, name, *rest)\n"
        "fetch.RemoteFolder.download = download\n"
        "assert len(list(StreamingLatents(sys.argv[1], cache_dir=sys.argv[2]))) == 60\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(means), str(tmp_path)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = "".join(process.communicate()[0] for process in processes).split()
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(names) == [f"train/{number:06d}.tar" for number in range(4)]


def test_the_webdataset_library_reads_the_same_through_fsspec(moments):
    memory = fsspec.filesystem("memory")
    memory.put(str(moments), "/wds", recursive=True)
    mapped = LatentDataset(moments)
    samples = list(open_webdataset("memory://wds"))
    memory.rm("/wds", recursive=True)
    assert [sample["index"] for sample in samples] == list(range(60))
    assert [sample["cls"] for sample in samples] == mapped.labels.tolist()
    stored = torch.from_numpy(np.stack([sample["flip.npy"] for sample in samples])).float()
    assert torch.equal(stored[:, :2], mapped.gather(range(60), noise=torch.zeros(60, 2, 2, 2), flipped=[True] * 60)[0])


def test_the_decoder_refuses_members_that_no_cache_has():
    from latent_cache import decode_sample

    with pytest.raises(UserError, match=r"sample 000000001 has a member \.pkl"):
        decode_sample({"__key__": "000000001", "pkl": b""})


def test_a_batch_that_the_parts_do_not_divide_is_refused(means, tmp_path):
    stream = StreamingLatents(str(means), cache_dir=tmp_path, order=ShardOrder(parts=2))
    for read in (stream.batches, stream.steps):
        with pytest.raises(UserError, match="parts=2 does not divide batch_size=15"):
            read(15)
    with pytest.raises(UserError, match="window=0: expected a positive number"):
        ShardOrder(window=0)
