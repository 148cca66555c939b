"""The reader gives exactly what was stored, normalised, and every order of it can be resumed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import webdataset

from latent_cache import LatentDataset, decode_sample
from latent_cache.write.build import build
from ssdd.engine.errors import UserError
from ssdd.model.latent import DiagonalGaussian
from tests.latent_cache.straight import posteriors


@pytest.mark.parametrize("cache", ["means", "moments"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_stock_webdataset_reads_the_same_samples(cache, split, request):
    folder = request.getfixturevalue(cache)
    ours = LatentDataset(folder, split)
    shards = [str(path) for path in sorted((folder / split).glob("*.tar"))]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False).map(decode_sample))
    assert [sample["index"] for sample in theirs] == list(range(len(ours)))
    assert [sample["cls"] for sample in theirs] == ours.labels.tolist()
    for extension, flipped in [("npy", False), ("flip.npy", True)][: 2 if ours.has_flips else 1]:
        stored = torch.from_numpy(np.stack([sample[extension] for sample in theirs])).float()
        noise = torch.zeros(len(ours), *ours.latent_shape)
        latents, _ = ours.gather(range(len(ours)), noise=noise, flipped=[flipped] * len(ours) if flipped else None)
        assert torch.equal(latents, stored[:, : ours.latent_shape[0]])


def test_a_preloaded_split_gives_the_same(means, moments):
    for folder in (means, moments):
        mapped = LatentDataset(folder)
        for where in ("ram", "cpu"):
            loaded = LatentDataset(folder, preload=where)
            for expected, found in zip(itertools.islice(mapped.batches(16, 3), 5), loaded.batches(16, 3), strict=False):
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert loaded.labels.tolist() == mapped.labels.tolist()
    with pytest.raises(UserError, match="preload=nowhere: 0.0 GB of latents can't be loaded there"):
        LatentDataset(means, preload="nowhere")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_split_preloaded_to_the_gpu_is_gathered_there(means, moments):
    for folder, tolerance in ((means, 0.0), (moments, 1e-5)):  # exp differs in its last bit
        loaded = LatentDataset(folder, preload="cuda")
        noise = torch.ones(3, *loaded.latent_shape)
        expected, labels = LatentDataset(folder).gather([5, 59, 5], noise=noise)
        found, classes = loaded.gather([5, 59, 5], noise=noise)
        assert found.is_cuda and torch.allclose(found.cpu(), expected, atol=tolerance, rtol=0)
        assert torch.equal(classes.cpu(), labels)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("content", ["mean", "moments"])
def test_what_training_draws_has_mean_0_and_deviation_1_in_every_channel(content, flip, settings, tmp_path):
    """By the law of total variance over images, views and posterior noise: no sampling error."""
    build(settings(tmp_path, flip=flip, content=content, splits=["train"]))
    cache = LatentDataset(tmp_path)
    means, deviations = [], []
    for flipped in (False, True)[: 1 + flip]:
        views = [flipped] * 60 if flip else None
        zero = torch.zeros(60, *cache.latent_shape)
        means.append(cache.gather(range(60), noise=zero, flipped=views)[0].double())
        deviations.append(cache.gather(range(60), noise=zero + 1, flipped=views)[0].double() - means[-1])
    means, deviations = torch.cat(means), torch.cat(deviations)
    variance = means.var((0, 2, 3), correction=0) + deviations.square().mean((0, 2, 3))
    assert means.mean((0, 2, 3)).abs().max() < 1e-3
    assert (variance.sqrt() - 1).abs().max() < 1e-3


def test_batches_of_flipped_moments_agree_with_these_statistics(moments):
    drawn = torch.cat([batch for batch, _, _ in itertools.islice(LatentDataset(moments).batches(60, seed=1), 100)])
    assert drawn.mean((0, 2, 3)).abs().max() < 0.05
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_moments_come_back_as_the_posterior_they_were(moments, settings, tokenizer):
    cache = LatentDataset(moments, "val")
    mean, logvar, _ = posteriors(tokenizer, settings("").dataset, "val", flip=True)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    expected = DiagonalGaussian(torch.cat([mean, logvar], 1)).sample(noise=noise)
    found, _ = cache.gather(range(len(cache)), noise=noise, flipped=torch.ones(len(cache), dtype=torch.bool))
    assert torch.allclose(cache.norm.denormalise(found), expected, rtol=2e-3, atol=5e-3)


def test_moments_are_drawn_anew_and_a_generator_repeats_the_draw(moments):
    cache = LatentDataset(moments)
    first, again = (cache.gather([3, 1], torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(cache[3][0], cache[3][0])


def test_gather_keeps_the_order_that_is_asked_for(means):
    cache = LatentDataset(means)
    everything, labels = cache.gather(torch.arange(60))
    asked = np.array([59, 0, 17, 17, 31, 16])
    latents, found = cache.gather(asked)
    assert latents.dtype == torch.float32 and found.dtype == torch.int64
    assert torch.equal(latents, everything[asked]) and torch.equal(found, labels[asked])
    assert torch.equal(cache[-1][0], everything[59]) and cache[17][1] == labels[17]
    assert cache.gather([])[0].shape == (0, 2, 2, 2)


def test_views_and_samples_that_are_not_there_are_refused(means):
    cache = LatentDataset(means)
    with pytest.raises(IndexError):
        cache.gather([0, 60])
    with pytest.raises(IndexError):
        cache[60]
    with pytest.raises(UserError, match=r"views\.flip=true"):
        cache.gather([0], flipped=[True])
    with pytest.raises(UserError, match="no split 'test', only train, val"):
        LatentDataset(means, "test")


def test_the_flip_mask_takes_each_row_from_its_view(moments):
    cache = LatentDataset(moments)
    noise = torch.zeros(4, *cache.latent_shape)
    plain, mirrored = (cache.gather([9, 40, 9, 2], noise=noise, flipped=[flip] * 4)[0] for flip in (False, True))
    mixed, _ = cache.gather([9, 40, 9, 2], noise=noise, flipped=[False, True, True, False])
    assert torch.equal(mixed, torch.stack([plain[0], mirrored[1], mirrored[2], plain[3]]))
    assert not torch.equal(plain, mirrored)


def test_an_epoch_gives_every_sample_once_and_the_next_one_another_order(means):
    cache = LatentDataset(means)
    batches = cache.batches(12, seed=3)
    first, second = (torch.cat([next(batches)[2] for _ in range(5)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(60))
    assert not torch.equal(first, second)
    assert first.tolist() == cache.epoch_order(3, 0).tolist()


def test_a_batch_holds_the_latents_and_labels_of_its_indices(means):
    cache = LatentDataset(means)
    latents, labels, indices = next(cache.batches(7))
    expected, classes = cache.gather(indices)
    assert torch.equal(latents, expected) and torch.equal(labels, classes)


def test_the_rest_of_an_epoch_is_dropped_and_a_small_set_is_repeated(means):
    cache = LatentDataset(means)
    indices = [batch[2] for batch in itertools.islice(cache.batches(50, seed=1), 2)]
    assert indices[1].tolist() == cache.epoch_order(1, 1)[:50].tolist()
    _, _, repeated = next(cache.batches(130, seed=1))
    assert np.bincount(repeated, minlength=60).tolist().count(2) == 50


@pytest.mark.parametrize("cache", ["means", "moments"])
def test_two_processes_share_the_batches_of_one(cache, request):
    folder = request.getfixturevalue(cache)
    alone = list(itertools.islice(LatentDataset(folder).batches(20, seed=2), 4))
    ranks = [list(itertools.islice(LatentDataset(folder).batches(20, 2, 0, rank, 2), 4)) for rank in (0, 1)]
    for step, whole in enumerate(alone):
        for part, both in zip(whole, zip(ranks[0][step], ranks[1][step], strict=True), strict=True):
            assert torch.equal(part, torch.cat(both))


@pytest.mark.parametrize("world", [1, 2])
def test_a_saved_state_goes_on_with_exactly_the_next_batch_on_any_number_of_processes(moments, world):
    interrupted = LatentDataset(moments)
    batches = interrupted.batches(16, seed=4)
    for _ in range(5):
        next(batches)
    state = interrupted.state_dict()
    remaining = list(itertools.islice(batches, 4))
    assert state == {"seed": 4, "epoch": 1, "position": 32}
    parts = []
    for rank in range(world):
        resumed = LatentDataset(moments)
        resumed.load_state_dict(state)
        parts.append(itertools.islice(resumed.batches(16, seed=4, rank=rank, world=world), 4))
    for expected, found in zip(remaining, zip(*parts, strict=True), strict=True):
        for whole, pieces in zip(expected, zip(*found, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(pieces))
    by_step = next(LatentDataset(moments).batches(16, seed=4, start_step=5))
    assert torch.equal(by_step[0], remaining[0][0])


def test_a_state_is_for_its_seed_and_for_one_iterator(means):
    cache = LatentDataset(means)
    cache.load_state_dict({"seed": 4, "epoch": 2, "position": 15})
    with pytest.raises(UserError, match="belongs to seed 4"):
        cache.batches(15, seed=5)
    assert next(cache.batches(15, seed=4))[2].tolist() == cache.epoch_order(4, 2)[15:30].tolist()
    assert next(cache.batches(15, seed=4))[2].tolist() == cache.epoch_order(4, 0)[:15].tolist()


def test_a_state_from_before_the_first_batch_begins_with_any_seed(means):
    cache = LatentDataset(means)
    cache.load_state_dict(LatentDataset(means).state_dict())
    assert next(cache.batches(15, seed=4))[2].tolist() == cache.epoch_order(4, 0)[:15].tolist()
    cache.batches(15, seed=4, start_step=6)
    assert cache.state_dict() == {"seed": 4, "epoch": 1, "position": 30}


def test_worker_processes_read_the_same(means):
    cache = LatentDataset(means)
    loader = torch.utils.data.DataLoader(
        cache, batch_size=30, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    latents = torch.cat([latents for latents, _ in loader])
    assert torch.equal(latents, cache.gather(range(60))[0])


def test_the_cache_carries_what_its_user_has_to_know(means, moments):
    for cache in (LatentDataset(means), LatentDataset(moments)):
        assert cache.latent_shape == (2, 2, 2)
        assert cache.num_classes == 10 and cache.class_names[3] == "3"
        assert cache.norm.fingerprint == cache.manifest["tokenizer"]["fingerprint"]
    assert LatentDataset(means).manifest["dataset"]["crop"] == "adm"


def test_one_sample_more_than_a_shard_makes_a_shard_of_one(settings, tmp_path):
    build(settings(tmp_path, dataset={"limit": 5}, samples_per_shard=4, splits=["train"]))
    cache = LatentDataset(tmp_path)
    assert [shard["count"] for shard in cache.manifest["splits"]["train"]["shards"]] == [4, 1]
    assert cache.gather([4])[0].shape == (1, 2, 2, 2)
