import numpy as np
import pytest
import torch

from ssdd.fidelity.inception_score import InceptionScore, shuffled_splits


def logits(n, classes=6, seed=0):
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def score_of(all_logits, batch_size, splits=None, order=None):
    score = InceptionScore(all_logits.shape[1], splits)
    indices = torch.arange(len(all_logits)) if order is None else order
    for own in indices.split(batch_size):
        score.update(all_logits[own], own)
    return score.compute()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_shuffled_splits_give_torch_fidelitys_score(batch_size):
    from torch_fidelity.metric_isc import isc_features_to_metric

    own = logits(103)
    theirs = isc_features_to_metric(own, splits=10)
    mean, deviation = score_of(own, batch_size, shuffled_splits(103))
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-8)


def test_in_order_it_is_adms_score_of_every_5000_images():
    own = logits(5300).double()
    p = own.softmax(dim=1)
    scores = [
        (part * (part.log() - part.mean(dim=0).log())).sum(dim=1).mean().exp().item() for part in (p[:5000], p[5000:])
    ]
    shuffled = torch.randperm(5300, generator=torch.Generator().manual_seed(0))
    mean, deviation = score_of(own, 1000, order=shuffled)
    assert mean == pytest.approx(np.mean(scores), rel=1e-10) and deviation == pytest.approx(np.std(scores), rel=1e-8)


def test_confident_and_even_classes_score_their_number_and_equal_images_one():
    assert score_of(1000 * torch.eye(5).repeat(4, 1), 3) == (pytest.approx(5), 0)
    assert score_of(torch.ones(8, 5), 3)[0] == pytest.approx(1)


def test_an_image_that_comes_twice_counts_once():
    own = logits(10)
    score = InceptionScore(6)
    score.update(own, torch.arange(10))
    score.update(own[:4] + 1, torch.arange(4))
    assert score.compute() == score_of(own, 10)
    with pytest.raises(ValueError, match="at least 1 image"):
        InceptionScore(6).compute()
    with pytest.raises(ValueError, match=r"\[2, 6\]"):
        score.update(own[:2, :5], torch.arange(2))
